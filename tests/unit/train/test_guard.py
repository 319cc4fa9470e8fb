"""The guard's verdicts, decisions and ledger."""

import json
import math
import random

import pytest

from flagdit.batch import PackedBatch, Segment
from flagdit.config.schema import GuardConfig
from flagdit.train.guard import Attempt, Guard, TrainingError, robust_score, rows_of, suspects

NAN = Attempt(math.nan, math.inf, "loss is nan")


def batch_of(*ids: int, epoch: int = 0) -> PackedBatch:
    segments = tuple(Segment(i, "image", (3, 1, 2, 2), f"shard/{i:03d}", epoch) for i in ids)
    return PackedBatch(segments, layout=None, patches={})  # type: ignore[arg-type]


@pytest.fixture
def ledger(tmp_path):
    class Ledger:
        file = tmp_path / "ledger.jsonl"

        def lines(self) -> list[dict]:
            return [json.loads(line) for line in self.file.read_text().splitlines()]

    return Ledger()


@pytest.mark.parametrize(
    ("loss", "norm", "limit", "reason"),
    [
        (1.0, 5.0, 0.0, None),
        (1.0, 5.0, 5.0, None),
        (math.nan, 5.0, 0.0, "loss is nan"),
        (1.0, math.inf, 0.0, "gradient norm is inf"),
        (1.0, 5.1, 5.0, "gradient norm 5.1 is above guard.max_grad_norm=5"),
    ],
)
def test_verdicts(ledger, loss, norm, limit, reason):
    assert Guard(GuardConfig(max_grad_norm=limit), ledger.file).verdict(loss, norm) == reason


def test_a_spike_stands_out_from_the_last_good_losses(ledger):
    rng = random.Random(0)
    guard = Guard(GuardConfig(spike=6.0, window=32), ledger.file)
    for i in range(200):
        loss = 2.0 * 0.99**i + rng.gauss(0, 0.02)  # falls, with noise: nothing of it is a spike
        assert guard.verdict(loss, 1.0) is None, i
        guard.accept(loss)
    assert len(guard.recent) == 32
    assert "deviations above the median" in guard.verdict(1.5, 1.0) and "guard.spike=6" in guard.verdict(1.5, 1.0)
    assert guard.verdict(0.0, 1.0) is None  # low losses are welcome
    off = Guard(GuardConfig(spike=0.0), ledger.file, recent=guard.recent)
    assert off.verdict(1.5, 1.0) is None


def test_no_score_before_half_of_the_window_is_there(ledger):
    guard = Guard(GuardConfig(window=8), ledger.file)
    for loss in (1.0, 1.1, 0.9):
        guard.accept(loss)
    assert guard.verdict(1e6, 1.0) is None
    guard.accept(1.0)
    assert guard.verdict(1e6, 1.0) is not None


def test_the_score_is_robust_and_does_not_explode_where_losses_are_equal():
    calm = [1.0, 1.1, 0.9, 1.05, 0.95]
    assert robust_score(1.5, calm)[1] == pytest.approx(robust_score(1.5, [*calm, 1e9])[1], rel=0.6)
    assert robust_score(1.02, [1.0] * 10) == (1.0, pytest.approx(2.0))


def test_ledger_names_samples_suspects_ranks_cause_and_decision(ledger):
    guard = Guard(GuardConfig(), ledger.file)
    rows = rows_of([batch_of(4, 9, epoch=2), batch_of(7, epoch=2)], [[0.5, math.nan], [1.0]])
    first = Attempt(math.nan, math.inf, "loss is nan", rows, [3])
    guard.reject(12, first, Attempt(math.nan, 2.0, "loss is nan", rows, [3]))
    guard.forgive(13, first, Attempt(0.5, 1.0))
    guard.reject(14, first, None)
    bad, accident, unknown = ledger.lines()
    assert bad["step"] == 12 and bad["loss"] == "nan" and bad["suspects"] == [9] and bad["ranks"] == [3]
    assert bad["again"] == {"loss": "nan", "grad_norm": 2.0}
    assert bad["samples"] == [
        {"id": 4, "key": "shard/004", "epoch": 2, "loss": 0.5},
        {"id": 9, "key": "shard/009", "epoch": 2, "loss": "nan"},
        {"id": 7, "key": "shard/007", "epoch": 2, "loss": 1.0},
    ]
    told = [(line["cause"], line["decision"]) for line in (bad, accident, unknown)]
    assert told == [
        ("data or weights", "skipped"),
        ("machine", "applied at the second try"),
        ("unknown", "skipped"),
    ]
    assert (guard.bad_steps, guard.accidents) == (2, 1)


def test_of_finite_losses_those_that_stand_out_are_suspects():
    rows = rows_of([batch_of(1, 2, 3, 4)], [[1.0, 0.5, 40.0, 2.0]])
    assert suspects(rows) == [3] and suspects([]) == []


def test_only_bad_steps_in_a_row_stop_the_run(ledger):
    guard = Guard(GuardConfig(max_consecutive=2), ledger.file)
    guard.reject(1, NAN, NAN)
    guard.accept(1.0)
    guard.reject(3, NAN, NAN)
    with pytest.raises(TrainingError, match=r"2 bad steps in a row up to step 4.*loss is nan") as error:
        guard.reject(4, NAN, NAN)
    assert "ledger.jsonl" in str(error.value) and guard.bad_steps == 3
    assert [line["decision"] for line in ledger.lines()] == ["skipped", "skipped", "stopped"]


def test_the_policy_to_stop_stops_at_the_first(ledger):
    guard = Guard(GuardConfig(policy="stop"), ledger.file)
    with pytest.raises(TrainingError, match=r"step 7 is bad: loss is nan.*guard\.policy"):
        guard.reject(7, NAN, NAN)
    assert ledger.lines()[0]["decision"] == "stopped"


def test_returns_are_counted_by_checkpoint_and_come_to_an_end(ledger):
    guard = Guard(GuardConfig(policy="rollback", max_consecutive=2), ledger.file)
    guard.reject(9, NAN, NAN)
    guard.returned(9, 6, {7: [1, 2], 8: [3, 4], 9: [5, 6]}, [0.5, 0.6])
    assert guard.bad_steps == 3 and list(guard.recent) == [0.5, 0.6]
    guard.accept(1.0)
    guard.returned(14, 12, {13: [7], 14: [8]}, [0.5])
    with pytest.raises(TrainingError, match="2 returns to the checkpoint of step 12, the last one from step 16"):
        guard.returned(16, 12, {13: [7], 14: [8], 15: [9], 16: [10]}, [0.5])
    first = ledger.lines()[1]
    assert first["kind"] == "return" and first["batches"] == {"7": [1, 2], "8": [3, 4], "9": [5, 6]}


def test_counts_survive_a_checkpoint(ledger):
    guard, other = (Guard(GuardConfig(), ledger.file) for _ in range(2))
    guard.bad_steps, guard.consecutive, guard.accidents = 5, 2, 1
    guard.recent.extend([0.1, 0.2])
    other.load(json.loads(json.dumps(guard.state())))
    assert (other.bad_steps, other.consecutive, other.accidents, other.recent) == (5, 2, 1, guard.recent)
    other.accept(0.3)
    assert list(guard.recent) == [0.1, 0.2]
