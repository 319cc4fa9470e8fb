"""Which checkpoints stay, and what is cleared away."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from flagdit.checkpoint import folders, store
from flagdit.checkpoint.folders import Keep, retention
from flagdit.errors import CheckpointError


@pytest.fixture
def tmp_path(memory_disk):
    return memory_disk


def save(run: Path, step: int, loss: float | None = None) -> Path:
    return store.save(run, step, {"model": {"w": torch.full((2,), float(step))}}, {}, validation=loss)


def steps(run: Path) -> list[int]:
    return [step for step, _ in store.complete(run)]


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


LOSSES = {1: 0.9, 2: 0.5, 3: 0.7, 4: None, 5: 0.6, 6: 0.8, 7: 0.5, 8: 0.95}


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (Keep(0), [1, 2, 3, 4, 5, 6, 7, 8]),
        (Keep(1), [8]),
        (Keep(3), [6, 7, 8]),
        (Keep(1, every=4), [4, 8]),
        (Keep(2, every=3), [3, 6, 7, 8]),
        (Keep(1, best=1), [2, 8]),  # of equals, the earlier one
        (Keep(1, best=3), [2, 5, 7, 8]),
        (Keep(1, every=5, best=2), [2, 5, 7, 8]),
        (Keep(9, best=1), [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
    ids=str,
)
def test_each_rule_keeps_its_own(tmp_path, keep, kept):
    for step, loss in LOSSES.items():
        save(tmp_path, step, loss)
        retention(tmp_path, Keep(0))
    retention(tmp_path, keep)
    assert steps(tmp_path) == kept == [int(name.removeprefix("step_")) for name in names(tmp_path)]


def test_rules_hold_while_a_run_goes_on(tmp_path):
    for step, loss in LOSSES.items():
        save(tmp_path, step, loss)
        retention(tmp_path, Keep(2, every=4, best=1))
        assert step in steps(tmp_path)
    assert steps(tmp_path) == [2, 4, 7, 8]


def test_incomplete_ones_do_not_count_and_the_newest_complete_one_stays(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step)
    (tmp_path / "checkpoints/step_00000002/COMPLETE").unlink()
    shutil.copytree(tmp_path / "checkpoints/step_00000003", tmp_path / "checkpoints/step_00000003.damaged")
    retention(tmp_path, Keep(2))
    assert names(tmp_path) == ["step_00000004", "step_00000005"]
    (tmp_path / "checkpoints/step_00000005/COMPLETE").unlink()
    retention(tmp_path, Keep(1))
    assert store.latest(tmp_path) == tmp_path / "checkpoints/step_00000004"


def test_a_folder_that_cannot_be_removed_is_told(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step)

    def refused(*args, **kwargs):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "rename", refused)
    with pytest.raises(CheckpointError, match=r"an old checkpoint cannot be removed.*checkpoint\.keep=0"):
        retention(tmp_path, Keep(1))


def test_leftovers_of_killed_processes_are_removed_at_the_start_only(tmp_path):
    path = save(tmp_path, 1)
    shutil.copytree(path, path.with_name(f"{folders.STAGING}2-dead"))
    assert steps(tmp_path) == [1]
    save(tmp_path, 3)  # another save touches nothing that may be somebody's
    assert f"{folders.STAGING}2-dead" in names(tmp_path)
    folders.clean(tmp_path)
    assert names(tmp_path) == ["step_00000001", "step_00000003"]


def test_a_step_saved_again_replaces_the_old_one(tmp_path):
    save(tmp_path, 1)
    store.save(tmp_path, 1, {"model": {"w": torch.ones(3)}}, {"again": True})
    assert names(tmp_path) == ["step_00000001"]
    found = store.load(store.latest(tmp_path))
    assert found.state == {"again": True} and found.tensors["model"]["w"].tolist() == [1, 1, 1]


def test_the_older_of_a_step_counts_until_the_newer_is_whole(tmp_path):
    path = save(tmp_path, 1)
    aside = path.with_name(f"{folders.REPLACED}{path.name}")
    os.rename(path, aside)
    assert folders.named_folders(tmp_path) == [(1, aside)]
    shutil.copytree(aside, path)
    assert folders.named_folders(tmp_path) == [(1, path)]
    (path / "COMPLETE").write_bytes(b"")
    assert folders.named_folders(tmp_path) == [(1, aside)] and store.load(store.latest(tmp_path)).step == 1
    folders.clean(tmp_path)
    assert names(tmp_path) == ["step_00000001"] and steps(tmp_path) == [1]
