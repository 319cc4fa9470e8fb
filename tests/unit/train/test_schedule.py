"""Learning-rate schedules."""

import itertools

import pytest

from flagdit.config.schema import OptimizerConfig
from flagdit.train.schedule import learning_rate


def rates(steps: int, **keys) -> list[float]:
    cfg = OptimizerConfig(lr=2.0, **keys)
    return [learning_rate(step, cfg, steps) for step in range(steps)]


def test_warmup_rises_linearly_to_the_peak_and_stays():
    assert rates(6, warmup_steps=4) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_no_warmup_starts_at_the_peak():
    assert rates(2, warmup_steps=0) == [2.0, 2.0]


def test_cosine_starts_at_the_peak_and_ends_one_step_after_the_last():
    got = rates(10, warmup_steps=2, schedule="cosine", final_lr=0.1)
    assert got[2] == 2.0 and got[6] == pytest.approx(1.1)  # half way: the mean of 2 and 0.2
    assert all(a > b for a, b in itertools.pairwise(got[2:])) and got[-1] > 0.2
    cfg = OptimizerConfig(lr=2.0, warmup_steps=2, schedule="cosine", final_lr=0.1)
    assert learning_rate(10, cfg, 10) == pytest.approx(0.2)
    assert learning_rate(99, cfg, 10) == pytest.approx(0.2)


def test_wsd_is_constant_and_then_falls_linearly():
    got = rates(10, warmup_steps=0, schedule="wsd", decay_steps=4, final_lr=0.0)
    assert got == pytest.approx([2.0] * 7 + [1.5, 1.0, 0.5])


def test_wsd_without_decay_steps_is_constant():
    assert rates(3, warmup_steps=0, schedule="wsd", decay_steps=0) == [2.0] * 3


def test_a_run_shorter_than_its_warmup_divides_by_nothing():
    assert rates(2, warmup_steps=5, schedule="cosine") == pytest.approx([0.4, 0.8])
