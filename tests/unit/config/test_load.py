"""Reading recipes: bases, overrides, types, and the errors that name file and line."""

import re
from pathlib import Path

import pytest

from flagdit.config.keys import all_keys, flatten
from flagdit.config.load import diff, find_recipe, load_recipe, save_recipe, shipped_recipes, to_yaml
from flagdit.config.schema import Recipe
from flagdit.errors import RecipeError


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str, name: str = "mine.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return _write


def error_of(path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, list(overrides))
    return str(caught.value)


def test_empty_recipe_is_the_schema_with_its_defaults(write):
    assert load_recipe(write("")) == Recipe()
    assert load_recipe(write("model:\n# nothing set\n")) == Recipe()


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_valid(name):
    recipe = load_recipe(name, ["cluster.account=ours"])  # profiles of clusters leave it open
    assert isinstance(recipe, Recipe) and recipe.name


def test_values_are_read_as_their_keys_say(write):
    text = """
name: 007
seed: 1_000
model: {modalities: {image: 3}, num_kv_heads: null, nextline: off}
optimizer: {lr: 1e-4, betas: [0.9, 0.999]}
sample: {prompts: [yes, 12, "a: b"]}
"""
    r = load_recipe(write(text))
    assert (r.name, r.seed, r.model.nextline, r.model.num_kv_heads) == ("007", 1000, False, None)
    assert (r.optimizer.lr, r.optimizer.betas, r.sample.prompts) == (1e-4, [0.9, 0.999], ["yes", "12", "a: b"])
    assert type(r.optimizer.betas) is list and type(r.model.modalities) is dict


def test_overrides_win_over_the_file(write):
    path = write("model: {dim: 64}\noptimizer: {warmup_steps: 3}")
    r = load_recipe(path, ["model.dim=256", "sample.prompts=['a dog, big', b]", "model.num_kv_heads=null", "name=a=b"])
    assert (r.model.dim, r.sample.prompts, r.name, r.optimizer.warmup_steps) == (256, ["a dog, big", "b"], "a=b", 3)
    r = load_recipe(path, ["text.prompt_template={} in blue", "model={dim: 128, num_heads: 2}", 'name="x y"'])
    assert (r.text.prompt_template, r.model.dim, r.model.num_heads, r.name) == ("{} in blue", 128, 2, "x y")


def test_mappings_and_lists_are_replaced_as_a_whole(write):
    write("model: {modalities: {image: 3, video: 3}}\ntrain: {ema_decays: [0.9, 0.99]}", "parent.yaml")
    path = write(
        "base: parent.yaml\nmodel: {modalities: {video: 3}}\nsample: {modality: video}\ntrain: {ema_decays: [0.5]}"
    )
    r = load_recipe(path)
    assert r.model.modalities == {"video": 3} and r.train.ema_decays == [0.5]
    assert load_recipe(path, ["train.ema_decays=[]"]).train.ema_decays == []


def test_bases_are_merged_in_order_and_relative_to_their_file(write):
    write("seed: 1\nmodel: {dim: 64}\ntrain: {steps: 500}", "inner/root.yaml")
    write("base: root.yaml\nmodel: {num_layers: 3}", "inner/one.yaml")
    write("seed: 2\nmodel: {dim: 128}", "two.yaml")
    r = load_recipe(write("base: [inner/one.yaml, two.yaml]\nname: me"))
    assert (r.name, r.seed, r.model.dim, r.model.num_layers, r.train.steps) == ("me", 2, 128, 3, 500)


def test_a_shipped_recipe_is_a_base_by_name_even_from_a_file_called_alike(write):
    r = load_recipe(write("base: quickstart\nmodel: {dim: 192}", "quickstart.yaml"))
    assert r.model.dim == 192 and r.sample == load_recipe("quickstart").sample


def test_bases_in_a_circle_are_an_error(write):
    write("base: b.yaml", "a.yaml")
    path = write("base: a.yaml", "b.yaml")
    assert "a.yaml → b.yaml" in error_of(path.parent / "a.yaml")
    assert "each other's base" in error_of(write("base: self.yaml", "self.yaml"))


def test_references_to_other_keys_and_the_environment(write, monkeypatch):
    monkeypatch.setenv("SCRATCH_OF_TEST", "/scratch")
    r = load_recipe(write("run_dir: ${oc.env:SCRATCH_OF_TEST}/runs\nmodel: {cond_dim: '${model.dim}'}"))
    assert r.run_dir == "/scratch/runs" and r.model.cond_dim == r.model.dim
    assert "model.cond_dim=${model.width} cannot be resolved" in error_of(write("model: {cond_dim: '${model.width}'}"))
    assert "run_dir is not set" in error_of(write("run_dir: ???"))


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("model: {dims: 256}", "unknown key model.dims; did you mean model.dim?"),
        ("lr: 1e-4", "unknown key lr; did you mean optimizer.lr?"),
        ("optimiser: {lr: 1}", "unknown key optimiser; did you mean optimizer?"),
        ("train: {seed: 1}", "unknown key train.seed; did you mean seed?"),
        ("train: {ema_decay: [0.9]}", "unknown key train.ema_decay; did you mean train.ema_decays?"),
        ("qqq: 1", "unknown key qqq; recipes have name, run_dir, seed, model"),
        ("guard: {zzzzzzzzz: 1}", "unknown key guard.zzzzzzzzz; guard has max_grad_norm, spike"),
    ],
)
def test_unknown_keys_are_told_with_what_was_meant(write, text, meant):
    message = error_of(write("name: x\n" + text))
    assert meant in message and "mine.yaml:2" in message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model: {dim: wide}", "model.dim must be a whole number, not 'wide'"),
        ("model: {dim: 2.5}", "model.dim must be a whole number, not '2.5'"),
        ("model: {dim: null}", "model.dim must be a whole number, not null"),
        ("model: {ffn_dim: x}", "model.ffn_dim must be a whole number or null, not 'x'"),
        ("optimizer: {lr: fast}", "optimizer.lr must be a number, not 'fast'"),
        ("model: {nextline: perhaps}", "model.nextline must be true or false, not 'perhaps'"),
        ("name: [a]", "name must be text, not ['a']"),
        ("sample: {prompts: dog}", "sample.prompts must be a list of texts, not 'dog'"),
        ("optimizer: {betas: [a, b]}", "optimizer.betas must be a list of numbers, not ['a', 'b']"),
        ("model: {modalities: {image: x}}", "model.modalities must be a mapping of names to whole numbers"),
        ("model: 5", "model is a group of keys, not '5'"),
        ("seed: 1\nseed: 2", "seed is given twice"),
    ],
)
def test_wrong_types_name_key_value_and_file(write, text, told):
    message = error_of(write(text))
    assert told in message and "mine.yaml:" in message


