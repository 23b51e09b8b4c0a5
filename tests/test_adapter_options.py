"""Each option of an adapter, and each kind of quantization: it does something, resumes bit-exactly, and goes
everywhere that a plain LoRA over nf4 goes, or is refused by name."""

from functools import cache
from itertools import product

import pytest
import torch
from click.testing import CliRunner
from loss_cases import distance
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from dft_lora.cli import main
from dft_lora.config import ModelConfig, load_recipe, parse_recipe
from dft_lora.data.batches import epoch_order
from dft_lora.errors import ModelError, RecipeError, RequestError
from dft_lora.export import card, merge, to_llama_cpp, vllm_command
from dft_lora.model import backends
from dft_lora.model.adapters import adapter_layers, mixed
from dft_lora.model.backends import build
from dft_lora.model.load import add_lora, load_adapters, load_base, weights_of
from dft_lora.model.lora_inputs import keep_inputs_narrow
from dft_lora.model.starts import follow_inputs
from dft_lora.training.checkpoints import Checkpoints, write_adapter
from dft_lora.training.loop import train
from dft_lora.training.plan import FIRST_TOKENS, make_plan
from dft_lora.training.ranks import Ranks
from dft_lora.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("many_runs")
CPU = torch.device("cpu")
PLAIN = {"quantization": "none"}
OPTIONS = {
    "plain": {},
    "rslora": {"adapter": {"rslora": True}},
    "dora": {"adapter": {"dora": True}},
    "pissa": {"adapter": {"init": "pissa"}, "model": PLAIN},
    "olora": {"adapter": {"init": "olora"}, "model": PLAIN},
    "pissa, rslora": {"adapter": {"init": "pissa", "rslora": True}, "model": PLAIN},
    "loftq": {"adapter": {"init": "loftq"}},
    "eva": {"adapter": {"init": "eva"}},
    "lora+": {"adapter": {"lora_plus_ratio": 8}},
    "lora+, 8 bit": {"adapter": {"lora_plus_ratio": 8}, "train": {"optimizer": "adamw8bit"}},
    "fp4": {"model": {"quantization": "fp4"}},
    "int8": {"model": {"quantization": "int8"}},
    "none": {"model": PLAIN},
}
STEPS = 3


def recipe(tmp_path, option, dtype="float32", **changes):
    parts = {
        "model": {"name": "tiny", "dtype": dtype},
        "adapter": {"r": 4, "dropout": 0.1},
        "data": {"source": "arithmetic", "sample": 40},
        "train": {
            "batch_size": 4,
            "micro_batch_size": 4,
            "max_steps": STEPS,
            "learning_rate": 1e-2,
        },
        "output": str(tmp_path / "run"),
    }
    for part in (OPTIONS[option], changes):
        for name, values in part.items():
            parts[name] = parts.get(name, {}) | values
    return parse_recipe(parts)


class Trained:
    """Three steps of a trainer, with a checkpoint of the first, and the adapter as a run would write it."""

    def __init__(self, path, option):
        self.recipe = recipe(path, option)
        self.checkpoints = Checkpoints(path / "checkpoints", 1)
        self.trainer = Trainer(make_plan(self.recipe), Ranks(self.recipe))
        self.begun, self.loss = self.weights(), self.trainer.step(0)["loss"]
        self.trainer.save(self.checkpoints)
        self.first = self.weights()
        for step in range(1, STEPS):
            self.trainer.step(step)
        self.path = path / "adapter"
        learner = self.trainer.learner
        write_adapter(self.path, learner.adapter_weights(), learner.adapter_config)

    def weights(self):
        return {n: w.detach().clone() for n, w in self.trainer.learner.adapter_weights().items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Of each option, made when it is first asked for."""
    return cache(lambda option: Trained(tmp_path_factory.mktemp("trained"), option))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A whole run of an option, made when it is first asked for."""
    return cache(lambda option: train(recipe(tmp_path_factory.mktemp("run"), option)))


def logits(model, ids=range(5, 30)):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([list(ids)])).logits[0]


