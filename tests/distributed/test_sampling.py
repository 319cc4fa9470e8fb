"""Sampling on four ranks equals one process, whatever they split; prompts are shared out; 128K tokens fit."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sample_on_ranks
import torch
from PIL import Image

from flagdit.checkpoint import store
from flagdit.config.load import load_recipe, save_recipe
from flagdit.generate.edit import edit_file
from flagdit.generate.many import sample_many
from flagdit.generate.pipeline import load_pipeline
from flagdit.model.flag_dit import FlagDiT

RANKS = 4
SMALL = ["model.dim=32", "model.num_layers=2", "model.num_heads=4", "model.num_kv_heads=2", "model.ffn_dim=64"]
SMALL += ["model.patch_size=2", "model.text_dim=0", "model.num_classes=4", "model.qk_norm=layer", "sample.size=8x8"]
SMALL += ["sample.steps=3", "sample.prompts=['0']", "sample.guidance=3"]

"""256 rows of 511 patches and a [nextline]: 131,072 tokens."""


def save_run(folder: Path, overrides: list[str]) -> Path:
    """A run folder of a random model."""
    recipe = load_recipe("quickstart", [*overrides, f"run_dir={folder}", "name=run", "train.ema_decays=[]"])
    run = folder / "run"
    run.mkdir(parents=True)
    save_recipe(recipe, run / "recipe.yaml")
    generator = torch.Generator().manual_seed(0)
    model = FlagDiT(recipe.model)
    weights = {
        name: torch.randn(p.shape, generator=generator) * (0.2 if p.ndim > 1 else 0.5)
        for name, p in model.state_dict().items()
    }
    store.save(run, 1, {"model": weights}, {})
    return run


def on_ranks(run: Path, out: Path, *tasks: str) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    done = subprocess.run(
        [*command, str(root / "tests/helpers/sample_on_ranks.py"), str(run), str(out), *tasks],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, Path]:
    """A run, and the folder in which four ranks left their samples of it."""
    folder = tmp_path_factory.mktemp("small")
    run = save_run(folder, SMALL)
    Image.linear_gradient("L").resize((8, 8)).convert("RGB").save(folder / "given.png")
    on_ranks(run, folder, "tensor=2,context=2", "tensor=1,context=4", "tensor=2,context=1", "many", "edit")
    return run, folder


@pytest.mark.parametrize("mesh", ["2_2", "1_4", "2_1"])
def test_four_ranks_draw_what_one_process_draws(small, mesh):
    run, folder = small
    alone = sample_on_ranks.pictures(load_pipeline(run))
    together = torch.load(folder / f"{mesh}.pt")
    assert len(together) == len(alone) == 9
    for a, b in zip(together, alone, strict=True):
        assert b.std() > 0.05
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-4)


def test_four_ranks_edit_a_file_together(small, tmp_path):
    run, folder = small
    (alone,) = edit_file(run, folder / "given.png", "2", tmp_path / "alone.png")
    given, a, b = (np.asarray(Image.open(f)).astype(int) for f in (folder / "given.png", alone, folder / "edited.png"))
    assert abs(a - b).max() <= 1 and abs(a - given).mean() > 5


def test_prompts_are_shared_out_without_repetition(small, tmp_path):
    run, folder = small
    sample_many(run, ["0", "1", "2", "3", "0"], tmp_path / "one", repeat=2)
    alone, shared = ({f.name: f for f in p.glob("*.png")} for p in (tmp_path / "one", folder / "many"))
    assert sorted(alone) == sorted(shared) == [f"{i:06d}.png" for i in range(10)]
    for name in alone:
        a, b = (torch.tensor(list(Image.open(x[name]).tobytes()), dtype=torch.float) for x in (alone, shared))
        assert (a - b).abs().max() <= 1