def test_all_problems_are_reported_at_once(write):
    path = write("model:\n  dims: 4\n  num_layers: many\ndata:\n  batch_size: 10\ntrain:\n  accumulation: 3\n")
    message = error_of(path, "sede=1", "train.precision=fp16")
    assert "5 problems" in message and len(message.splitlines()) == 6
    assert "did you mean model.dim? (" in message and "mine.yaml:2)" in message
    assert "model.num_layers must be" in message and "did you mean seed? (command line)" in message
    assert "train.precision=fp16" in message
    assert "train.accumulation=3 must divide data.batch_size=10; try 2 or 5 (" in message and "mine.yaml:7)" in message


def test_rules_wait_for_keys_that_are_wrong(write):
    # model.dim is misspelt, so its default of 512 must not be held against the heads.
    message = error_of(write("model: {dims: 60, num_heads: 6}"))
    assert "num_heads" not in message and "1 problem" not in message


@pytest.mark.parametrize("text", ["model: [1, 2", "model:\n\tdim: 4", "a: b: c", '"open'])
def test_bad_yaml_names_file_and_line(write, text):
    message = error_of(write("name: x\n" + text))
    assert "this is not YAML" in message and "mine.yaml:" in message


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"- a\n- b\n", b"just words"])
def test_files_that_are_no_recipes(tmp_path, content):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    assert "bad.yaml" in error_of(path)


def test_missing_recipes_and_bases(write, tmp_path):
    write("", "quickstart2.yaml")
    assert "Did you mean quickstart?" in error_of("quikstart")
    assert "Did you mean" in error_of(tmp_path / "quickstart3.yaml") and "quickstart2.yaml" in error_of(
        tmp_path / "quickstart3.yaml"
    )
    message = error_of(write("name: x\nbase: nowhere.yaml"))
    assert "nowhere.yaml" in message and "mine.yaml:2" in message
    assert "base must be the name" in error_of(write("base: {a: b}"))
    for name in ("", "../config/quickstart", "/etc/passwd"):
        with pytest.raises(RecipeError):
            find_recipe(name)


@pytest.mark.parametrize("override", ["model.dim", "=3", "", "sample.prompts=[a", "model=5"])
def test_bad_overrides(write, override):
    message = error_of(write(""), override)
    assert override in message or "model is a group of keys" in message


def test_saved_recipe_is_the_same_recipe(write, tmp_path):
    odd = [
        "null",
        "yes",
        "007",
        "1e-3",
        "a: b # c",
        " spaces ",
        "",
        "${model.dim}",
        "näh €",
        "q\"u'o",
        "[x]",
        "- y",
        "???x",
    ]
    r = load_recipe("quickstart", ["name=null", "optimizer.lr=1e-7", "text.prompt_template=${oc.env:NOPE,x} {}"])
    r = Recipe(**{**vars(r), "sample": type(r.sample)(prompts=odd, size="8x8", ema=-1), "run_dir": "${x}"})
    save_recipe(r, tmp_path / "saved.yaml")
    again = load_recipe(tmp_path / "saved.yaml")
    assert again == r and diff(r, again) == []


def test_a_saved_recipe_keeps_the_order_of_data_sets(tmp_path):
    r = load_recipe("quickstart", ["data.sets={b: 1, a: 2}"])
    save_recipe(r, tmp_path / "saved.yaml")
    again = load_recipe(tmp_path / "saved.yaml")
    assert list(again.data.sets) == list(r.data.sets) == ["b", "a"], "sample ids follow it"


def test_saved_recipe_explains_every_key():
    text = to_yaml(Recipe())
    assert all(key.doc in text for key in all_keys().values())


def test_diff_names_changed_keys():
    a, b = load_recipe("quickstart"), load_recipe("quickstart", ["model.dim=256", "train.ema_decays=[0.5]"])
    assert diff(a, b) == [("model.dim", 128, 256), ("train.ema_decays", [0.995, 0.98], [0.5])]
    assert list(flatten(a)) == list(all_keys())


def test_examples_of_the_documentation_load(write, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch")
    page = (Path(__file__).parents[3] / "docs/recipes.md").read_text()
    examples = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    loaded = [load_recipe(write(text)) for text in examples]
    assert [r.model.dim for r in loaded] == [192, 512] and loaded[1].run_dir == "/scratch/runs"
