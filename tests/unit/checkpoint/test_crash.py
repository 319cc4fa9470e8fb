"""A save is cut at every call that reaches the disk: a sound, right, newest checkpoint is always left.

Cut by SIGKILL, by a full disk and by a failing one, for once or from there on; a new step, a step that is saved again,
and a save that removes older ones; one process and two ranks.
"""

import errno
import itertools
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from disk_faults import CALLS, Faults
from forked import on_ranks

from flagdit.checkpoint import folders, store
from flagdit.errors import CheckpointError
from flagdit.parallel.ranks import ALONE, Ranks
from flagdit.parallel.shards import Shard

KEEP = folders.Keep(last=1)


def value(version: int) -> torch.Tensor:
    return torch.arange(60.0).view(6, 10) * 10 + version


def groups(version: int, rank: int = 0, world: int = 1) -> dict:
    """A rank's shards: flat slices that start inside a row."""
    whole = value(version)
    size = -(-whole.numel() // world)
    flat = whole.flatten()[rank * size : (rank + 1) * size].clone()
    shard = Shard.slice(whole.shape, flat, rank * size, whole.shape, (0, 0))
    return {"model": {"w": shard}, "optimizer": {"m": shard, "step": Shard.whole(torch.tensor(float(version)))}}


def save(run: Path, step: int, version: int, ranks: Ranks = ALONE) -> None:
    store.save(run, step, groups(version, ranks.rank, ranks.world), {"version": version}, ranks=ranks)


def versions(run: Path) -> dict[int, int]:
    """Step → version of all checkpoints that count as complete; each is read whole."""
    found = {}
    for step, path in store.complete(run):
        checkpoint = store.load(path)
        version = checkpoint.state["version"]
        assert torch.equal(checkpoint.tensors["model"]["w"], value(version))
        assert torch.equal(checkpoint.tensors["optimizer"]["m"], value(version))
        assert checkpoint.tensors["optimizer"]["step"] == version
        found[step] = version
    return found


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def assert_recovered(run: Path, before: dict[int, int], after: dict[int, int], done: bool) -> None:
    """What a reader and the next start find after a save from one state to another was cut.

    Args:
        before, after: step → version.
        done: the save said that it had succeeded.
    """
    # A reader, without any cleaning: what was newest before, or what was to be.
    seen = versions(run)
    assert seen, names(run)
    newest = max(seen)
    assert seen[newest] in ({after[newest]} if done else {before.get(newest), after.get(newest)})
    assert newest >= max(before)
    # The run that continues, as it starts.
    found = store.newest(run, lambda text: None)
    assert found is not None and found.step == newest and found.state["version"] == seen[newest]
    folders.clean(run)
    assert versions(run) == seen
    save(run, 9, 90)
    folders.retention(run, KEEP)
    assert names(run) == ["step_00000009"] and versions(run) == {9: 90}


SCENARIOS = {
    # What is there, what is saved, what is kept of it.
    "new step": ({1: 10}, (2, 20), None, {1: 10, 2: 20}),
    "same step": ({1: 10}, (1, 11), None, {1: 11}),
    "only one kept": ({1: 10, 2: 20}, (3, 30), KEEP, {3: 30}),
}


def prepare(run: Path, before: dict[int, int]) -> None:
    for step, version in before.items():
        save(run, step, version)


@pytest.fixture(params=SCENARIOS)
def scenario(request, memory_disk):
    """A run folder in its first state, and a function that copies it and saves into the copy."""
    before, saved, keep, after = SCENARIOS[request.param]
    origin, fresh = memory_disk / "origin", itertools.count()
    prepare(origin, before)

    def copy() -> Path:
        return Path(shutil.copytree(origin, memory_disk / str(next(fresh))))

    def act(run: Path) -> None:
        save(run, *saved)
        if keep:
            folders.retention(run, keep)

    return copy, act, before, {**before, **after}


def test_killed_at_every_call(scenario):
    copy, act, before, after = scenario
    number, killed = 0, []
    while True:
        number += 1
        run = copy()
        pid = os.fork()
        if not pid:
            faults = Faults(number, "kill").install(setattr)
            act(run)
            os._exit(0 if len(faults.calls) < number else 1)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        killed.append(number)
        assert_recovered(run, before, after, done=False)
    assert len(killed) >= 40


@pytest.mark.parametrize(("fault", "lasting"), [("EIO", False), ("EIO", True), ("ENOSPC", True)])
def test_every_call_fails(scenario, fault, lasting, monkeypatch):
    copy, act, before, after = scenario
    number, failed = 0, []
    while True:
        number += 1
        run = copy()
        error = None
        with monkeypatch.context() as patch:
            faults = Faults(number, fault, lasting).install(patch.setattr)
            try:
                act(run)
            except CheckpointError as caught:
                error = caught
        if len(faults.calls) < number:
            break
        failed.append(faults.calls[number - 1])
        if error is not None:
            assert os.strerror(getattr(errno, fault)) in str(error)
        assert_recovered(run, before, after, done=error is None)
    assert set(failed) >= {"open", "write", "fsync", "rename", "mkdir"} <= set(CALLS) and len(failed) >= 40


def test_what_was_not_synced_may_be_lost(scenario, monkeypatch):
    """Nothing gets its name before it is durable: what is renamed, and every marker, names only synced things."""
    copy, act, *_ = scenario
    run, synced, written = copy(), set(), []
    paths: dict[int, str] = {}
    real = {name: getattr(os, name) for name in ("open", "fsync", "rename", "write")}

    def opened(path, flags, *args, **kwargs):
        descriptor = real["open"](path, flags, *args, **kwargs)
        paths[descriptor] = str(path)
        if flags & os.O_CREAT:
            written.append(str(path))
            if Path(path).name == folders.COMPLETE:
                folder = Path(path).parent
                assert str(folder.parent) in synced, "the rename must be durable before the marker"
        return descriptor

    def fsync(descriptor):
        synced.add(paths[descriptor])
        return real["fsync"](descriptor)

    def rename(source, target):
        inside = {str(p) for p in Path(source).rglob("*")} | {str(source)}
        if folders.STAGING in Path(source).name:
            assert inside <= synced, f"not synced before the rename: {inside - synced}"
            synced.discard(str(Path(target).parent))
        return real["rename"](source, target)

    for name, function in {"open": opened, "fsync": fsync, "rename": rename}.items():
        monkeypatch.setattr(os, name, function)
    act(run)
    monkeypatch.undo()
    marker = next(p for p in written if p.endswith(folders.COMPLETE))
    assert {marker, str(Path(marker).parent)} <= synced
    assert len([p for p in written if p.endswith(".safetensors")]) == 2


def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(descriptor):
        raise KeyboardInterrupt

    save(tmp_path, 1, 10)
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, 20)
    assert names(tmp_path) == ["step_00000001"]


