"""No dead options: the program itself, run in a few ways, reads every key of the schema."""

import dataclasses
import sys
from pathlib import Path

import pytest

from flagdit.config import schema
from flagdit.config.keys import all_keys
from flagdit.config.load import load_recipe
from flagdit.data_pipelines.build import build_dataset
from flagdit.data_pipelines.encode import encode_dataset
from flagdit.errors import FlagDiTError, RecipeError
from flagdit.generate.sample import sample_to_files
from flagdit.train.loop import train

CONFIG_AREA = str(Path(schema.__file__).parent)
PACKAGE = str(Path(schema.__file__).parents[1])
BOOKKEEPING = ("recipe_hash", "check", "describe", "<dictcomp>", "asdict", "replace", "__eq__", "__repr__", "__hash__")
"""Functions that read all keys alike, to compare or show them: not a use."""


@pytest.fixture
def reads(monkeypatch):
    """(class, key) of every key that code outside config/ reads while the fixture is alive."""
    found: set[tuple[str, str]] = set()
    blocks = [c for c in vars(schema).values() if isinstance(c, type) and dataclasses.is_dataclass(c)]
    for block in blocks:
        names = {f.name for f in dataclasses.fields(block)}

        def spy(self, name, names=names, block=block):
            if name in names:
                code = sys._getframe(1).f_code
                ours = code.co_filename.startswith(PACKAGE) and not code.co_filename.startswith(CONFIG_AREA)
                if ours and code.co_name not in BOOKKEEPING:
                    found.add((block.__name__, name))
            return object.__getattribute__(self, name)

        monkeypatch.setattr(block, "__getattribute__", spy)
    return found


def test_every_key_is_read(tmp_path, reads):
    raw = tmp_path / "raw"
    build_dataset("emoji", raw, size=8, multiple=4, limit=6, styles=("twemoji", "openmoji"), holdout=0.25)
    common = [
        f"data.path={tmp_path}/encoded",
        f"run_dir={tmp_path}/runs",
        "data.batch_size=4",
        "model.dim=16",
        "model.ffn_dim=32",
        "model.num_layers=1",
        "model.num_heads=2",
        "train.steps=4",
        "train.log_every=1",
        "optimizer.warmup_steps=1",
        "optimizer.decay_steps=1",
        "validation.every=2",
        "validation.samples=2",
        "sample.every=2",
        "sample.size=8x8",
        "sample.steps=1",
        "sample.prompts=[a]",
        "checkpoint.every=2",
    ]
    encode_dataset(raw, tmp_path / "encoded", load_recipe("quickstart", common))
    train(load_recipe("quickstart", [*common, "name=plain", "train.device=cpu"]))
    adapters = [f"train.init_from={tmp_path}/runs/plain", "train.init_ema=-1", "lora.rank=1", "lora.targets=[wq]"]
    train(load_recipe("quickstart", [*common, "name=adapted", *adapters]))
    workers = ["data.workers=1", "log.wandb_project=test", "model.checkpointing=block", "model.block=next"]
    train(load_recipe("quickstart", [*common, "name=other", *workers]))
    with pytest.raises(FlagDiTError, match="bad steps in a row"):
        train(load_recipe("quickstart", [*common, "name=bad", "guard.max_grad_norm=1e-9", "guard.max_consecutive=2"]))
    sample_to_files(tmp_path / "runs" / "plain", ["a"], tmp_path / "a.png", settings={"solver": "dopri5"})
    for missing in (["codec.kind=diffusers", "codec.path=nowhere"], ["text.kind=transformers", "text.path=nowhere"]):
        with pytest.raises(RecipeError, match="nowhere"):
            encode_dataset(raw, tmp_path / "never", load_recipe("quickstart", [*common, *missing]))
    haar = ["codec.kind=haar", "model.modalities={image: 12}"]
    encode_dataset(raw, tmp_path / "haar", load_recipe("quickstart", [*common, *haar]))

    blocks = {f.name: f.type for f in dataclasses.fields(schema.Recipe)}
    unread = []
    for key in all_keys():
        block, _, leaf = key.rpartition(".")
        owner = blocks[block] if block else "Recipe"
        if (owner if isinstance(owner, str) else owner.__name__, leaf) not in reads:
            unread.append(key)
    assert not unread, f"nothing reads {', '.join(unread)}: use them or remove them from config/schema.py"
