"""What goes out does not show how many ranks trained it."""

from pathlib import Path

import pytest

from flagdit.checkpoint.export import Options, export_run

SHORT = ["train.steps=2", "checkpoint.every=2", "train.ema_decays=[0.9]"]
TENSOR, ZERO3 = ["parallel.tensor=2", "parallel.zero=1"], ["parallel.zero=3"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture
def first(train, tmp_path) -> Path:
    """A run of one process."""
    train("first", 1, *SHORT)
    return tmp_path / "runs" / "first"


@pytest.mark.long
def test_exports_of_one_state_are_the_same_bytes(train, first, tmp_path):
    """With a learning rate of zero every mesh loads, splits, gathers and saves the same state."""
    still = [*SHORT, f"train.init_from={first}", "optimizer.lr=0"]
    exported = {}
    for name, ranks, mesh in (("one", 1, []), ("tensor", 2, TENSOR), ("zero3", 2, ZERO3)):
        train(name, ranks, *still, *mesh)
        run = tmp_path / "runs" / name
        for kind in ("safetensors", "diffusers"):
            export_run(run, tmp_path / name / kind, kind, Options(dtype="fp32", ema=-1, encoders=False))
        exported[name] = files_of(tmp_path / name)
    weights = {name for name in exported["one"] if name.endswith(".safetensors")}
    assert len(weights) == 2
    for name in ("tensor", "zero3"):
        assert exported[name].keys() == exported["one"].keys()
        assert {f for f in weights if exported[name][f] != exported["one"][f]} == set()
