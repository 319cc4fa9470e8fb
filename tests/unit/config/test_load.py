"""Recipes: inheritance, overrides, and clear words for every mistake."""

from pathlib import Path

import pytest

from flagdit.config.load import SHIPPED, describe, flatten, load_recipe, save_recipe
from flagdit.config.schema import Recipe
from flagdit.errors import RecipeError


@pytest.fixture
def write(tmp_path):
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def refusal(*args) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(*args)
    return str(caught.value)


def test_an_empty_recipe_is_the_defaults(write):
    assert load_recipe(write("a.yaml", "")) == Recipe()


@pytest.mark.parametrize("path", sorted(SHIPPED.rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_is_valid(path):
    load_recipe(path)


def test_bases_then_recipe_then_overrides(write):
    write("base.yaml", "model: {dim: 64, num_layers: 2}\nseed: 1")
    write("other.yaml", "seed: 2\ntrain: {steps: 50}\noptimizer: {warmup_steps: 5}")
    path = write("sub/mine.yaml", "base: [../base.yaml, ../other]\nmodel: {num_layers: 3}")
    recipe = load_recipe(path, ["model.num_heads=4", "optimizer.lr=1e-3", "sample.prompts=[a cat, 'dogs, two']"])
    assert (recipe.model.dim, recipe.model.num_layers, recipe.model.num_heads) == (64, 3, 4)
    assert (recipe.seed, recipe.train.steps, recipe.optimizer.lr) == (2, 50, 1e-3)
    assert recipe.sample.prompts == ["a cat", "dogs, two"]


def test_a_shipped_recipe_is_a_base_by_name(write):
    recipe = load_recipe(write("mine.yaml", "base: quickstart\nname: mine"))
    assert recipe.name == "mine"
    assert recipe.model == load_recipe("quickstart").model


def test_modalities_replace_the_default(write):
    path = write("a.yaml", "model: {modalities: {audio: 8}}")
    assert load_recipe(path).model.modalities == {"audio": 8}
    assert load_recipe(path, ["model.modalities={video: 16, image: 16}"]).model.modalities == {"video": 16, "image": 16}


def test_null_is_a_value(write):
    assert (
        load_recipe(write("a.yaml", "model: {num_kv_heads: 4}"), ["model.num_kv_heads=null"]).model.num_kv_heads is None
    )


def test_saved_recipe_reads_back_the_same_and_explains_itself(tmp_path):
    recipe = load_recipe("quickstart", ["name=x y", "text.prompt_template='a: {} # b'", "model.size=null"])
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert "# Width of the residual stream" in describe(recipe)


def test_flatten_names_every_key():
    flat = flatten(Recipe())
    assert flat["model.dim"] == 512
    assert flat["model.modalities"] == {"image": 4}
    assert len(flat) > 80


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {dims: 3}", ["unknown key model.dims", "did you mean model.dim?", "mine.yaml"]),
        ("train: {lr: 3}", ["unknown key train.lr", "did you mean optimizer.lr?"]),
        ("nmae: x", ["did you mean name?"]),
        ("modle: {dim: 3}", ["unknown key modle.dim", "did you mean model.dim?"]),
        ("model: 3", ["model is a block of keys"]),
        ("model: {dim: wide}", ["model.dim='wide'", "Integer"]),
        ("train: {compile: perhaps}", ["train.compile='perhaps'", "bool"]),
        ("sample: {prompts: 5}", ["sample.prompts=5", "list"]),
        ("model: {dim: 3", ["not valid YAML", "line 1", "mine.yaml"]),
        ("seed: 1\nseed: 2", ["'seed' stands twice", "line 2"]),
        ("- a\n- b", ["mapping of keys"]),
        ("base: nowhere", ["no recipe 'nowhere'", "mine.yaml", "quickstart"]),
        ("base: mine.yaml", ["its own base", "mine.yaml → mine.yaml"]),
    ],
)
def test_a_mistake_is_named_with_its_fix(write, text, words):
    said = refusal(write("mine.yaml", text))
    for word in words:
        assert word in said


def test_all_mistakes_are_told_at_once(write):
    said = refusal(write("mine.yaml", "nmae: x\nmodel: {dims: 3, dim: wide}"), ["seed=-"])
    assert all(word in said for word in ("4 problems", "nmae", "model.dims", "wide", "override 'seed=-'"))


@pytest.mark.parametrize("override", ["model.dim", "=3", "model..dim=3"])
def test_an_override_needs_key_and_value(override):
    assert "model.dim=256" in refusal("quickstart", [override])


def test_a_missing_recipe_suggests_a_shipped_one():
    assert "Did you mean quickstart?" in refusal("quikstart")
