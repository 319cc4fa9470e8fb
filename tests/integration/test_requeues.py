"""Twenty requeues of one run: one wandb run, every step once, the numbers of a run that nothing interrupted."""

import os
import signal

import pytest

from flagdit.train import hooks
from flagdit.train.folder import read_lines
from flagdit.train.loop import train

REQUEUES = 20


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
    # Every start is an offline folder of its own; they carry one id, by which `wandb sync` makes them one run.
    folders = list((run / "wandb").glob("offline-run-*"))
    run_id = (run / "wandb" / "run_id").read_text()
    assert folders and all(run_id in folder.name.split("-") for folder in folders)