def test_dora_trains_the_length_of_rows_over_a_16_bit_base(tmp_path):
    """There, plain LoRA layers get a forward pass of their own; DoRA's must stay."""
    chosen = recipe(tmp_path, "dora", dtype="bfloat16")
    trainer = Trainer(make_plan(chosen), Ranks(chosen))

    def lengths():
        weights = trainer.learner.adapter_weights()
        return torch.cat([w.flatten().clone() for n, w in weights.items() if "magnitude" in n])

    before = lengths()
    trainer.step(0)
    assert len(before) and (lengths() != before).float().mean() > 0.9


@pytest.mark.parametrize("option", [name for name in OPTIONS if "rslora" not in name and name != "fp4"])
def test_resumes_bit_exactly(trained, option, monkeypatch):
    whole = trained(option)
    monkeypatch.setattr(backends, "follow_inputs", None)  # a checkpoint's weights need no start
    again = Trainer(whole.trainer.plan, Ranks(whole.recipe), state=whole.checkpoints.newest()[0])
    for step in range(1, STEPS):
        again.step(step)
    saved = load_file(whole.path / "adapter_model.safetensors")
    found = again.learner.adapter_weights()
    assert saved.keys() == found.keys()
    assert all(torch.equal(saved[name], weight) for name, weight in found.items())


@pytest.mark.parametrize("option", [name for name in OPTIONS if name not in ("plain", "none")])
def test_each_option_gives_another_adapter(trained, option):
    """Other shapes, or other weights, than with the same base and no option."""
    same_base = "none" if OPTIONS[option].get("model") == PLAIN else "plain"
    plain, other = trained(same_base).weights(), trained(option).weights()
    assert all(weight.isfinite().all() for weight in other.values())
    shapes = [{name: weight.shape for name, weight in weights.items()} for weights in (plain, other)]
    assert shapes[0] != shapes[1] or any(distance(other[name], plain[name]) > 1e-3 for name in plain)


@pytest.mark.parametrize("option", OPTIONS)
def test_what_is_saved_is_what_was_trained(trained, option):
    """The adapter over the unchanged base, as evaluation and the page load it: the model in training."""
    whole = trained(option)
    base, untouched = (load_base(whole.recipe.model, CPU)[0] for _ in range(2))
    loaded = load_adapters(base, {"own": whole.path})
    assert distance(logits(loaded), logits(whole.trainer.learner.adapter_model)) < 1e-5
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(untouched))


@pytest.mark.parametrize(
    ("option", "dtype"),
    [
        ("dora", "bfloat16"),
        ("pissa", "float16"),
        ("loftq", "bfloat16"),
        ("int8", "float16"),
        ("fp4", "bfloat16"),
    ],
)
def test_a_step_over_a_16_bit_base(tmp_path, option, dtype):
    """Every layer's adapter learns, in float32."""
    wanted = recipe(tmp_path, option, dtype)
    trainer = Trainer(make_plan(wanted), Ranks(wanted))
    learner = trainer.learner
    before = [p.detach().clone() for p in learner.trainable]
    trainer.step(0)
    trainer.step(1)
    assert {p.dtype for p in learner.trainable} == {torch.float32}
    assert all((p - old).abs().max() > 0 for p, old in zip(learner.trainable, before, strict=True))


def first_logits(tmp_path, option, **changes):
    wanted = recipe(tmp_path, option, **changes)
    first = make_plan(wanted).first_batch() if wanted.adapter.init == "eva" else None
    return logits(build(wanted, CPU, first=first).model)


def test_where_each_start_begins(tmp_path):
    """All but loftq begin with the base's own answers; loftq nears the base as it was before 4 bits."""
    base = logits(load_base(recipe(tmp_path, "plain").model, CPU)[0])
    whole = logits(load_base(recipe(tmp_path, "pissa").model, CPU)[0])
    for option in ("rslora", "dora", "lora+"):
        assert distance(first_logits(tmp_path, option), base) < 1e-5, option
    both = {"init": "eva", "dora": True, "rslora": True}
    assert distance(first_logits(tmp_path, "eva", adapter=both), base) < 1e-5
    for option in ("pissa", "olora", "pissa, rslora"):
        assert distance(first_logits(tmp_path, option), whole) < 1e-4, option
    for r, alpha, most in ((64, 16, 0.7), (128, 5, 1e-2)):
        begun = first_logits(tmp_path, "loftq", adapter={"r": r, "init": "loftq", "alpha": alpha})
        assert distance(begun, whole) < most * distance(base, whole), "whatever the scaling"


