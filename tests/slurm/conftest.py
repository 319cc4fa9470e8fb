"""A SLURM cluster of three nodes on this machine, and a data set that trains in a second."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flagdit.config.load import load_recipe, save_recipe
from flagdit.data_pipelines.build import build_dataset
from flagdit.data_pipelines.encode import encode_dataset
from flagdit.launch import scheduler

SCRIPT = Path(__file__).with_name("cluster.sh")
NODES = 3
PATIENCE = 120.0
"""Seconds that anything a test waits for may take."""
TINY = {
    "model": "{dim: 16, num_layers: 2, num_heads: 2, ffn_dim: 32, cond_dim: 16, text_dim: 0}",
    "data.batch_size": 8,
    "optimizer.warmup_steps": 2,
    "train.log_every": 1,
    "train.device": "cpu",
    "sample.size": "8x8",
    "checkpoint.keep": 0,
    "checkpoint.grace": 20,
    "cluster.time": "00:20:00",
    "cluster.signal": 30,
    "cluster.cpus_per_rank": 1,
    "cluster.min_disk": 0,
}


def why_not() -> str | None:
    """Why there can be no cluster here."""
    tools = ["slurmctld", "slurmd", "sbatch", "munged", "unshare"]
    missing = [t for t in tools if not (shutil.which(t) or Path("/usr/sbin", t).exists())]
    if missing:
        return f"{', '.join(missing)} missing: apt-get install -y slurm-wlm munge"
    if os.getuid() or subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True).returncode:
        return "nodes need their own host names and mounts: run the tests as root"
    return None


class Cluster:
    """The cluster and what tests do with it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, *arguments: str) -> None:
        done = subprocess.run(["bash", SCRIPT, self.folder, *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    def wait(self, what, seconds: float = PATIENCE):
        """Waits until `what()` is true and returns it."""
        end = time.monotonic() + seconds
        while not (found := what()):
            assert time.monotonic() < end, subprocess.run(["squeue"], capture_output=True, text=True).stdout
            time.sleep(0.2)
        return found

    def ended(self, job: str, seconds: float = PATIENCE) -> dict[str, str]:
        """A job's facts, once it is over."""
        self.wait(lambda: scheduler.ended(scheduler.job(job)), seconds)
        return scheduler.job(job)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    reason = why_not()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("cluster")
    running = Cluster(folder)
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "etc" / "slurm.conf")
    try:
        running("start", str(NODES))
        yield running
    finally:
        subprocess.run(["bash", SCRIPT, folder, "stop"], capture_output=True, timeout=60)
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A raw and an encoded data set of 40 pictures: raw/ and encoded/."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "src").mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(root / "src" / f"p{i:02d}.png")
        (root / "src" / f"p{i:02d}.txt").write_text(f"picture {i}")
    build_dataset("folder", root / "raw", src=root / "src", size=8, multiple=2)
    (root / "empty.yaml").write_text("{}\n")
    encode_dataset(root / "raw", root / "encoded", load_recipe(root / "empty.yaml", overrides(TINY)))
    return root


def overrides(keys: dict) -> list[str]:
    return [f"{key}={value}" for key, value in keys.items()]


@pytest.fixture
def recipe(data, tmp_path):
    """Makes a recipe file; in keyword arguments `__` stands for the dot."""

    def make(name: str, **changes) -> Path:
        keys = {**TINY, "run_dir": tmp_path / "runs", "name": name, "data.path": data / "encoded"}
        keys |= {key.replace("__", "."): value for key, value in changes.items()}
        file = tmp_path / f"{name}.yaml"
        save_recipe(load_recipe(data / "empty.yaml", overrides(keys)), file)
        return file

    return make


def flagdit(*arguments: object) -> subprocess.CompletedProcess:
    """Runs the command in a process of its own."""
    line = [sys.executable, "-m", "flagdit.cli", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=PATIENCE)


def events(run: Path) -> list[str]:
    """What the job's script has written down."""
    file = run / "slurm" / "events.jsonl"
    return [json.loads(line)["event"] for line in file.read_text().splitlines()] if file.exists() else []


def losses(run: Path) -> dict[int, float]:
    """Step → loss. Every step must be there once."""
    file = run / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []
    found = {line["step"]: line["loss"] for line in lines}
    assert len(found) == len(lines), "a step is in the metrics twice"
    return found


@pytest.fixture
def tools():
    """Functions for tests, since test folders are no packages."""

    class Tools:
        pass

    for function in (flagdit, events, losses):
        setattr(Tools, function.__name__, staticmethod(function))
    return Tools
