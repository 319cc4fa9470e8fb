"""No dead options: the program itself, run in a few ways, reads every key of the schema."""

import dataclasses
import json
import sys
from pathlib import Path

import key_spy
import pytest
from key_spy import spy_on
from PIL import Image

from flagdit.config import schema
from flagdit.config.keys import all_keys
from flagdit.config.load import load_recipe
from flagdit.data_pipelines.build import build_dataset
from flagdit.data_pipelines.encode import encode_dataset
from flagdit.errors import FlagDiTError, RecipeError
from flagdit.generate.sample import sample_to_files
from flagdit.launch.local import free_port, rank_environment
from flagdit.launch.processes import run_ranks
from flagdit.launch.slurm import checked, render_training
from flagdit.train.loop import train

ROOT = Path(__file__).parents[2]


@pytest.fixture
def reads(monkeypatch):
    """(class, key) of every key that code outside config/ reads while the fixture is alive."""
    found: set[tuple[str, str]] = set()
    spy_on(found, monkeypatch.setattr)
    return found


def on_two_ranks(tmp_path: Path, common: list[str]) -> set[tuple[str, str]]:
    """What two ranks of a run read."""
    out, port = tmp_path / "reads.json", free_port()
    keys = [*common, "name=ranks", "train.device=cpu", "parallel.tensor=2"]
    argv = [sys.executable, key_spy.__file__, str(out), "quickstart", *keys]
    path = {"PYTHONPATH": str(ROOT)}
    assert run_ranks(argv, 2, tmp_path / "logs", lambda rank: {**rank_environment(rank, 2, port), **path}, print) == 0
    return {(block, key) for block, key in json.loads(out.read_text())}


def hear_and_see(tmp_path: Path, common: list[str]) -> None:
    """Sound beside pictures, packs of a token budget, the user's own files within limits."""
    keys = ["model.modalities={image: 3, audio: 1}", f"data.sets={{{tmp_path}/encoded: 1, {tmp_path}/sound: 1}}"]
    keys += ["data.pack_tokens=400", "audio.mels=16", "audio.griffin_lim=2", "name=heard", "sample.seconds=0.2"]
    recipe = load_recipe("quickstart", [*common, *keys])
    build_dataset("instruments", tmp_path / "notes", limit=2, seconds=0.3, holdout=0.2, limits=recipe.limits)
    encode_dataset(tmp_path / "notes", tmp_path / "sound", recipe)
    train(recipe)
    (heard,) = sample_to_files(tmp_path / "runs" / "heard", ["a"], tmp_path / "a.wav", settings={"modality": "audio"})
    mine = tmp_path / "mine"
    mine.mkdir()
    heard.rename(mine / "a.wav")
    Image.new("RGB", (16, 16), "red").save(mine / "b.png")
    Image.new("RGB", (16, 16), "red").save(
        mine / "c.gif", save_all=True, append_images=[Image.new("RGB", (16, 16), (i, 9, 9)) for i in range(9)]
    )
    for name in "abc":
        (mine / f"{name}.txt").write_text("mine")
    for kind, options in {"sounds": {}, "folder": {"size": 16}, "video": {"size": 16, "frames": 1}}.items():
        build_dataset(kind, tmp_path / f"my_{kind}", src=mine, max_bad=1.0, limits=recipe.limits, **options)


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
    settings = {"train_size": "8x8", "shift_tokens": 4, "guidance": 2.0}
    sample_to_files(tmp_path / "runs" / "plain", ["a"], tmp_path / "b.png", settings=settings)
    for missing in (["codec.kind=diffusers", "codec.path=nowhere"], ["text.kind=transformers", "text.path=nowhere"]):
        with pytest.raises(RecipeError, match="nowhere"):
            encode_dataset(raw, tmp_path / "never", load_recipe("quickstart", [*common, *missing]))
    hear_and_see(tmp_path, common)
    cluster = ["cluster.gpus_per_node=2", "cluster.container=x.sqsh", "cluster.mounts=[/a:/b]"]
    render_training(checked(load_recipe("quickstart", [*common, *cluster])), tmp_path)
    haar = ["codec.kind=haar", "model.modalities={image: 12}"]
    encode_dataset(raw, tmp_path / "haar", load_recipe("quickstart", [*common, *haar]))

    reads |= on_two_ranks(tmp_path, common)
    blocks = {f.name: f.type for f in dataclasses.fields(schema.Recipe)}
    unread = []
    for key in all_keys():
        block, _, leaf = key.rpartition(".")
        owner = blocks[block] if block else "Recipe"
        if (owner if isinstance(owner, str) else owner.__name__, leaf) not in reads:
            unread.append(key)
    assert not unread, f"nothing reads {', '.join(unread)}: use them or remove them from config/schema.py"
