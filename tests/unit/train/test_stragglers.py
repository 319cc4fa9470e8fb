"""Slow ranks are told of, by what they are slow in."""

from types import SimpleNamespace

import torch

from flagdit.train.stragglers import EVERY_LINES, Pace, Stragglers, slow


def test_a_rank_far_from_the_median_is_told_of():
    paces = [Pace(rank, f"node{rank}", 0.1, 0.01) for rank in range(4)]
    assert slow(paces) == []
    assert slow([*paces, Pace(4, "node4", 0.18, 0.01)]) == [
        "rank 4 on node4 computes 1.8 times as long as the median rank"
    ]
    assert slow([*paces, Pace(4, "node4", 0.1, 0.05)])[0].startswith("rank 4 on node4 waits for data 5.0 times")
    idle = [Pace(rank, "n", 0.1, 0.0) for rank in range(3)]
    assert "0.5 s a step" in slow([*idle, Pace(3, "n", 0.1, 0.5)])[0]
    assert slow([*paces, Pace(4, "node4", 0.1, 0.0111)]) == [], "differences of microseconds are noise"


def test_all_ranks_exchange_their_pace_every_so_often():
    exchanged, notes = [], []

    def from_all(pace):
        exchanged.append(pace)
        return [Pace(0, "a", 1e-9, 0.0), Pace(1, "b", 1e-9, 0.0), Pace(2, "c", pace.probe + 1, pace.data)]

    run = SimpleNamespace(
        engine=SimpleNamespace(device=torch.device("cpu"), mesh=SimpleNamespace(world=3, rank=2, from_all=from_all)),
        recipe=SimpleNamespace(train=SimpleNamespace(log_every=2)),
        display=SimpleNamespace(note=notes.append),
    )
    hook = Stragglers(run)
    for step in range(1, 2 * EVERY_LINES + 1):
        hook.waited(0.25)
        hook.after_step(run, SimpleNamespace(step=step))
    assert len(exchanged) == 1 and exchanged[0].data == 0.25 and exchanged[0].probe > 0
    assert notes[0].startswith(f"step {2 * EVERY_LINES}  rank 2 on c computes")
