"""The order of the run: exact permutations, no state, fair, and every batch whole."""

import time

import numpy as np
import pytest

from flagdit.data_pipelines.order import batches_per_epoch, global_batch, permute
from flagdit.errors import RecipeError


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 17, 255, 256, 257, 1000, 5000])
def test_each_epoch_is_a_permutation(n: int):
    seen = [tuple(permute(seed, epoch, n, np.arange(n))) for seed in (0, 1) for epoch in (0, 1, 2)]
    for order in seen:
        assert sorted(order) == list(range(n))
    assert n < 7 or len(set(seen)) == 6, "another epoch or seed is another order"


@pytest.mark.parametrize(("n", "batch"), [(10, 3), (12, 4), (5, 5), (100, 7)])
def test_batches_of_an_epoch_never_repeat_a_sample(n: int, batch: int):
    per_epoch = batches_per_epoch(n, batch)
    assert per_epoch == n // batch
    for epoch in range(4):
        ids = []
        for k in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            got_epoch, positions = global_batch(5, n, batch, k)
            assert got_epoch == epoch and positions.dtype == np.int64 and len(positions) == batch
            ids += positions.tolist()
        assert len(set(ids)) == len(ids) == per_epoch * batch and set(ids) <= set(range(n))


def test_who_sits_out_changes_with_the_epoch():
    n, batch = 10, 4
    absent = set()
    for epoch in range(60):
        present = [global_batch(0, n, batch, 2 * epoch + i)[1].tolist() for i in range(2)]
        absent |= set(range(n)) - {i for ids in present for i in ids}
    assert absent == set(range(n))


def test_positions_are_fair():
    n, epochs = 16, 2000
    orders = np.stack([permute(0, epoch, n, np.arange(n)) for epoch in range(epochs)])
    counts = np.stack([np.bincount(orders[:, place], minlength=n) for place in range(n)])
    chi2 = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
    assert 150 < chi2 < 320, "χ² of 225 degrees of freedom: mean 225, deviation 21"
    neighbours = np.diff(orders, axis=1)
    assert abs((neighbours == 1).mean() - 1 / n) < 0.01


def test_these_very_numbers_for_ever():
    assert global_batch(7, 1000, 6, 200)[1].tolist() == [652, 471, 679, 119, 882, 789]


def test_batch_at_ten_million_costs_nothing():
    start = time.perf_counter()
    epoch, ids = global_batch(0, 10_000_000, 256, 39_062 * 3 + 20_000)
    assert time.perf_counter() - start < 0.5
    assert epoch == 3 and len(set(ids.tolist())) == 256 and ids.max() < 10_000_000


def test_batch_larger_than_the_split():
    with pytest.raises(RecipeError, match=r"data\.batch_size=64 is larger than the split, which has 20.*Try 20"):
        global_batch(0, 20, 64, 0)
