"""Runs on several ranks of this machine, as a user starts them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flagdit.config.load import load_recipe
from flagdit.data_pipelines.build import build_dataset
from flagdit.data_pipelines.encode import encode_dataset

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def emoji(tmp_path_factory) -> Path:
    """The quickstart's pictures, fewer of them, encoded."""
    root = tmp_path_factory.mktemp("emoji")
    build_dataset("emoji", root / "raw", size=24, limit=30, styles=("twemoji", "openmoji"), holdout=0.1)
    encode_dataset(root / "raw", root / "encoded", load_recipe("quickstart", [f"run_dir={root}/runs"]))
    return root / "encoded"


@pytest.fixture
def command(emoji, tmp_path):
    """The command line that trains the quickstart on so many ranks."""

    def line(name: str, ranks: int, *keys: str, torchrun: bool = False) -> list[str]:
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
        flagdit = ["-m", "flagdit.cli"]
        if torchrun:
            flagdit = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *flagdit]
        if ranks > 1 and not torchrun:
            return [sys.executable, *flagdit, "launch", "local", "quickstart", *common, *keys, "--ranks", str(ranks)]
        return [sys.executable, *flagdit, "train", "quickstart", *common, *keys]

    return line


@pytest.fixture
def train(command, tmp_path):
    """Trains the quickstart on so many ranks; gives the lines of its log."""

    def run(name: str, ranks: int, *keys: str, torchrun: bool = False) -> list[dict]:
        line = command(name, ranks, *keys, torchrun=torchrun)
        done = subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, timeout=900, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return run


@pytest.fixture
def begin(command, tmp_path):
    """Starts training on several ranks and waits for so many lines of its log; gives launcher, ranks and its output."""
    launchers = []

    def start(name: str, ranks: int, lines: int, *keys: str) -> tuple[subprocess.Popen, dict[int, int], Path]:
        said, metrics = tmp_path / f"{name}.out", tmp_path / "runs" / name / "metrics.jsonl"
        with said.open("w") as out:
            line = command(name, ranks, *keys)
            launchers.append(subprocess.Popen(line, stdout=out, stderr=subprocess.STDOUT, env=ENVIRONMENT))
        deadline = time.monotonic() + 300
        while not (metrics.exists() and metrics.read_text().count("\n") >= lines):
            assert launchers[-1].poll() is None and time.monotonic() < deadline, said.read_text()
            time.sleep(0.02)
        return launchers[-1], ranks_of(launchers[-1].pid), said

    yield start
    for launcher in launchers:
        launcher.kill()


def ranks_of(launcher: int) -> dict[int, int]:
    """Rank → process id, of the launcher's children."""
    found = {}
    for task in Path(f"/proc/{launcher}/task").iterdir():
        for pid in map(int, (task / "children").read_text().split()):
            variables = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
            rank = next((v.partition("=")[2] for v in variables if v.startswith("RANK=")), None)
            if rank is not None:
                found[int(rank)] = pid
    return found
