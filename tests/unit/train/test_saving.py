"""Saving beside the training: what is written, what training waits for, and what happens when it goes wrong."""

import os
import threading
import time

import pytest
import torch

from flagdit.checkpoint import store
from flagdit.config.schema_checkpoint import CheckpointConfig
from flagdit.errors import CheckpointError
from flagdit.parallel.mesh import ParallelContext
from flagdit.parallel.shards import whole_shards
from flagdit.train.saving import Saver, Snapshot


@pytest.fixture
def tmp_path(memory_disk):
    return memory_disk


class Told(list):
    """Lines that a person would read."""

    def __call__(self, text: str) -> None:
        self.append(text)


class Gate:
    """Holds every fsync until it is opened."""

    def __init__(self, monkeypatch):
        self.opened, self.reached = threading.Event(), threading.Event()
        real = os.fsync

        def fsync(descriptor):
            self.reached.set()
            assert self.opened.wait(30)
            return real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)


def saver_of(run_dir, told, **keys) -> Saver:
    return Saver(run_dir, CheckpointConfig(**{"asynchronous": True, **keys}), ParallelContext(), told)


def snapshot(step: int, w: torch.Tensor) -> Snapshot:
    return Snapshot(step, {"model": whole_shards({"w": w})}, {"batch": step}, {"recipe.yaml": "x"}, None)


def saved(run_dir, step: int) -> torch.Tensor:
    return store.load(store.find(run_dir, step)).tensors["model"]["w"]


def steps(run_dir) -> list[int]:
    return [step for step, _ in store.complete(run_dir)]


def test_training_goes_on_while_the_copy_is_written(tmp_path, monkeypatch):
    told, gate, w = Told(), Gate(monkeypatch), torch.zeros(5)
    saver = saver_of(tmp_path, told)
    saver.prepare(0, {"model": whole_shards({"w": w})})
    saver.save(snapshot(1, w), final=False)
    assert gate.reached.wait(30) and steps(tmp_path) == [] and saver.saved == 0
    w.fill_(7)  # the next step
    saver.poll()
    assert told == []
    gate.opened.set()
    saver.wait()
    assert saved(tmp_path, 1).tolist() == [0] * 5 and saver.saved == 1
    (line,) = told
    assert "step 1  checkpoint saved in" in line and "training stood still" in line
    figures = saver.figures()
    assert 0 < figures["save_stall"] < 1 and figures["failed_saves"] == figures["skipped_saves"] == 0
    assert saver.figures()["save_stall"] == 0


def test_a_second_save_waits_for_the_first(tmp_path, monkeypatch):
    told, gate, w = Told(), Gate(monkeypatch), torch.zeros(5)
    saver = saver_of(tmp_path, told, busy="wait")
    saver.save(snapshot(1, w), final=False)
    threading.Timer(0.3, gate.opened.set).start()
    began = time.perf_counter()
    saver.save(snapshot(2, w.fill_(2)), final=False)
    assert time.perf_counter() - began > 0.2 and steps(tmp_path) == [1]
    saver.wait()
    assert steps(tmp_path) == [1, 2] and saved(tmp_path, 1)[0] == 0 and saved(tmp_path, 2)[0] == 2
    assert saver.figures()["save_stall"] > 0.2


def test_a_second_save_is_left_out_where_the_recipe_says_so(tmp_path, monkeypatch):
    told, gate, w = Told(), Gate(monkeypatch), torch.zeros(5)
    saver = saver_of(tmp_path, told, busy="skip")
    saver.save(snapshot(1, w), final=False)
    saver.save(snapshot(2, w), final=False)
    assert saver.skipped == 1 and "step 2  checkpoint left out" in told[0]
    gate.opened.set()
    saver.wait()
    saver.save(snapshot(3, w), final=False)
    saver.save(snapshot(4, w.fill_(4)), final=True)  # never left out; on the disk when it returns
    assert steps(tmp_path) == [1, 3, 4] and saved(tmp_path, 4)[0] == 4 and saver.saved == 4


def test_a_failure_is_told_and_counted_and_the_next_save_tries_again(tmp_path, monkeypatch):
    told, w = Told(), torch.zeros(5)
    saver = saver_of(tmp_path, told)
    saver.save(snapshot(1, w), final=False)
    saver.wait()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _full)
        saver.save(snapshot(2, w), final=False)
        saver.wait()
    assert "step 2  checkpoint NOT saved (1 so far)" in told[-1] and "No space left on device" in told[-1]
    assert saver.failures == 1 and saver.saved == 1 and saver.figures()["failed_saves"] == 1
    saver.save(snapshot(3, w), final=False)
    saver.wait()
    assert steps(tmp_path) == [1, 3] and saver.saved == 3


def test_too_many_failures_in_a_row_stop_the_run(tmp_path, monkeypatch):
    told, w = Told(), torch.zeros(5)
    saver = saver_of(tmp_path, told, max_failures=2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _full)
        saver.save(snapshot(1, w), final=False)
        saver.save(snapshot(2, w), final=False)
        with pytest.raises(CheckpointError, match="the last 2 checkpoints could not be written"):
            saver.save(snapshot(3, w), final=False)
    assert saver.failures == 2 and len(told) == 2


def test_without_it_a_failure_is_raised_at_once(tmp_path, monkeypatch):
    told, w = Told(), torch.zeros(5)
    saver = saver_of(tmp_path, told, asynchronous=False)
    saver.save(snapshot(1, w), final=False)
    assert steps(tmp_path) == [1] and "step 1  checkpoint saved in" in told[0]
    monkeypatch.setattr(os, "fsync", _full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        saver.save(snapshot(2, w), final=False)


def test_rules_of_keeping_hold_beside_training(tmp_path):
    saver, w = saver_of(tmp_path, Told(), keep=1, keep_every=3), torch.zeros(5)
    for step in range(1, 6):
        saver.save(snapshot(step, w), final=False)
    saver.wait()
    assert steps(tmp_path) == [3, 5]


def _full(descriptor: int) -> None:
    raise OSError(28, "No space left on device")
