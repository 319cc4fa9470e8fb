"""Packing: every sample in one pack, packs full and alike in cost; dealing packs to ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flagdit.data_pipelines.packing import deal, pack_window


@given(st.lists(st.integers(1, 100), min_size=1, max_size=200), st.integers(1, 30), st.integers(100, 300))
@settings(max_examples=150, deadline=None)
def test_every_sample_is_in_one_pack_and_no_pack_goes_over_its_budget(lengths: list[int], packs: int, budget: int):
    made = pack_window(np.array(lengths), packs, budget)
    if made is None:
        assert sum(lengths) > 0.6 * packs * budget, "first-fit decreasing fills more than that"
    else:
        assert len(made) == packs and sorted(i for p in made for i in p) == list(range(len(lengths)))
        assert max(sum(lengths[i] for i in p) for p in made) <= budget


@given(st.lists(st.integers(1, 60), min_size=1, max_size=150), st.integers(60, 200))
@settings(max_examples=100, deadline=None)
def test_what_first_fit_decreasing_can_pack_is_packed(lengths: list[int], budget: int):
    rooms: list[int] = []
    for n in sorted(lengths, reverse=True):
        place = next((i for i, room in enumerate(rooms) if room >= n), None)
        if place is None:
            rooms.append(budget - n)
        else:
            rooms[place] -= n
    assert pack_window(np.array(lengths), len(rooms), budget)


def test_packs_cost_alike():
    rng = np.random.default_rng(0)
    lengths = rng.choice([64, 256, 1024, 4096], 4000, p=[0.4, 0.3, 0.2, 0.1])
    packs = int(lengths.sum() / (16384 * 0.99)) + 1
    made = pack_window(lengths, packs, 16384)
    assert made is not None
    costs = np.array([(lengths[p] ** 2).sum() for p in made])
    assert costs.max() < 1.25 * costs.mean()
    by_decreasing = np.sort(lengths)[::-1]
    assert (by_decreasing[:4] ** 2).sum() > 1.5 * costs.mean(), "first-fit decreasing would begin with this pack"


@pytest.mark.parametrize(("items", "micro", "ranks"), [(24, 1, 8), (24, 3, 4), (64, 2, 8), (8, 8, 1), (1, 1, 1)])
def test_dealing_is_even_and_balanced(items: int, micro: int, ranks: int):
    costs = (np.random.default_rng(0).pareto(2, items) + 1).tolist()
    dealt = deal(costs, micro, ranks)
    flat = [i for shares in dealt for share in shares for i in share]
    assert sorted(flat) == list(range(items))
    assert {len(share) for shares in dealt for share in shares} == {items // (micro * ranks)}
    assert all(share == sorted(share) for shares in dealt for share in shares)


def test_ranks_of_a_micro_batch_cost_alike():
    rng = np.random.default_rng(0)
    worst, naive = [], []
    for _ in range(20):
        costs = rng.uniform(1, 4, 64)
        for shares in deal(costs.tolist(), 2, 8):
            sums = np.array([costs[s].sum() for s in shares])
            worst.append(sums.max() / sums.mean())
        sums = costs.reshape(2, 8, 4).sum(2)
        naive.append((sums.max(1) / sums.mean(1)).mean())
    assert np.mean(worst) < 1.05 < np.mean(naive)
