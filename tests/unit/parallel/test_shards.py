"""Flat slices as rectangles of the whole tensor."""

import itertools

import pytest
import torch

from flagdit.parallel.shards import Shard, boxes_of_slice


@pytest.mark.parametrize("shape", [(), (7,), (1,), (4, 3), (1, 5), (5, 1), (3, 2, 4), (2, 1, 3, 2)])
def test_every_slice_is_few_boxes_in_order(shape):
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for start, stop in itertools.combinations(range(whole.numel() + 1), 2):
        boxes = list(boxes_of_slice(shape, start, stop))
        assert len(boxes) <= max(2 * len(shape) - 1, 1)
        assert torch.cat([box.of(whole).flatten() for box in boxes]).tolist() == list(range(start, stop))
    assert list(boxes_of_slice(shape, 2, 2)) == []


@pytest.mark.parametrize("dim", [None, 0, 1])
def test_slices_of_all_ranks_make_up_the_whole(dim):
    """Two tensor ranks, three ranks that share a flat buffer: every element is held once, where it belongs."""
    whole = torch.arange(6 * 8.0).view(6, 8)
    seen = torch.zeros(6, 8)
    for rank, part in enumerate(whole.chunk(2, dim) if dim is not None else [whole]):
        origin = [rank * part.shape[d] if d == dim else 0 for d in range(2)]
        flat = part.flatten()
        for start, stop in ((0, 5), (5, 19), (19, flat.numel())):
            shard = Shard.slice((6, 8), flat[start:stop].clone(), start, part.shape, origin)
            assert shard.shape == (6, 8) and shard.nbytes == 4 * (stop - start)
            for box, memory in shard.parts:
                assert torch.equal(memory, box.of(whole))
                box.of(seen).add_(1)
    assert torch.equal(seen, torch.ones(6, 8))


def test_filling_writes_the_memory_that_was_given():
    flat = torch.zeros(7)
    Shard.slice((4, 3), flat, 2, (4, 3), (0, 0)).fill(torch.arange(12.0).view(4, 3))
    assert flat.tolist() == [2, 3, 4, 5, 6, 7, 8]
    scalar = torch.zeros(())
    Shard.whole(scalar).fill(torch.tensor(4.0))
    assert scalar == 4
