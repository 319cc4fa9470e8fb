"""Samples of many lengths into packs of one token budget, and packs to ranks, by their lengths alone.

Two things are wanted of the packs of a window of samples: that they are full, since what is missing to the budget is
memory and time that ranks wait for, and that they cost alike, since attention costs Σ n² and the slowest rank sets the
pace. Long samples are dealt out first, each to the cheapest pack with room; the short ones then fill what is left,
largest first. Where that does not go into the given number of packs, plain first-fit decreasing does.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

WAYS = EVEN, LESS_EVEN, FULL = 16, 4, 0
"""How to pack: the more samples are dealt out by cost, the more alike packs are, and the harder to fill."""


def pack_window(lengths: np.ndarray, packs: int, budget: int, ways: Sequence[int] = WAYS) -> list[list[int]] | None:
    """Shares samples out over packs.

    Args:
        lengths: (n,) tokens of each sample, none above the budget.
        packs: how many to make.
        budget: tokens that a pack may have.
        ways: to try, one after another: samples below 1/way of the budget fill gaps, the others are dealt out.

    Returns:
        For each pack the places of its samples in `lengths`, every place once; None where no way was found.
    """
    order = np.argsort(-lengths, kind="stable")
    for short in (budget // way if way else budget + 1 for way in ways):
        long = int(np.searchsorted(-lengths[order], -short, side="right"))
        dealt = _deal_long(lengths, order[:long], packs, budget)
        if dealt is None:
            continue
        made, room = dealt
        if not _fill(lengths, order[long:], made, room):
            return made
    return None


def _deal_long(
    lengths: np.ndarray, order: np.ndarray, packs: int, budget: int
) -> tuple[list[list[int]], list[int]] | None:
    """Each sample, longest first, to the pack of least Σ n² that has room; None where one finds no room."""
    made: list[list[int]] = [[] for _ in range(packs)]
    room = [budget] * packs
    costs = [(0, i) for i in range(packs)]
    for sample, n in zip(order.tolist(), lengths[order].tolist(), strict=True):
        refused = []
        while costs and room[costs[0][1]] < n:
            refused.append(heapq.heappop(costs))
        if not costs:
            return None
        cost, i = costs[0]
        made[i].append(sample)
        room[i] -= n
        heapq.heapreplace(costs, (cost + n * n, i))
        # A pack that has no room for this length may have some for a shorter one.
        for item in refused:
            heapq.heappush(costs, item)
    return made, room


def _fill(lengths: np.ndarray, order: np.ndarray, made: list[list[int]], room: list[int]) -> list[int]:
    """Fills pack after pack with the longest samples that still fit (first-fit decreasing); returns who is left."""
    starts = np.flatnonzero(np.diff(lengths[order], prepend=-1))
    waiting = {int(lengths[same[0]]): same.tolist() for same in np.split(order, starts[1:]) if len(same)}
    sizes = sorted(waiting)
    # Packs with little room come first: they have the fewest ways to be filled.
    for i in sorted(range(len(made)), key=room.__getitem__):
        at = len(sizes)
        while (at := bisect_right(sizes, room[i], hi=at)) and sizes:
            n = sizes[at - 1]
            take = min(room[i] // n, len(waiting[n]))
            made[i] += waiting[n][-take:]
            del waiting[n][-take:]
            room[i] -= take * n
            if waiting[n]:
                at -= 1
            else:
                del sizes[at - 1]
                at -= 1
    return [sample for n in reversed(sizes) for sample in waiting[n]]


def deal(costs: Sequence[float], micro_batches: int, ranks: int) -> list[list[list[int]]]:
    """Shares items out over micro-batches and ranks, as many to each, so that the ranks of a micro-batch cost alike.

    Args:
        costs: of the items; their number is a multiple of micro_batches · ranks.

    Returns:
        [micro-batch][rank] → places of its items in `costs`, ascending; every place once.
    """
    each = len(costs) // (micro_batches * ranks)
    assert each * micro_batches * ranks == len(costs)
    order = np.argsort(-np.asarray(costs), kind="stable").tolist()
    dealt = []
    for m in range(micro_batches):
        # A stripe of every micro_batches-th group of `ranks` items: each micro-batch sees long and short ones.
        rows = [order[(r * micro_batches + m) * ranks : (r * micro_batches + m + 1) * ranks] for r in range(each)]
        shares: list[list[int]] = [[] for _ in range(ranks)]
        sums = [0.0] * ranks
        for row in rows:  # the costliest of a row goes to the rank that has least so far
            for item, rank in zip(row, sorted(range(ranks), key=sums.__getitem__), strict=True):
                shares[rank].append(item)
                sums[rank] += costs[item]
        dealt.append([sorted(share) for share in shares])
    return dealt
