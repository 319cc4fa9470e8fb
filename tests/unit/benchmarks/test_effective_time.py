"""The simulation of failures: its seconds add up, and what should cost time does."""

import effective_time
import pytest
from effective_time import COPY, DAY, DAYS, GPUS, STATE, Costs, simulate

COSTS = Costs(beside=0.05, synchronous=0.3, restart=12.0)
KINDS = ("trained", "pauses", "lost", "noticing", "restarting")


def trained(gpus=GPUS, costs=COSTS, *, beside=True) -> float:
    return sum(simulate(gpus, costs, seed, beside=beside).share("trained") for seed in range(10)) / 10


def test_every_second_is_spent_on_something():
    run = simulate(GPUS, COSTS, 0, beside=True)
    assert sum(run.share(kind) for kind in KINDS) == pytest.approx(1)
    assert run.wall == pytest.approx(DAYS * DAY, rel=0.02)
    assert run.failures == pytest.approx(419, rel=0.15) and min(getattr(run, kind) for kind in KINDS) > 0


def test_failures_restarts_and_waiting_for_the_disk_cost_time():
    assert simulate(GPUS, COSTS, 0, beside=True, interval=600).interval == 600
    assert trained(64) > trained(2048) > trained() > trained(beside=False)
    assert trained() > trained(costs=Costs(0.05, 0.3, 300.0)) > trained(costs=Costs(5.0, 0.3, 300.0))


def test_without_failures_only_checkpoints_cost_time(monkeypatch):
    monkeypatch.setattr(effective_time.random.Random, "expovariate", lambda self, rate: DAYS * DAY / 2)
    monkeypatch.setattr(effective_time, "PLANNED", 1e-9)
    run = simulate(GPUS, COSTS, 0, beside=True)
    pause = COSTS.beside + STATE / GPUS / COPY
    share = pause / (run.interval + pause)
    assert run.failures == 2 and run.pauses / (run.pauses + run.trained) == pytest.approx(share, rel=1e-3)


def test_a_checkpoint_that_is_still_being_written_saves_nothing(monkeypatch):
    lost = simulate(GPUS, COSTS, 0, beside=True).lost
    monkeypatch.setattr(effective_time, "BUSY", 1e9)  # so that the interval stays while writing takes longer
    monkeypatch.setattr(effective_time, "STORAGE_PER_GPU", 5e9 / GPUS)
    assert simulate(GPUS, COSTS, 0, beside=True).lost > 1.5 * lost
