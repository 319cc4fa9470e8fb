"""Checkpoints in other files, and the commands about them."""

import json

import pytest
import torch
from typer.testing import CliRunner

from flagdit.checkpoint import store
from flagdit.checkpoint.convert import convert
from flagdit.checkpoint.lumina import expected_shapes
from flagdit.checkpoint.weights import open_weights
from flagdit.cli import app
from flagdit.config.load import load_recipe, save_recipe
from flagdit.errors import CheckpointError, RecipeError


@pytest.fixture
def tmp_path(memory_disk):
    return memory_disk


@pytest.fixture
def run(tmp_path):
    """A run with two checkpoints."""
    recipe = load_recipe("quickstart", ["model.dim=32", "model.num_layers=2", "model.num_heads=2"])
    folder = tmp_path / "run"
    folder.mkdir()
    save_recipe(recipe, folder / "recipe.yaml")
    generator = torch.Generator().manual_seed(0)
    for step in (10, 20):
        model, ema = (
            {name: torch.randn(shape, generator=generator) for name, shape in expected_shapes(recipe.model).items()}
            for _ in range(2)
        )
        groups = {"model": model, "optimizer": {"step": torch.tensor(3.0)}, "ema_0.995": ema}
        store.save(folder, step, groups, {"batch": step, "base": None}, documents={"recipe.yaml": "x"}, validation=0.5)
    return folder


def invoke(*words) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["checkpoint", *map(str, words)])
    return result.exit_code, result.output


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


def test_another_number_of_files_holds_the_same(run, tmp_path):
    code, said = invoke("convert", run, tmp_path / "out", "--files", 3)
    assert code == 0 and "model, optimizer, ema_0.995" in said and "in 7 files" in said, said
    one, other = (store.load(store.find(folder)) for folder in (run, tmp_path / "out"))
    assert one.step == other.step == 20 and one.state == other.state and list(one.tensors) == list(other.tensors)
    assert all(equal(one.tensors[group], other.tensors[group]) for group in one.tensors)
    assert (other.path / "recipe.yaml").read_text() == "x"
    assert (other.path / "manifest.json").read_bytes() != (one.path / "manifest.json").read_bytes()
    # adapters that stand on these weights still find them
    assert open_weights(run).fingerprint == open_weights(tmp_path / "out").fingerprint
    assert open_weights(run, ema=-1).fingerprint != open_weights(run).fingerprint


def test_some_tensors_of_an_older_step(run, tmp_path):
    code, said = invoke("convert", run, tmp_path / "out", "--step", 10, "--group", "ema_0.995")
    assert code == 0, said
    found = store.load(store.find(tmp_path / "out"))
    assert found.step == 10 and list(found.tensors) == ["ema_0.995"]
    assert equal(dict(open_weights(run, step=10).tensors.items()), dict(open_weights(tmp_path / "out").tensors.items()))


def test_what_cannot_be_converted_is_told_and_leaves_nothing(run, tmp_path):
    with pytest.raises(RecipeError, match=r"no group ema_0\.5.*It has model, optimizer, ema_0\.995"):
        convert(run, tmp_path / "out", step=None, groups=["ema_0.5"], files=1)
    with pytest.raises(CheckpointError, match="the folder exists"):
        convert(run, run, step=None, groups=[], files=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_verify_reads_all_checkpoints(run):
    assert invoke("verify", run) == (0, json.dumps({"sound": [10, 20], "damaged": {}}, indent=2) + "\n")
    file = run / "checkpoints/step_00000010/optimizer/part_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    code, said = invoke("verify", run)
    found = json.loads(said)
    assert code == 1 and found["sound"] == [20]
    fault = "the content of optimizer/part_00000.safetensors has changed since it was written"
    assert found["damaged"] == {"10": [fault]}
    assert invoke("verify", run, "--step", 20)[0] == 0


def test_inspect_tells_what_else_is_there(run):
    code, said = invoke("inspect", run)
    facts = json.loads(said)
    assert code == 0 and facts["checkpoints"] == [10, 20] and facts["validation"] == 0.5
    assert facts["groups"].keys() == {"model", "optimizer", "ema_0.995"} and facts["groups"]["optimizer"]["files"] == 1
    assert facts["state"]["batch"] == 20
