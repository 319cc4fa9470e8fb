"""A run that is asked to stop: what it still does, what it leaves for the next start, and how long it takes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flagdit.checkpoint import store
from flagdit.config.load import save_recipe
from flagdit.train import loop
from flagdit.train.loop import train


def logged(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = ("seconds", "val_seconds", "tokens_per_s", "samples_per_s", "mfu", "ema_seconds", "save_stall")
    return [{k: v for k, v in line.items() if k not in times} for line in lines]


def test_validation_and_pictures_wait_for_the_next_start(tiny, monkeypatch):
    """The signal comes in the very step after which both are due; the curves have no gap."""
    keys = {"validation__every": 2, "sample__every": 4, "sample__prompts": "[a]", "checkpoint__every": 100}
    whole = train(tiny(name="whole", train__steps=8, **keys))
    recipe = tiny(name="cut", train__steps=8, **keys)
    folder = Path(recipe.run_dir) / "cut"
    honest = loop.take_step

    def signalled(run, batches, since):
        result = honest(run, batches, since)
        if run.step == 4:
            os.kill(os.getpid(), signal.SIGUSR1)
        return result

    monkeypatch.setattr(loop, "take_step", signalled)
    with pytest.raises(SystemExit) as left:
        train(recipe)
    assert left.value.code == 128 + signal.SIGUSR1
    assert [(line["step"], "val_loss" in line) for line in logged(folder)] == [
        (1, False), (2, False), (2, True), (3, False), (4, False)
    ]  # fmt: skip
    assert not (folder / "samples").exists() and [step for step, _ in store.complete(folder)] == [4]
    monkeypatch.setattr(loop, "take_step", honest)
    train(recipe)
    assert logged(folder) == logged(whole)
    assert sorted(p.name for p in (folder / "samples").iterdir()) == sorted(
        p.name for p in (whole / "samples").iterdir()
    )


def test_made_up_once(tiny):
    keys = {"validation__every": 2, "sample__every": 2, "sample__prompts": "[a]"}
    train(tiny(train__steps=4, **keys))
    folder = train(tiny(train__steps=6, **keys))
    assert [line["step"] for line in logged(folder) if "val_loss" in line] == [2, 4, 6]


SLOW_SAVE = """
import hashlib, sys
from flagdit.checkpoint import store
from flagdit.config.load import load_recipe
from flagdit.train import loop, run

honest = run.Run.save

def save(self, final):
    if self.step > 2:
        print("saving", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 500_000_000)
    return honest(self, final=final)

run.Run.save = save
loop.train(load_recipe(sys.argv[1]))
"""


@pytest.mark.parametrize("again", [False, True], ids=["in time", "second signal"])
def test_a_save_that_takes_too_long_is_given_up_and_harms_nothing(tiny, tmp_path, again):
    recipe = tiny(train__steps=100_000, checkpoint__every=2, checkpoint__grace=60.0 if again else 1.5)
    folder = Path(recipe.run_dir) / "tiny"
    save_recipe(recipe, tmp_path / "recipe.yaml")
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_SAVE, str(tmp_path / "recipe.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line == "saving\n":
            break
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    if again:
        assert "saving after this step" in process.stderr.readline() + process.stderr.readline()
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == (130 if again else 143), err
    assert time.monotonic() - began < 6
    assert ("leaving at once" if again else "not saved within checkpoint.grace=1.5 s") in err
    assert store.newest(folder, print).step == 2
    train(tiny(train__steps=6))
    assert [line["step"] for line in logged(folder)] == list(range(1, 7))
