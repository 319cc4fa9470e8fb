"""Twenty requeues of one run: one wandb run, every step once, the numbers of a run that nothing interrupted."""

import json
import os
import signal
import struct
from pathlib import Path

import pytest

from flagdit.train import hooks
from flagdit.train.folder import read_lines
from flagdit.train.loop import train
from flagdit.train.wandb_log import merge_offline

REQUEUES = 20
BLOCK = 32768


@pytest.mark.slow
def test_twenty_requeues_are_one_run(tiny, tmp_path, monkeypatch):
    steps = 2 * REQUEUES + 2
    common = {"train__steps": steps, "checkpoint__every": 1000, "checkpoint__keep": 2}
    reference = read_lines(train(tiny(name="whole", **common)) / "metrics.jsonl")

    class Interrupts(hooks.LogMetrics):
        """Sends what a cluster sends before a job's time is up, after every second step."""

        def after_step(self, run, result):
            super().after_step(run, result)
            if result.step % 2 == 0 and result.step < steps:
                os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr("flagdit.train.loop.LogMetrics", Interrupts)
    recipe = tiny(name="requeued", log__wandb_project="test", **common)
    run = tmp_path / "runs" / "requeued"
    for _ in range(REQUEUES):
        with pytest.raises(SystemExit) as left:
            train(recipe)
        assert left.value.code == 128 + signal.SIGUSR1
    train(recipe)

    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert [line["loss"] for line in lines] == [line["loss"] for line in reference]
    starts = read_lines(run / "environment.jsonl")
    assert [start["step"] for start in starts] == list(range(0, steps, 2))
    # Every start has left an offline folder of its own; they carry one id.
    parts = sorted((run / "wandb").glob("offline-run-*"))
    run_id = (run / "wandb" / "run_id").read_text()
    assert len(parts) >= REQUEUES and all(run_id in part.name.split("-") for part in parts)
    assert all(len(history(part)) <= 2 for part in parts)

    merged = merge_offline(run)
    assert sorted((run / "wandb").glob("offline-run-*")) == [merged]
    assert sorted(p.name for p in (run / "wandb" / "parts").iterdir()) == [part.name for part in parts]
    expected = [(line["step"], line["loss"]) for line in reference]
    assert [(row["step"], row["loss"]) for row in history(merged)] == expected
    again = merge_offline(run)  # from the same metrics, so it is the same
    assert run_id in again.name and [(row["step"], row["loss"]) for row in history(again)] == expected


def history(folder: Path) -> list[dict]:
    """What an offline folder would upload, in order: its log is LevelDB's, of 32 KiB blocks of records of wandb's
    protobuf messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("run-*.wandb")
    raw, at, message, rows = file.read_bytes(), 7, b"", []
    assert raw[:4] == b":W&B"
    while at + 7 <= len(raw):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", raw[at : at + 7])
        message += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record.FromString(message)
            message = b""
            if record.HasField("history"):
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
            if record.HasField("run"):
                assert record.run.run_id in folder.name.split("-")
    return rows
