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


SHARDS = np.array([5, 1, 0, 8, 3, 3, 7])


@pytest.mark.parametrize("per_group", [1, 2, 3, 100])
def test_any_cut_of_the_stream_holds_every_sample_of_every_epoch_once(per_group: int):
    order = SetOrder(3, SHARDS, 100, per_group)
    assert len(order) == 27
    whole = order.take(0, 3 * 27)
    for epoch in range(3):
        assert sorted(whole.ids[whole.epochs == epoch]) == list(range(100, 127))
    cuts = np.sort(np.random.default_rng(0).choice(3 * 27, 20, replace=False))
    pieces = [order.take(a, b) for a, b in zip([0, *cuts], [*cuts, 3 * 27], strict=True)]
    assert np.concatenate([p.ids for p in pieces]).tolist() == whole.ids.tolist()
    assert np.concatenate([p.epochs for p in pieces]).tolist() == whole.epochs.tolist()


@pytest.mark.parametrize("per_group", [1, 2, 3, 100])
def test_the_samples_of_a_kind_are_a_stream_in_the_order_of_the_set(per_group: int):
    kinds = np.random.default_rng(0).choice(4, SHARDS.sum(), p=[0.5, 0.3, 0.15, 0.05])
    order, plain = SetOrder(3, SHARDS, 100, per_group, kinds), SetOrder(3, SHARDS, 100, per_group)
    assert order.counts.tolist() == np.bincount(kinds, minlength=4).tolist()
    asked = [(kind, place) for kind, n in enumerate(order.counts) for place in range(3 * n)]
    shuffled = np.array(asked)[permute(0, 0, len(asked), np.arange(len(asked)))]
    drawn = order.at(shuffled[:, 0], shuffled[:, 1])
    found = {tuple(a): (e, i) for a, e, i in zip(shuffled.tolist(), drawn.epochs, drawn.ids, strict=True)}
    whole = plain.take(0, 3 * 27)
    for kind in range(4):
        own = kinds[whole.ids - 100] == kind
        expected = list(zip(whole.epochs[own].tolist(), whole.ids[own].tolist(), strict=True))
        assert [found[a] for a in asked if a[0] == kind] == expected


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
