"""The order of the run: exact permutations, no state, every sample of every epoch once, wherever the stream is cut."""

import time

import numpy as np
import pytest

from flagdit.data_pipelines.order import SetOrder, mixed_seed, permute


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 17, 255, 256, 257, 1000, 5000])
def test_each_epoch_is_a_permutation(n: int):
    seen = [tuple(permute(seed, epoch, n, np.arange(n))) for seed in (0, 1) for epoch in (0, 1, 2)]
    for order in seen:
        assert sorted(order) == list(range(n))
    assert n < 7 or len(set(seen)) == 6, "another epoch or seed is another order"


@pytest.mark.parametrize("per_group", [1, 2, 3, 100])
@pytest.mark.parametrize("with_lengths", [False, True])
def test_any_cut_of_the_stream_holds_every_sample_of_every_epoch_once(per_group: int, with_lengths: bool):
    rng = np.random.default_rng(0)
    shards = np.array([5, 1, 0, 8, 3, 3, 7])
    lengths = rng.integers(1, 9, shards.sum()) if with_lengths else None
    order = SetOrder(3, shards, 100, per_group, lengths)
    assert order.units == (lengths.sum() if with_lengths else 27)
    whole = order.take(0, 3 * order.units)
    for epoch in range(3):
        assert sorted(whole.ids[whole.epochs == epoch]) == list(range(100, 127))
    cuts = np.sort(rng.choice(3 * order.units, 20, replace=False))
    pieces = [order.take(a, b) for a, b in zip([0, *cuts], [*cuts, 3 * order.units], strict=True)]
    assert np.concatenate([p.ids for p in pieces]).tolist() == whole.ids.tolist()
    assert np.concatenate([p.epochs for p in pieces]).tolist() == whole.epochs.tolist()


def test_a_stretch_of_tokens_is_as_long_as_asked_but_for_one_sample():
    lengths = np.random.default_rng(1).integers(1, 50, 1000)
    order = SetOrder(0, np.array([250] * 4), 0, 2, lengths)
    for start in range(0, 60_000, 977):
        drawn = order.take(start, start + 977)
        assert abs(int(lengths[drawn.ids].sum()) - 977) < 50


def test_reads_stay_within_a_group_of_shards():
    order = SetOrder(0, np.array([10] * 12), 0, 3)
    ids = order.take(0, 120).ids
    groups = [set((ids[i : i + 30] // 10).tolist()) for i in range(0, 120, 30)]
    assert all(len(g) == 3 for g in groups) and len(set.union(*groups)) == 12
    later = order.take(120, 240).ids
    assert {frozenset(g) for g in groups} != {frozenset((later[i : i + 30] // 10).tolist()) for i in range(0, 120, 30)}
    assert not (np.diff(ids) == 1).mean() > 0.2, "within a group the samples are shuffled"


def test_positions_are_fair():
    n, epochs = 16, 2000
    orders = np.stack([permute(0, epoch, n, np.arange(n)) for epoch in range(epochs)])
    counts = np.stack([np.bincount(orders[:, place], minlength=n) for place in range(n)])
    chi2 = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
    assert 150 < chi2 < 320, "χ² of 225 degrees of freedom: mean 225, deviation 21"
    neighbours = np.diff(orders, axis=1)
    assert abs((neighbours == 1).mean() - 1 / n) < 0.01


def test_these_very_numbers_for_ever():
    assert SetOrder(7, np.array([300, 300, 400]), 0, 2).take(1200, 1206).ids.tolist() == [997, 666, 949, 889, 720, 834]
    assert mixed_seed(5, 0) == 5 and mixed_seed(5, 1) == 8581286081765471666


def test_any_place_costs_the_same():
    order = SetOrder(0, np.full(10_000, 1000), 0, 64)
    order.take(0, 1)
    start = time.perf_counter()
    drawn = order.take(3 * 10**7 + 5_120_000, 3 * 10**7 + 5_120_256)
    assert time.perf_counter() - start < 0.5
    assert set(drawn.epochs) == {3} and len(set(drawn.ids.tolist())) == 256 and drawn.ids.max() < 10**7
