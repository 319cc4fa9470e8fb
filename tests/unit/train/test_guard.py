"""The guard's verdicts and its ledger."""

import json
import math

import pytest

from flagdit.batch import PackedBatch, Segment
from flagdit.config.schema import GuardConfig
from flagdit.train.guard import Guard, TrainingError, rows_of


def batch_of(*ids: int, epoch: int = 0) -> PackedBatch:
    segments = tuple(Segment(i, "image", (3, 1, 2, 2), f"shard/{i:03d}", epoch) for i in ids)
    return PackedBatch(segments, layout=None, patches={})  # type: ignore[arg-type]


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
def test_verdicts(tmp_path, loss, norm, limit, reason):
    assert Guard(GuardConfig(max_grad_norm=limit), tmp_path / "ledger.jsonl").verdict(loss, norm) == reason


def test_ledger_names_the_samples_and_suspects(tmp_path):
    guard = Guard(GuardConfig(), tmp_path / "ledger.jsonl")
    batches = [batch_of(4, 9, epoch=2), batch_of(7, epoch=2)]
    guard.reject(12, "loss is nan", math.nan, math.inf, rows_of(batches, [[0.5, math.nan], [1.0]]))
    (entry,) = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert entry["step"] == 12 and entry["loss"] == "nan" and entry["suspects"] == [9]
    assert entry["samples"] == [
        {"id": 4, "key": "shard/004", "epoch": 2, "loss": 0.5},
        {"id": 9, "key": "shard/009", "epoch": 2, "loss": "nan"},
        {"id": 7, "key": "shard/007", "epoch": 2, "loss": 1.0},
    ]


def test_only_bad_steps_in_a_row_stop_the_run(tmp_path):
    guard = Guard(GuardConfig(max_consecutive=2), tmp_path / "ledger.jsonl")
    bad = ("loss is nan", math.nan, 1.0, rows_of([batch_of(1)], [[math.nan]]))
    guard.reject(1, *bad)
    guard.accept()
    guard.reject(3, *bad)
    with pytest.raises(TrainingError, match=r"2 bad steps in a row up to step 4.*loss is nan") as error:
        guard.reject(4, *bad)
    assert "ledger.jsonl" in str(error.value) and guard.bad_steps == 3
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 3


def test_counts_survive_a_checkpoint(tmp_path):
    guard, other = (Guard(GuardConfig(), tmp_path / "ledger.jsonl") for _ in range(2))
    guard.bad_steps, guard.consecutive = 5, 2
    other.load(json.loads(json.dumps(guard.state())))
    assert (other.bad_steps, other.consecutive) == (5, 2)
