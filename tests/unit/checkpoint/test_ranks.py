"""Several ranks save and load together: each its part, every byte once, with one opinion about damage."""

import pytest
import torch
from forked import on_ranks

from flagdit.checkpoint import store
from flagdit.errors import CheckpointError
from flagdit.parallel.ranks import Ranks
from flagdit.parallel.shards import Shard


@pytest.fixture
def tmp_path(memory_disk):
    return memory_disk


WHOLE = torch.arange(70.0).view(7, 10)
BIAS = torch.arange(9.0)


def groups(ranks: Ranks, filled: bool) -> dict[str, dict[str, Shard]]:
    """Rank r holds the r-th of equal flat slices of a matrix, and all of a vector, as every other rank does."""
    size = -(-WHOLE.numel() // ranks.world)
    flat = WHOLE.flatten()[ranks.rank * size : (ranks.rank + 1) * size].clone()
    bias = BIAS.clone()
    if not filled:
        flat.fill_(-1), bias.fill_(-1)
    matrix = Shard.slice(WHOLE.shape, flat, ranks.rank * size, WHOLE.shape, (0, 0))
    return {"model": {"w": matrix, "bias": Shard.whole(bias)}, "optimizer": {"m": matrix}}


def save(run, step: int = 1):
    def function(ranks: Ranks) -> int:
        store.save(run, step, groups(ranks, True), {"by": ranks.rank}, ranks=ranks)
        return 0

    return function


@pytest.mark.parametrize(("writers", "readers"), [(1, 3), (3, 2), (2, 1), (3, 3)])
def test_what_some_ranks_save_others_load(tmp_path, writers, readers):
    assert on_ranks(writers, tmp_path / "w", save(tmp_path)) == [0] * writers
    path = store.latest(tmp_path)
    assert torch.equal(store.open_group(path, "model").read("w"), WHOLE) and store.load(path).state == {"by": 0}

    def read(ranks: Ranks) -> int:
        found = store.newest(tmp_path, print, ranks=ranks)
        into = groups(ranks, False)
        store.load_into(found.path, into, ranks)
        for name, whole in {"w": WHOLE, "bias": BIAS}.items():
            assert all(torch.equal(memory, box.of(whole)) for box, memory in into["model"][name].parts)
        return 0

    assert on_ranks(readers, tmp_path / "r", read) == [0] * readers


def test_every_byte_is_written_once_by_somebody(tmp_path):
    assert on_ranks(3, tmp_path / "w", save(tmp_path)) == [0] * 3
    files = list((store.latest(tmp_path) / "model").glob("*.safetensors"))
    assert {file.name[:10] for file in files} == {"part_00000", "part_00001", "part_00002"}
    data = sum(int.from_bytes(file.read_bytes()[:8], "little") + 8 for file in files)
    assert sum(file.stat().st_size for file in files) - data == WHOLE.nbytes + BIAS.nbytes


def test_all_ranks_agree_about_damage(tmp_path):
    for step in (1, 2):
        assert on_ranks(2, tmp_path / f"w{step}", save(tmp_path, step)) == [0, 0]
    file = sorted((store.latest(tmp_path) / "optimizer").glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-1] + b"?")

    def read(ranks: Ranks) -> int:
        told: list[str] = []
        found = store.newest(tmp_path, told.append, ranks=ranks)
        assert len(told) == 1 and file.name in told[0]
        return found.step

    def strict(ranks: Ranks) -> int:
        with pytest.raises(CheckpointError, match="fall_back"):
            store.newest(tmp_path, print, ranks=ranks, fall_back=False)
        return 0

    assert on_ranks(2, tmp_path / "s", strict) == [0, 0]
    assert on_ranks(2, tmp_path / "r", read) == [1, 1]
    assert store.latest(tmp_path).name == "step_00000001"