@pytest.fixture(scope="module")
def inputs_of(trained):
    """What each adapted layer of the base reads in the run's first tokens, row after row: x_NI by name."""
    plan = trained("eva").trainer.plan
    base = load_base(plan.recipe.model, CPU)[0]
    read = {name: [] for name in layers_of(trained("eva").begun)}
    for name, inputs in read.items():
        base.get_submodule(name).register_forward_pre_hook(lambda _, x, to=inputs: to.append(x[0][0]))
    for i in epoch_order(len(plan.examples), plan.recipe.train.seed, 0):
        logits(base, plan.examples[i].ids)
    return {name: torch.cat(inputs)[:FIRST_TOKENS].double() for name, inputs in read.items()}


def layers_of(weights):
    """A_RI by the name of its layer in the base."""
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): weight
        for name, weight in weights.items()
        if "lora_A" in name
    }


def test_eva_begins_with_what_each_layer_reads(trained, inputs_of):
    """A's rows are orthonormal, and no others keep more of the inputs; B is 0, so the base is not changed."""
    begun = trained("eva").begun
    assert trained("eva").loss == trained("plain").loss
    assert not any(weight.any() for name, weight in begun.items() if "lora_B" in name)
    for name, A_RI in layers_of(begun).items():
        R, x_NI = len(A_RI), inputs_of[name]
        assert len(x_NI) == FIRST_TOKENS
        assert torch.allclose(A_RI @ A_RI.T, torch.eye(R), atol=1e-5), name
        best = torch.linalg.svdvals(x_NI)[:R].square().sum()
        assert (x_NI @ A_RI.T.double()).square().sum() > (1 - 1e-4) * best, name


def test_eva_does_not_depend_on_the_micro_batch(trained, tmp_path):
    wanted = recipe(tmp_path, "eva", train={"batch_size": 4, "micro_batch_size": 1, "max_steps": STEPS})
    found = Trainer(make_plan(wanted), Ranks(wanted)).learner.adapter_weights()
    assert all(torch.equal(found[name], weight) for name, weight in trained("eva").begun.items())


def test_eva_looks_at_prompts_where_the_run_answers_itself():
    batch = make_plan(load_recipe("tiny_grpo", ["adapter.init=eva"])).first_batch()
    assert batch.tokens == FIRST_TOKENS and not batch.supervised


def test_eva_refuses_a_layer_that_misses_tokens_and_one_that_overflows(trained):
    plan = trained("eva").trainer.plan
    base = load_base(plan.recipe.model, CPU)[0]
    base.model.layers[0].expert = torch.nn.Linear(8, 8)
    model = add_lora(base, plan.recipe.adapter)
    with pytest.raises(ModelError, match=r"every token, which model.layers.0.expert does not"):
        follow_inputs(model, plan.first_batch())
    base.get_input_embeddings().weight.fill_(torch.inf)
    with pytest.raises(ModelError, match=r"the inputs of model.layers.0.self_attn.q_proj are not finite"):
        follow_inputs(model, plan.first_batch())


def test_rslora_divides_by_the_root_of_the_rank(tmp_path):
    for option, scaling in (("plain", 2.0), ("rslora", 8.0)):
        adapter = {"r": 16, "alpha": 32, "rslora": option == "rslora"}
        model = build(recipe(tmp_path, option, adapter=adapter), CPU).model
        assert model.base_model.model.model.layers[0].mlp.up_proj.scaling["default"] == scaling


def test_lora_plus_is_a_larger_rate_for_b(trained):
    """After one step of AdamW every weight has moved by about its rate: B by eight times more than A."""
    plain, plus = trained("plain").first, trained("lora+").first
    for name in plain:
        if "lora_B" in name:  # starts at zero
            assert distance(plus[name], 8 * plain[name]) < 1e-3, name
        else:
            assert torch.equal(plus[name], plain[name]), name


