"""Windows: every one fits into the packs of the slots, every kind at its own rate, any window found at once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flagdit.data_pipelines.windows import Windows, kinds_of

MIXES = {
    "one length": ([64], [1.0]),
    "two lengths that pair": ([60, 40], [0.5, 0.5]),
    "more than half of the budget": ([90, 51, 20], [0.2, 0.6, 0.2]),
    "many": (list(range(100, 9, -1)), [1 / 91] * 91),
    "a rare long one": ([100, 7], [1e-7, 1 - 1e-7]),
}


@pytest.mark.parametrize("packs", [1, 7, 256])
@pytest.mark.parametrize("mix", MIXES)
def test_no_window_goes_over_the_budget(mix: str, packs: int):
    lengths, shares = map(np.array, MIXES[mix])
    made = Windows(lengths, shares, packs, 100)
    counts = np.zeros(len(lengths), np.int64)
    for w in range(300):
        kinds = made.kinds(w)
        assert (made.before(w) == counts).all()
        counts += np.bincount(kinds, minlength=len(lengths))
        assert (lengths[kinds] <= made.slots).all()
        assert np.bincount(made.pack_of_slot, lengths[kinds], packs).max() <= 100
    drawn = counts.sum()
    assert np.abs(counts - drawn * shares).max() <= 4, "every kind at its own rate, at any time"


@given(
    st.dictionaries(st.integers(1, 200), st.floats(1e-6, 1), min_size=1, max_size=30),
    st.integers(1, 40),
    st.integers(200, 300),
    st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_any_window_of_any_mix(mix: dict[int, float], packs: int, budget: int, w: int):
    lengths = np.array(sorted(mix, reverse=True))
    shares = np.array([mix[n] for n in lengths.tolist()])
    made = Windows(lengths, shares / shares.sum(), packs, budget)
    kinds = made.kinds(w)
    assert (np.bincount(kinds, minlength=len(lengths)) == made.before(w + 1) - made.before(w)).all()
    assert np.bincount(made.pack_of_slot, lengths[kinds], packs).max() <= budget
    assert len(kinds) >= packs, "a pack holds at least one sample on average"


def test_lengths_that_divide_the_budget_fill_it():
    made = Windows(np.array([64, 32, 16]), np.array([0.2, 0.3, 0.5]), 256, 128)
    assert made.fill > 0.998


def test_packs_cost_alike_where_that_leaves_little_unfilled():
    lengths = np.array([4096, 1024, 256, 64])
    made = Windows(lengths, np.array([0.1, 0.2, 0.3, 0.4]), 256, 16384)
    costs = np.bincount(made.pack_of_slot, made.slots.astype(float) ** 2)
    assert made.fill > 0.99 and costs.max() < 1.2 * costs.mean()


def test_samples_of_few_lengths_are_kinds_of_one_length():
    tokens = np.array([5, 9, 5, 7, 9, 5])
    kinds, lengths = kinds_of(tokens)
    assert lengths.tolist() == [9, 7, 5] and lengths[kinds].tolist() == tokens.tolist()


def test_rare_lengths_join_the_next_longer_one():
    rng = np.random.default_rng(0)
    tokens = np.concatenate([np.full(50_000, 256), np.full(50_000, 64), rng.integers(1, 5000, 20_000)])
    kinds, lengths = kinds_of(tokens)
    assert len(lengths) < 1000 and (np.diff(lengths) < 0).all()
    assert (lengths[kinds] >= tokens).all()
    assert {256, 64} <= set(lengths.tolist()), "frequent lengths lose nothing"
    assert (lengths[kinds] - tokens).sum() < 0.002 * tokens.sum()
    exact = tokens == 256
    assert (lengths[kinds][exact] == 256).all()
