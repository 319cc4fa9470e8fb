"""The kernels of a run: shown, refused before anything is written, replaced where a run is only sampled."""

import json
from pathlib import Path

import pytest
import torch

from flagdit.config.load import to_yaml
from flagdit.errors import RecipeError
from flagdit.generate.pipeline import load_pipeline
from flagdit.kernels import dispatch
from flagdit.train.loop import train

pytest.importorskip("triton", reason="Triton exists on Linux only")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="forces Triton's interpreter, on the CPU")


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_on_fused_kernels_has_the_losses_of_plain_torch(tiny, capsys):
    found = []
    for kernels in ("triton", "reference"):
        folder = train(tiny(name=kernels, model__kernels=kernels, train__steps=2))
        assert f"kernels {kernels} on cpu" in capsys.readouterr().out.splitlines()[0]
        found.append(losses(folder))
    assert len(found[0]) == 2 and found[0] == pytest.approx(found[1], rel=1e-5)


def test_kernels_that_cannot_serve_are_refused_before_the_folder_changes(tiny, monkeypatch):
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    recipe = tiny(model__kernels="triton")
    with pytest.raises(
        RecipeError, match=r"model\.kernels: the blocks cannot run in Triton: .*on cpu.*model\.kernels=auto"
    ):
        train(recipe)
    assert [path.name for path in (Path(recipe.run_dir) / recipe.name).iterdir()] == [".lock"]


def test_a_run_trained_on_kernels_can_be_sampled_without(tiny, monkeypatch):
    folder = train(tiny(train__steps=2))
    recipe = tiny(train__steps=2, model__kernels="triton")
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    pipeline = load_pipeline(folder, device="cpu")
    assert torch.isfinite(pipeline.generate(["a"], recipe.sample)[0]).all()
