"""The recipe: defaults as promised, wrong fields refused by name."""

import pytest

from dft_lora.config import (
    SEEDS,
    digest,
    load_recipe,
    parse_recipe,
    read_yaml,
    setting,
    shipped_recipes,
    yaml_text,
)
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
        ("=3", "field.name=value"),
        ("train.betas=[0.9]", "train.betas"),
        ("data.skip_bad_rows=2", "data.skip_bad_rows"),
        ("output=", "output"),
        ('output=" "', "must name a folder"),
        ("name=[unclosed", "--set 'name=[unclosed': not readable as YAML"),
        ("name=2024-13-45", "month must be in 1..12"),
        ("name=" + "[" * 5000, "not readable as YAML"),
        ("name=&a [*a]", "name"),
        ("train={seed: 1, seed: 2}", "seed is given twice, line 1, column 11"),
        ("train.batch_size=true", "field 'train.batch_size': must not be true or false"),
        ("train.batch_size=1" + "0" * 20, "train.batch_size"),
        ("evaluate.tasks=gsm8k", "field 'evaluate.tasks': must be a list"),
        ('data.source="a\\0b"', "field 'data.source': must not contain a NUL character"),
        ('evaluate.tasks=["a\\ud800"]', "half of a surrogate pair"),
        ("train.=1", "field 'train.' does not exist"),
        ("learning_rate=1", "(did you mean 'train.learning_rate'?)"),
        ("train.samples=1", "(did you mean 'rollouts.samples' or 'evaluate.samples'?)"),
    ],
)
def test_a_wrong_change_is_refused_in_one_line(change, message):
    with pytest.raises(RecipeError) as error:
        parse_recipe({}).override([change])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    ["train.offload_activations=true", "train.mlp_tile=128", "train.shard=true", "objective.teacher=runs/a"],
)
def test_what_only_the_plain_backend_does_is_refused_for_others(change):
    with pytest.raises(RecipeError, match=rf"{change.partition('=')[0]}: not with model.backend 'unsloth'"):
        parse_recipe({"objective": {"name": "target-sft"}}).override(["model.backend=unsloth", change])


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
def test_no_number_of_a_recipe_may_be_infinite_or_nan(value):
    numbers = [
        f"{part}.{field}"
        for part, values in parse_recipe({}).as_dict().items()
        if isinstance(values, dict)
        for field, default in values.items()
        if isinstance(default, int | float | list) and not isinstance(default, bool)
    ]
    assert {"train.learning_rate", "train.epochs", "train.betas", "evaluate.temperature"} <= set(numbers)
    for field in numbers:
        text = f"[{value}, {value}]" if field == "train.betas" else value
        with pytest.raises(RecipeError, match=rf"field '{field}"):
            parse_recipe({}).override([f"{field}={text}"])


@pytest.mark.parametrize("field", ["train.seed", "evaluate.seed"])
def test_seeds_are_what_every_library_takes(field):
    parse_recipe({}).override([f"{field}={SEEDS - 1}"])
    for wrong in (-1, SEEDS, 10**20):
        with pytest.raises(RecipeError, match=field):
            parse_recipe({}).override([f"{field}={wrong}"])


@pytest.mark.parametrize("name", ["a/b", "..", ".", "", " ", "a\0", "x" * 256, "a\tb", "\ud800"])
def test_a_name_is_the_name_of_one_folder(name):
    with pytest.raises(RecipeError, match="field 'name'"):
        parse_recipe({"name": name})


@pytest.mark.parametrize("text", ["plain", "my: dir", "a #1", "[x", "null", "5", "é, 1", '"', "a\nb"])
def test_a_setting_gives_the_field_this_very_text(text):
    assert parse_recipe({}).override([setting("output", text)]).output == text


def test_what_was_set_is_known_after_a_round_trip():
    """Fields at their default stay open to a task's own choice; run.json holds them all."""
    recipe = parse_recipe(parse_recipe({"train": {"seed": 3}}).as_dict()).override(["evaluate.samples=16"])
    assert recipe.train.model_fields_set == {"seed"} and recipe.evaluate.model_fields_set == {"samples"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {learning_rat: 1}", "did you mean 'learning_rate'"),
        ("trian: {}", "did you mean 'train'"),
        ("- a list", "a mapping"),
        ("a: [1", "not readable as YAML"),
        ("train: 5", "train"),
        ("objective: {name: 3}", "objective.name"),
        ("train: {seed: 1}\ntrain: {epochs: 2}", "train is given twice, line 2, column 1"),
        ("1: 2", "'1'"),
        ("name: 2024-01-01", "name"),
        ("# comment\n" + "x" * 2**20, "bytes are too many for a recipe"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, text, message):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as error:
        load_recipe(file)
    assert message in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"name: \xff\xfe", "name: x".encode("utf-16"), b"name: \x00"])
def test_a_file_that_is_no_utf8_text_is_refused_in_one_line(tmp_path, content):
    file = tmp_path / "r.yaml"
    file.write_bytes(content)
    with pytest.raises(RecipeError, match="not readable as YAML") as error:
        load_recipe(file)
    assert "\n" not in str(error.value)


def test_a_missing_recipe_names_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'tiny_dft'"):
        load_recipe("tiny_dfft")


def test_objective_numbers_pass_through():
    recipe = parse_recipe({"objective": {"name": "power", "a": 0.5}}).override(["objective.a=2"])
    assert recipe.objective.numbers == {"a": 2}
    numbers = {"5e-1": 0.5, "-1E+2": -100.0, "1e3": 1000.0, "e3": "e3", "1e": "1e", "0x1e3": 0x1E3}
    for text, number in numbers.items():
        (found,) = recipe.override([f"objective={{name: power, a: {text}}}"]).objective.numbers.values()
        assert found == number and type(found) is type(number), text
        assert read_yaml(yaml_text({"a": text}), "here") == {"a": text}


def test_a_number_where_a_section_belongs_is_refused_in_one_line():
    with pytest.raises(RecipeError, match="'train' must be a mapping of fields, not 5"):
        parse_recipe({}).override(["train=5", "train.max_steps=3"])


def test_digest_ignores_key_order():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 2, "b": 1})
