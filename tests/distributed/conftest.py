"""Runs on several ranks of this machine, as a user starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flagdit.config.load import load_recipe
from flagdit.data_pipelines.build import build_dataset
from flagdit.data_pipelines.encode import encode_dataset

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def emoji(tmp_path_factory) -> Path:
    """The quickstart's pictures, fewer of them, encoded."""
    root = tmp_path_factory.mktemp("emoji")
    build_dataset("emoji", root / "raw", size=24, limit=30, styles=("twemoji", "openmoji"), holdout=0.1)
    encode_dataset(root / "raw", root / "encoded", load_recipe("quickstart", [f"run_dir={root}/runs"]))
    return root / "encoded"


@pytest.fixture
def train(emoji, tmp_path):
    """Trains the quickstart on so many ranks; gives the lines of its log."""

    def run(name: str, ranks: int, *keys: str, torchrun: bool = False) -> list[dict]:
        common = [
            f"name={name}",
            f"run_dir={tmp_path}/runs",
            f"data.path={emoji}",
            "data.batch_size=16",
            "train.device=cpu",
            "train.log_every=1",
            "optimizer.warmup_steps=2",
            "optimizer.schedule=constant",
            "optimizer.decay_steps=0",
            "validation.every=0",
            "sample.every=0",
        ]
        command = [sys.executable, "-m", "flagdit.cli", "train", "quickstart", *common, *keys]
        if torchrun:
            torch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            command = [*torch, "-m", "flagdit.cli", "train", "quickstart", *common, *keys]
        elif ranks > 1:
            launch = [sys.executable, "-m", "flagdit.cli", "launch", "local", "quickstart"]
            command = [*launch, *common, *keys, "--ranks", str(ranks)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return run
