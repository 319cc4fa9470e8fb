"""Whole runs on a mesh: the loss curve of one process, continued on other meshes, and a rank that dies."""

import os
import signal
import time
from pathlib import Path

import pytest
from run_files import same, tensors

from flagdit.checkpoint.store import latest

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
def test_a_killed_rank_ends_the_run_with_the_cause(begin):
    launcher, ranks, out = begin("killed", 4, 2, "train.steps=100000", *TENSOR_CONTEXT)
    assert set(ranks) == {0, 1, 2, 3}
    os.kill(ranks[2], signal.SIGKILL)
    began = time.monotonic()
    code = launcher.wait(timeout=60)
    assert time.monotonic() - began <= 30
    said = out.read_text()
    assert code != 0 and "rank 2" in said and said.count("error:") == 1, said
    assert not [pid for pid in ranks.values() if Path(f"/proc/{pid}").exists()], "a rank is left behind"


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, pytest.param(3, marks=pytest.mark.long)])
def test_ranks_that_save_beside_training_and_are_killed_continue_bit_by_bit(train, begin, tmp_path, zero):
    keys = ("train.steps=12", "checkpoint.every=2", "checkpoint.asynchronous=true", f"parallel.zero={zero}")
    expected = train("whole", 2, *keys)
    launcher, ranks, _ = begin("cut", 2, 7, *keys)
    for pid in ranks.values():
        os.kill(pid, signal.SIGKILL)
    assert launcher.wait(timeout=60) != 0
    cut, whole = tmp_path / "runs" / "cut", tmp_path / "runs" / "whole"
    assert latest(cut) is not None
    assert curve(train("cut", 2, *keys)) == curve(expected)
    assert same(tensors(cut, 12), tensors(whole, 12))
