"""Damage is found before anything is loaded: every flipped byte and every truncation."""

import random
from pathlib import Path

import pytest
import torch

from flagdit.checkpoint import folders, store
from flagdit.errors import CheckpointError

TINY = {"model": {"w": torch.arange(6.0).view(2, 3)}, "optimizer": {"step": torch.tensor(3.0)}}


@pytest.fixture
def tmp_path(memory_disk):
    return memory_disk


def save(run: Path, step: int, tensors=TINY) -> Path:
    return store.save(run, step, tensors, {"batch": step}, documents={"recipe.yaml": "name: x\n"})


def files_of(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file())


def damage(file: Path, at: int = -1) -> None:
    """Changes one byte and keeps the size."""
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)


def assert_found(path: Path) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        store.load(path)


def test_every_flipped_byte_is_found(tmp_path):
    path, rng, flips = save(tmp_path, 1), random.Random(0), 0
    for file in files_of(path):
        raw = file.read_bytes()
        with file.open("r+b", buffering=0) as f:
            for at, byte in enumerate(raw):
                f.seek(at)
                f.write(bytes([byte ^ rng.randrange(1, 256)]))
                assert_found(path)
                f.seek(at)
                f.write(bytes([byte]))
                flips += 1
    store.load(path)
    assert flips == sum(p.stat().st_size for p in files_of(path)) > 1300


def test_every_truncation_is_found(tmp_path):
    path = save(tmp_path, 1)
    for file in files_of(path):
        raw = file.read_bytes()
        for size in range(len(raw)):
            file.write_bytes(raw[:size])
            assert_found(path)
        file.unlink()
        with pytest.raises(CheckpointError, match=f"{file.name} is missing"):
            store.load(path)
        file.write_bytes(raw + b"\0")
        assert_found(path)
        file.write_bytes(raw)
    store.load(path)


def test_damage_anywhere_in_a_larger_one_is_found(tmp_path):
    tensors = {"model": {f"w{i}": torch.randn(300, 700) for i in range(6)}, "optimizer": {"m": torch.randn(10**6)}}
    path, rng = store.save(tmp_path, 1, tensors, {}, files=3), random.Random(1)
    large = [file for file in files_of(path) if file.stat().st_size > 10**5]
    assert len(large) == 4
    for _ in range(200):
        file = rng.choice(large)
        at = rng.randrange(file.stat().st_size)
        damage(file, at)
        assert_found(path)
        damage(file, at)
    store.load(path)


@pytest.mark.parametrize("fault", ["missing", "shorter", "flipped"])
@pytest.mark.parametrize("name", ["model/part_00000.safetensors", "state.json", "manifest.json", "COMPLETE"])
def test_the_file_at_fault_is_named(tmp_path, name, fault):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    file = path / name
    if fault == "missing":
        file.unlink()
    elif fault == "shorter":
        file.write_bytes(file.read_bytes()[:-2])
    else:
        damage(file)
    with pytest.raises(CheckpointError, match=name):
        store.load(path)
    # names and sizes tell latest() of everything but a flipped byte in a file
    unseen = fault == "flipped" and name in ("model/part_00000.safetensors", "state.json")
    assert store.latest(tmp_path) == (path if unseen else path.with_name("step_00000001"))


def test_damaged_newest_is_reported_and_the_one_before_is_used(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    damage(tmp_path / "checkpoints/step_00000003/model/part_00000.safetensors")
    (tmp_path / "checkpoints/step_00000002/COMPLETE").unlink()
    reports: list[str] = []
    found = store.newest(tmp_path, reports.append)
    assert found and found.step == 1
    assert len(reports) == 2 and "step_00000003" in reports[0] and "COMPLETE is missing" in reports[1]
    # set aside: they neither count as kept nor stand in the way of the run that goes on
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000001", "step_00000002.damaged", "step_00000003.damaged"]
    save(tmp_path, 2)
    again = store.newest(tmp_path, pytest.fail)
    assert again and again.step == 2


def test_a_recipe_may_forbid_the_one_before(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    damage(tmp_path / "checkpoints/step_00000002/state.json")
    with pytest.raises(CheckpointError, match=r"state\.json has changed.*checkpoint\.fall_back=true"):
        store.newest(tmp_path, pytest.fail, fall_back=False)
    assert len(folders.named_folders(tmp_path)) == 2, "nothing is set aside"


def test_hashes_may_be_left_out(tmp_path):
    path = save(tmp_path, 1)
    damage(path / "model/part_00000.safetensors")
    assert store.newest(tmp_path, pytest.fail, hashes=False).step == 1
    (path / "model/part_00000.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        store.newest(tmp_path, lambda text: None, hashes=False)


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_over(tmp_path):
    path = save(tmp_path, 1)
    damage(path / "state.json")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        store.newest(tmp_path, lambda text: None)
    assert path.is_dir()
