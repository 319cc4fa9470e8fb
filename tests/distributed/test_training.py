"""Whole runs on a mesh: the loss curve of one process, continued on other meshes, and a rank that dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TENSOR_CONTEXT = ("parallel.tensor=2", "parallel.context=2")


def curve(lines: list[dict]) -> list[float]:
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.long
def test_fifty_steps_have_the_loss_curve_of_one_process(train, record_property):
    keys = ("train.steps=50", "checkpoint.every=50")
    expected = curve(train("one", 1, *keys))
    assert len(expected) == 50 and expected[-1] < 0.8 * expected[0]
    rows = []
    for name, mesh in {"TP2 CP2": TENSOR_CONTEXT, "DP4": ()}.items():
        for zero in (1, 3):
            losses = curve(train(f"{name} {zero}".replace(" ", "_"), 4, *keys, *mesh, f"parallel.zero={zero}"))
            worst = max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))
            rows.append(f"{name} ZeRO {zero}: largest relative difference of 50 losses {worst:.1e}")
            assert worst <= 1e-4, rows
    record_property("table", "\n".join(["quickstart on four ranks against one process", *rows]))


@pytest.mark.long
def test_a_run_continues_on_another_mesh(train):
    """Four meshes in a row, one of them under torchrun, against one process throughout."""
    expected = curve(train("one", 1, "train.steps=8", "checkpoint.every=2"))
    train("moved", 2, "train.steps=2", "checkpoint.every=2", "parallel.tensor=2", "parallel.zero=2")
    train("moved", 4, "train.steps=4", "checkpoint.every=2", "parallel.zero=3", "parallel.context=4", "parallel.ring=2")
    train("moved", 2, "train.steps=6", "checkpoint.every=2", "train.accumulation=2", torchrun=True)
    losses = curve(train("moved", 1, "train.steps=8", "checkpoint.every=2"))
    assert len(losses) == 8
    assert max(abs(a - b) / b for a, b in zip(losses, expected, strict=True)) <= 1e-5


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_with_the_cause(emoji, tmp_path):
    keys = [f"run_dir={tmp_path}/runs", "name=killed", f"data.path={emoji}", "data.batch_size=16", "train.device=cpu"]
    keys += ["train.log_every=1", "validation.every=0", "sample.every=0", "train.steps=100000", *TENSOR_CONTEXT]
    launch = [sys.executable, "-m", "flagdit.cli", "launch", "local", "quickstart", *keys, "--ranks", "4"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "out").open("w") as out:
        launcher = subprocess.Popen(launch, stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        metrics = tmp_path / "runs" / "killed" / "metrics.jsonl"
        deadline = time.monotonic() + 300
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            assert launcher.poll() is None and time.monotonic() < deadline, (tmp_path / "out").read_text()
            time.sleep(0.2)
        ranks = ranks_of(launcher.pid)
        assert set(ranks) == {0, 1, 2, 3}
        os.kill(ranks[2], signal.SIGKILL)
        began = time.monotonic()
        code = launcher.wait(timeout=60)
        assert time.monotonic() - began <= 30
    finally:
        launcher.kill()
    said = (tmp_path / "out").read_text()
    assert code != 0 and "rank 2" in said and said.count("error:") == 1, said
    assert not [pid for pid in ranks.values() if Path(f"/proc/{pid}").exists()], "a rank is left behind"


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