def test_a_loader_of_4_bit_bases_tells_fp4_from_nf4(tmp_path):
    kinds = {}
    for option in ("plain", "fp4", "int8"):
        base = load_base(recipe(tmp_path, option).model, CPU)[0]
        layer = base.model.layers[0].mlp.up_proj
        kinds[option] = getattr(getattr(layer, "quant_state", None), "quant_type", layer.weight.dtype)
        assert weights_of(recipe(tmp_path, option).model) == {"plain": "nf4"}.get(option, option)
    assert kinds == {"plain": "nf4", "fp4": "fp4", "int8": torch.int8}


def test_rows_of_an_int8_base_do_not_depend_on_their_batch(tmp_path):
    """Outlier columns, bitsandbytes' default, are chosen over the whole batch."""
    base = load_base(recipe(tmp_path, "int8").model, CPU)[0]
    one, other = list(range(5, 30)), list(range(60, 85))
    with torch.no_grad():
        together = base(input_ids=torch.tensor([one, other])).logits
    assert distance(together[0], logits(base, one)) < 1e-5


def test_an_8_bit_layer_with_a_bias_is_trained(tmp_path):
    """bitsandbytes returns a view from a Function of its own there, as on CUDA without a bias."""
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    base = load_base(ModelConfig(name=str(tmp_path), quantization="int8"), CPU)[0]
    peft = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    ids_BL = torch.arange(5, 29).view(2, 12)

    def gradients():
        peft.zero_grad()
        peft(input_ids=ids_BL).logits.square().mean().backward()
        return {name: p.grad.clone() for name, p in peft.named_parameters() if p.grad is not None}

    theirs = gradients()
    keep_inputs_narrow(peft)
    ours = gradients()
    assert len(ours) == 2
    assert all(distance(ours[name], theirs[name]) < 1e-5 for name in theirs)


def test_several_adapters_in_one_batch(trained):
    """rsLoRA, DoRA, LoftQ, EVA and the base, mixed by row: each row as on its own.

    Also at a single position, as in a decoding step, where all but DoRA are stacked.
    """
    names = ("plain", "rslora", "dora", "loftq", "eva")
    base = load_base(trained("plain").recipe.model, CPU)[0]
    model = load_adapters(base, {name: trained(name).path for name in names})
    rows = ["plain", "dora", None, "rslora", "loftq", "eva"]
    whole_BL = torch.arange(5, 5 + 6 * 20).view(6, 20)
    no_dora = ["plain" if name == "dora" else name for name in rows]

    def alone(i):
        with torch.no_grad():
            return model(input_ids=ids_BL[i : i + 1]).logits[0]

    for asked, ids_BL in product((rows, ["dora"] * 6, no_dora), (whole_BL, whole_BL[:, :1])):
        layers = adapter_layers(model, asked)
        with torch.no_grad(), mixed(layers, asked):
            together = model(input_ids=ids_BL).logits
        stacked = [layer.stacks for layer in layers if any(layer.stacks.values())]
        assert bool(stacked) == (asked is no_dora and ids_BL.shape[1] == 1)
        for i, name in enumerate(asked):
            with model.disable_adapter():
                untouched = alone(i)
            if name is None:
                assert distance(together[i], untouched) < 1e-6
            else:
                model.set_adapter(name)
                assert distance(together[i], alone(i)) < 1e-5, name
                assert distance(together[i], untouched) > 1e-3, name


@pytest.mark.parametrize("option", ["dora", "pissa"])
def test_merge(runs, tmp_path, option):
    """The merged model answers like the 16-bit base with the adapter beside it."""
    drift = merge(runs(option), tmp_path / "merged", "float32")
    assert drift["from_unmerged"]["largest_logit_change"] < 1e-3
    if OPTIONS[option].get("model") == PLAIN:
        assert drift["from_training"]["largest_logit_change"] < 1e-3


