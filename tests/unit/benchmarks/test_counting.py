"""What the benchmarks count with: collectives by axis, live bytes, and traces without memory."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from _activations import trace
from _collectives import Amount, Count, leaving
from _live_bytes import LiveBytes
from memory_scaling import SMALL, small_pack
from torch.testing._internal.distributed.fake_pg import FakeStore

from flagdit.config.schema import ParallelConfig, Recipe
from flagdit.model.attention_backends.flash import Varlen
from flagdit.model.sizes import resolve


@pytest.fixture
def four_ranks():
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    yield dist.new_group([0, 1])
    dist.destroy_process_group()


def test_every_collective_counts_once_under_its_axis_with_its_payload(four_ranks):
    pair, alone, x = four_ranks, dist.new_group([1]), torch.zeros(8)
    half = torch.zeros(4)
    with Count({pair.group_name: "tensor"}) as count:
        dist.all_reduce(x, group=pair)
        dist.all_gather_into_tensor(x, half, group=pair, async_op=True).wait()
        dist.all_gather([half, half.clone()], half, group=pair)
        dist.reduce_scatter_tensor(half, x, group=pair)
        dist.all_to_all_single(torch.empty_like(x), x, group=pair)
        dist.broadcast(x, 0, group=pair)
        sends = [dist.P2POp(dist.isend, half, group=pair, group_peer=0)]
        for work in dist.batch_isend_irecv([*sends, dist.P2POp(dist.irecv, x, group=pair, group_peer=0)]):
            work.wait()
        dist.all_reduce(x, group=alone)
        dist.all_reduce(x)
    assert dict(count.traffic) == {
        ("tensor", "all_reduce"): Amount(1, 32),
        ("tensor", "all_gather"): Amount(2, 32),
        ("tensor", "reduce_scatter"): Amount(1, 32),
        ("tensor", "all_to_all"): Amount(1, 32),
        ("tensor", "broadcast"): Amount(1, 32),
        ("tensor", "send"): Amount(1, 16),
        ("unknown group of 4", "all_reduce"): Amount(1, 32),
    }
    assert leaving("all_reduce", 4) == 1.5 and leaving("all_gather", 4) == 3 and leaving("send", 4) == 1


def test_live_bytes_follow_storages():
    weight = torch.zeros(4)
    with LiveBytes(workspace={"aten::exp": lambda x: 1000}) as live:
        a = torch.zeros(100)
        view, inside = a[:50], weight[1:]
        assert live.now == 400, "views and what was there before count nothing"
        b = torch.zeros(25)
        del b
        c = a + 1
        assert live.now == 800 and live.peak == 800
        del a, view, c
        assert live.now == 0
        torch.zeros(1).exp()
    assert live.peak == 1008 and inside is not None
    # At the peak the result of exp stands beside its input, and the kernel's own memory on top.
    assert [number for _, number, _ in live.largest(5)] == [1, 1]


@pytest.mark.parametrize("kind", ["none", "block"])
def test_activations_shrink_with_the_ranks(kind):
    def peak(**parallel):
        model = resolve(replace(SMALL, num_layers=1, checkpointing=kind))
        recipe = Recipe(model=model, parallel=ParallelConfig(**parallel))
        return trace(recipe, 0, Varlen(), small_pack(model))[0].peak

    whole = peak()
    for parallel in ({"tensor": 4}, {"tensor": 2, "context": 2}):
        ranks = parallel.get("tensor", 1) * parallel.get("context", 1)
        assert peak(**parallel) * ranks == pytest.approx(whole, rel=0.25), parallel
    assert peak(tensor=4, sequence=False) * 4 > 1.5 * whole, "without sequence parallelism the stream is whole"