def on_two_ranks(run: Path, fault: str, number: int, victim: int) -> list[int]:
    """Exit codes of two ranks of which one meets a fault: 0 saved, 3 CheckpointError, 4 another error, −9 killed, 5 the
    save makes fewer calls."""

    def act(ranks: Ranks) -> int:
        faults = Faults(number if ranks.rank == victim else 0, fault).install(setattr)
        try:
            save(run, 2, 20, ranks)
        except CheckpointError as error:
            return 3 if ranks.rank == victim or not victim or "(rank 1)" in str(error) else 4
        return 5 if ranks.rank == victim and len(faults.calls) < number else 0

    return on_ranks(2, run.with_name(run.name + ".meeting"), act)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("fault", ["kill", "EIO"])
def test_one_of_two_ranks_meets_a_fault(memory_disk, fault, victim):
    """The other rank neither hangs nor believes that the checkpoint is there."""
    prepare(memory_disk / "origin", {1: 10})
    for number in itertools.count(1, 2):
        run = Path(shutil.copytree(memory_disk / "origin", memory_disk / str(number)))
        codes = on_two_ranks(run, fault, number, victim)
        if codes[victim] == 5:
            break
        if fault == "EIO":
            assert codes in ([3, 3], [0, 0]), (number, codes)
        else:
            assert codes[victim] == -signal.SIGKILL and codes[1 - victim] in (0, 4), (number, codes)
        assert_recovered(run, {1: 10}, {1: 10, 2: 20}, done=codes == [0, 0])
    assert number > 8


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small disk here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full(small_disk):
    save(small_disk, 1, 10)
    with pytest.raises(CheckpointError, match="No space left on device") as error:
        store.save(small_disk, 2, {"model": {"w": torch.zeros(100_000)}}, {})
    assert "Earlier checkpoints are as they were" in str(error.value)
    assert names(small_disk) == ["step_00000001"] and versions(small_disk) == {1: 10}
