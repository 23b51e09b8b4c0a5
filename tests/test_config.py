"""The recipe: defaults as promised, wrong fields refused by name."""

import pytest

from dft_lora.config import digest, load_recipe, parse_recipe, shipped_recipes
from dft_lora.errors import RecipeError


def test_defaults_are_the_papers():
    recipe = parse_recipe({})
    assert (recipe.adapter.r, recipe.adapter.alpha) == (8, 16)
    assert (recipe.train.learning_rate, recipe.train.batch_size, recipe.train.betas) == (
        5e-5,
        256,
        (0.9, 0.95),
    )
    assert (recipe.data.max_length, recipe.evaluate.samples, recipe.evaluate.max_new_tokens) == (
        2048,
        16,
        4096,
    )
    assert recipe.objective.name == "dft"


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_load_and_round_trip(name):
    recipe = load_recipe(name)
    assert parse_recipe(recipe.as_dict()) == recipe
    assert str(recipe.output_dir) == f"runs/{name}"


@pytest.mark.parametrize(
    "pair", sorted({name.removesuffix("_sft") for name in shipped_recipes() if "_sft" in name})
)
def test_a_pair_differs_in_the_objective_alone(pair):
    sft, dft = (load_recipe(f"{pair}_{name}").as_dict() for name in ("sft", "dft"))
    assert {key for key in sft if sft[key] != dft[key]} == {"name", "objective"}
    files = [shipped_recipes()[f"{pair}_{name}"].read_text().splitlines() for name in ("sft", "dft")]
    fields = [[line for line in file if not line.startswith("#")] for file in files]
    assert sum(a != b for a, b in zip(*fields, strict=True)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.learning_rat=1", "did you mean 'learning_rate'"),
        ("trian.seed=1", "did you mean 'train'"),
        ("train.batch_size=0", "train.batch_size"),
        ("train.batch_size=many", "train.batch_size"),
        ("train.micro_batch_size=300", "train.micro_batch_size (300) is larger than train.batch_size (256)"),
        ("model.dtype=fp8", "model.dtype"),
        ("train.seed.x=1", "no fields below"),
        ("nothing", "field.name=value"),
        ("train.betas=[0.9]", "train.betas"),
        ("data.skip_bad_rows=2", "data.skip_bad_rows"),
        ("output=", "output"),
    ],
)
def test_a_wrong_change_is_refused_in_one_line(change, message):
    with pytest.raises(RecipeError) as error:
        parse_recipe({}).override([change])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {learning_rat: 1}", "did you mean 'learning_rate'"),
        ("trian: {}", "did you mean 'train'"),
        ("- a list", "a mapping"),
        ("a: [1", "not readable as YAML"),
        ("train: 5", "train"),
        ("objective: {name: 3}", "objective.name"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, text, message):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as error:
        load_recipe(file)
    assert message in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_recipe_names_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'tiny_dft'"):
        load_recipe("tiny_dfft")


def test_objective_numbers_pass_through():
    recipe = parse_recipe({"objective": {"name": "power", "a": 0.5}}).override(["objective.a=2"])
    assert recipe.objective.numbers == {"a": 2}


def test_digest_ignores_key_order():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 2, "b": 1})
