"""Checkpoints: exact, all or nothing, and never trusted without their manifest."""

import errno
import os
import pathlib
import subprocess

import pytest
import torch

from flagdit.checkpoint import store
from flagdit.errors import CheckpointError


def make_tensors(value: float = 1.0):
    return {
        "model": {"w": torch.full((3, 4), value), "b16": torch.randn(5).bfloat16(), "scalar": torch.tensor(value)},
        "ema_0.99": {"w": torch.arange(12.0).view(3, 4).T, "slice": torch.arange(10.0)[2:5]},
        "optimizer": {"step": torch.tensor(7)},
    }


def test_what_was_saved_comes_back(tmp_path):
    tensors, state = make_tensors(), {"batch": 5, "nested": {"a": [1, None, "x"]}}
    path = store.save(tmp_path, 5, tensors, state)
    assert path == tmp_path / "checkpoints" / "step_00000005" == store.latest(tmp_path)
    loaded = store.load(path)
    assert (loaded.step, loaded.state) == (5, state)
    assert loaded.tensors.keys() == tensors.keys()
    for group, named in tensors.items():
        assert loaded.tensors[group].keys() == named.keys()
        for name, tensor in named.items():
            got = loaded.tensors[group][name]
            assert got.dtype == tensor.dtype
            assert torch.equal(got, tensor)
    assert store.load_group(path, "ema_0.99")["slice"].tolist() == [2, 3, 4]


def test_newest_wins_and_old_ones_go(tmp_path):
    for step in (1, 2, 10, 3):
        store.save(tmp_path, step, make_tensors(step), {})
    assert store.latest(tmp_path).name == "step_00000010"
    store.retention(tmp_path, 2)
    assert [p.name for p in store.all_checkpoints(tmp_path)] == ["step_00000003", "step_00000010"]
    store.retention(tmp_path, 0)
    assert len(store.all_checkpoints(tmp_path)) == 2


def test_no_checkpoint_is_none(tmp_path):
    assert store.latest(tmp_path) is None
    assert store.load_latest(tmp_path, print) is None


def test_every_flipped_byte_and_every_cut_is_noticed(tmp_path):
    path = store.save(tmp_path, 1, {"model": {"w": torch.randn(3)}}, {"batch": 1})
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for at in range(len(whole)):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            if file.name != store.MANIFEST:
                assert store.damage(path, hashes=True), f"byte {at} of {file.name}"
        for length in range(0, len(whole), 7):
            file.write_bytes(whole[:length])
            assert store.damage(path, hashes=False), f"{file.name} cut to {length}"
        file.unlink()
        assert store.damage(path, hashes=False), f"{file.name} missing"
        file.write_bytes(whole)
    assert store.damage(path, hashes=True) is None


def test_a_damaged_newest_is_reported_and_passed_over(tmp_path):
    store.save(tmp_path, 1, make_tensors(1), {})
    newest = store.save(tmp_path, 2, make_tensors(2), {})
    file = newest / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    told = []
    assert store.load_latest(tmp_path, told.append).step == 1
    assert "step_00000002" in told[0]
    assert "model.safetensors" in told[0]
    with pytest.raises(CheckpointError, match="sha256"):
        store.load(newest)
    with pytest.raises(CheckpointError, match="sha256"):
        store.load_group(newest, "model")
    # Reaching the step again replaces it.
    store.save(tmp_path, 2, make_tensors(2), {})
    assert store.load_latest(tmp_path, told.append).step == 2
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_all_damaged_is_an_error(tmp_path):
    (store.save(tmp_path, 1, make_tensors(), {}) / store.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="damaged"):
        store.load_latest(tmp_path, lambda _: None)


def test_a_missing_group_names_those_that_exist(tmp_path):
    path = store.save(tmp_path, 1, make_tensors(), {})
    with pytest.raises(CheckpointError, match=r"no ema_0\.5.*ema_0\.99, model, optimizer"):
        store.load_group(path, "ema_0.5")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        store.load(tmp_path / "nothing")


CALLS = [("os", "fsync"), ("pathlib.Path", "rename"), ("pathlib.Path", "write_text"), ("store", "save_file")]


@pytest.mark.parametrize(("owner", "name"), CALLS, ids=[c[1] for c in CALLS])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, owner, name, code):
    store.save(tmp_path, 1, make_tensors(1), {"batch": 1})
    target = {"os": os, "pathlib.Path": pathlib.Path, "store": store}[owner]
    real = getattr(target, name)
    failed_at = 0
    while True:  # fail the first call of this kind, then the second, … until a save needs no more of them
        calls = iter(range(10**6))

        def failing(*args, calls=calls, failed_at=failed_at, **kwargs):
            if next(calls) == failed_at:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(target, name, failing)
            try:
                store.save(tmp_path, 2, make_tensors(2), {"batch": 2})
                break
            except CheckpointError as error:
                assert os.strerror(code) in str(error)
                assert "Earlier checkpoints are untouched" in str(error)
        # The save may have failed in its very last flush, after the rename; either way what is there is whole.
        survivor = store.load_latest(tmp_path, pytest.fail)
        assert survivor.step in (1, 2)
        assert survivor.tensors["model"]["scalar"] == survivor.step
        assert not list((tmp_path / "checkpoints").glob(".staging-step*"))
        failed_at += 1
        if survivor.step == 2:
            break
    assert failed_at >= 1


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("this machine does not allow mounting a tmpfs")
    try:
        store.save(tmp_path, 1, {"model": {"w": torch.ones(20_000)}}, {})
        with pytest.raises(CheckpointError, match="checkpoint of step 2 could not be written"):
            store.save(tmp_path, 2, {"model": {"w": torch.ones(80_000)}}, {})
        assert store.load_latest(tmp_path, pytest.fail).step == 1
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_leftovers_of_a_crash_are_cleaned(tmp_path):
    stale = tmp_path / "checkpoints" / ".staging-step_00000009"
    stale.mkdir(parents=True)
    (stale / "model.safetensors").write_bytes(b"half")
    assert store.latest(tmp_path) is None
    store.save(tmp_path, 1, make_tensors(), {})
    assert not stale.exists()
