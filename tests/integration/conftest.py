"""A tiny encoded data set and a recipe that trains on it in a second."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flagdit.config.load import load_recipe
from flagdit.config.schema import Recipe
from flagdit.data_pipelines.build import build_dataset
from flagdit.data_pipelines.encode import encode_dataset

TINY = {
    "run_dir": "runs",
    "name": "tiny",
    "model.dim": 16,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.ffn_dim": 32,
    "model.cond_dim": 16,
    "model.text_dim": 0,
    "data.path": "data",
    "data.batch_size": 8,
    "optimizer.lr": 0.01,
    "optimizer.warmup_steps": 2,
    "train.steps": 6,
    "train.log_every": 1,
    "train.device": "cpu",
    "train.ema_decays": "[0.99,0.5]",
    "sample.size": "8x8",
    "sample.steps": 2,
    "sample.guidance": 1,
    "validation.samples": 4,
    "validation.timesteps": "[0.3,0.7]",
    "checkpoint.every": 2,
    "checkpoint.keep": 0,
}


def recipe_with(base: dict, **changes) -> Recipe:
    """A recipe from dotted keys; in keyword arguments, `__` stands for the dot."""
    keys = {**base, **{name.replace("__", "."): value for name, value in changes.items()}}
    overrides = [f"{key}={'null' if value is None else value}" for key, value in keys.items()]
    file = Path(str(base["run_dir"])).parent / "empty.yaml"
    file.write_text("{}\n")
    return load_recipe(file, overrides)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A raw data set of 40 pictures in two sizes; smooth ramps, so that there is something to learn."""
    root = tmp_path_factory.mktemp("tiny")
    (root / "src").mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        height, width = [(8, 8), (4, 12)][i % 2]
        ramp = np.linspace(0, 1, width)[None, :, None] * rng.random(3) + np.linspace(0, 1, height)[:, None, None] * 0.5
        picture = (255 * (ramp + rng.random(3)) / 2.5).astype(np.uint8)
        Image.fromarray(picture).save(root / "src" / f"p{i:02d}.png")
        (root / "src" / f"p{i:02d}.json").write_text(f'{{"caption": "picture {i}", "label": {i % 3}}}')
    build_dataset("folder", root / "raw", src=root / "src", size=8, multiple=2, holdout=0.2, shard_samples=16)
    return root / "raw"


@pytest.fixture(scope="session")
def data(pictures) -> Path:
    """The pictures as an encoded data set without text."""
    out = pictures.parent / "data"
    encode_dataset(pictures, out, recipe_with({**TINY, "run_dir": pictures.parent / "runs"}))
    return out


@pytest.fixture
def tiny(data, tmp_path):
    """Makes recipes whose run folder is tmp_path/runs/tiny."""
    base = {**TINY, "run_dir": tmp_path / "runs", "data.path": data}
    return lambda **changes: recipe_with(base, **changes)