def test_export_to_llama_cpp_and_vllm(runs, tmp_path):
    path, _ = to_llama_cpp(runs("pissa"), tmp_path / "pissa.gguf")
    assert path.stat().st_size > 1000
    assert "--max-lora-rank 8 " in vllm_command(runs("pissa")), "of twice the rank"
    with pytest.raises(RequestError, match="DoRA"):
        vllm_command(runs("dora"))
    with pytest.raises(RequestError, match="plain LoRA"):
        to_llama_cpp(runs("dora"), tmp_path / "dora.gguf")
    assert "dft-lora merge" in card(runs("dora")) and "--max-lora-rank 8 " in card(runs("pissa"))


def test_evaluate_a_dora_run(runs):
    done = CliRunner().invoke(
        main,
        ["evaluate", str(runs("dora").path), "--task", "arithmetic", "--samples", "1", "--limit", "2"],
    )
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": {"init": "pissa"}}, r"adapter.init: pissa .*model.quantization: none \(it is nf4\)"),
        ({"adapter": {"init": "olora"}, "model": {"quantization": "int8"}}, "adapter.init: olora"),
        (
            {"adapter": {"init": "loftq"}, "model": {"quantization": "none"}},
            "loftq corrects what 4 bits lost",
        ),
        ({"adapter": {"init": "eva"}, "train": {"shard": True}}, "adapter.init: eva: not with train.shard"),
        ({"adapter": {"init": "svd"}}, "adapter.init"),
        ({"adapter": {"dora": True, "init": "loftq"}}, "adapter.dora"),
        ({"adapter": {"rslora": "often"}}, "adapter.rslora"),
        ({"adapter": {"lora_plus_ratio": 0.5}}, "adapter.lora_plus_ratio"),
        ({"adapter": {"lora_plus_ratio": float("inf")}}, "adapter.lora_plus_ratio"),
        ({"adapter": {"dora": True}, "train": {"shard": True}}, "adapter.dora: not with train.shard"),
        (
            {"adapter": {"dora": True}, "model": {"backend": "unsloth"}},
            "adapter.dora: not with model.backend",
        ),
        ({"model": {"quantization": "int8", "backend": "unsloth"}}, "int8 does not go with model.backend"),
        ({"model": {"quantization": "fp4", "backend": "unsloth"}}, "fp4 does not go with model.backend"),
        ({"model": {"quantization": "int8"}, "train": {"shard": True}}, "int8 does not go with train.shard"),
        ({"model": {"quantization": "nf8"}}, "model.quantization"),
    ],
)
def test_refused_by_name(changes, message):
    with pytest.raises(RecipeError, match=message) as refused:
        parse_recipe(changes)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("objective", [{"name": "asft"}, {"name": "dpo"}, {"name": "grpo", "kl": 0.1}])
def test_an_objective_that_needs_the_base_refuses_a_start_that_changes_it(tmp_path, objective):
    with pytest.raises(
        RecipeError, match=f"init: pissa changes the base that '{objective['name']}' compares"
    ):
        make_plan(recipe(tmp_path, "pissa", objective=objective, rollouts={"samples": 2}))


def test_a_rank_beyond_a_layers_width(tmp_path):
    with pytest.raises(ModelError, match=r"adapter.r 4000: pissa allows at most 128 for model.layers.0"):
        build(recipe(tmp_path, "pissa", adapter={"init": "pissa", "r": 4000}), CPU)


@pytest.mark.parametrize(
    ("r", "sample", "message"),
    [
        (129, 40, r"2048 tokens, 128 wide\); use at most 128"),
        (120, 1, r"\d\d tokens, 128 wide\); use at most"),
    ],
)
def test_a_rank_beyond_what_eva_finds(tmp_path, r, sample, message):
    wanted = recipe(
        tmp_path,
        "eva",
        adapter={"r": r},
        data={"source": "arithmetic", "sample": sample},
        train={"batch_size": 1, "micro_batch_size": 1, "max_steps": 1},
    )
    with pytest.raises(ModelError, match=f"adapter.r: {r} is more than eva finds .*{message}"):
        Trainer(make_plan(wanted), Ranks(wanted))
