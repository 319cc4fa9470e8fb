"""Runs that are killed, stopped, filled up or changed, and go on."""

import fcntl
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from flagdit.checkpoint import store
from flagdit.config.load import save_recipe
from flagdit.config.schema import Recipe
from flagdit.data_pipelines.encode import encode_dataset
from flagdit.errors import CheckpointError, DataError, RecipeError
from flagdit.train.loop import train

TRAIN = "import sys; from flagdit.config.load import load_recipe; from flagdit.train.loop import train; "
TRAIN += "train(load_recipe(sys.argv[1]))"


def start(recipe: Recipe, file: Path) -> subprocess.Popen:
    """Trains in a process, and a process group, of its own."""
    save_recipe(recipe, file)
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN, str(file)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def logged(folder: Path) -> list[dict]:
    file = folder / "metrics.jsonl"
    whole = file.read_text().rpartition("\n")[0] if file.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    deadline = time.monotonic() + 180
    while not any(line["step"] >= step for line in logged(folder)):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def finish(process: subprocess.Popen) -> str:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    return out


def without_times(line: dict) -> dict:
    return {
        k: v
        for k, v in line.items()
        if k not in ("seconds", "val_seconds", "tokens_per_s", "samples_per_s", "mfu", "ema_seconds", "save_stall")
    }


def fingerprint(folder: Path) -> dict[str, str]:
    """Path and content of every file but the lock."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_killed_twice_equals_never_killed_bit_by_bit(tiny, tmp_path):
    """Weights, averages, moments, counters, losses and pictures; SIGKILL at random steps, micro-batches, log lines that
    straddle checkpoints, saves beside the training, a bad step in between (the guard's limit is just above most
    gradient norms)."""
    keys = {
        "train__steps": 60,
        "train__accumulation": 2,
        "train__log_every": 3,
        "checkpoint__every": 7,
        "validation__every": 10,
        "sample__every": 20,
        "sample__prompts": "[a,b]",
        "optimizer__schedule": "cosine",
        "guard__max_grad_norm": 0.6,
        "guard__max_consecutive": 60,
    }
    whole, cut = tiny(name="whole", **keys), tiny(name="cut", **keys, checkpoint__asynchronous="true")
    whole_folder, cut_folder = Path(whole.run_dir) / "whole", Path(cut.run_dir) / "cut"
    uninterrupted = start(whole, tmp_path / "whole.yaml")
    rng = random.Random(0)
    for low, high in ((9, 30), (33, 54)):
        process = start(cut, tmp_path / "cut.yaml")
        wait_for_step(process, cut_folder, rng.randrange(low, high))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert logged(cut_folder)[-1]["step"] < 60
    assert "continuing at step" in finish(start(cut, tmp_path / "cut.yaml"))
    finish(uninterrupted)

    a, b = (store.load(store.find(folder)) for folder in (whole_folder, cut_folder))
    assert a.step == b.step == 60
    assert list(a.tensors) == list(b.tensors) == ["model", "optimizer", "ema_0.99", "ema_0.5"]
    for group in a.tensors:
        ours, theirs = a.tensors[group], b.tensors[group]
        assert ours.keys() == theirs.keys() and all(torch.equal(t, theirs[name]) for name, t in ours.items())
    assert a.state["guard"] == b.state["guard"] and 0 < a.state["guard"]["bad_steps"] < 60
    assert list(map(without_times, logged(whole_folder))) == list(map(without_times, logged(cut_folder)))
    assert (whole_folder / "ledger.jsonl").read_text() == (cut_folder / "ledger.jsonl").read_text()
    for grid in ("step_00000020.png", "step_00000060.png"):
        assert (whole_folder / "samples" / grid).read_bytes() == (cut_folder / "samples" / grid).read_bytes()
    starts = [json.loads(line)["step"] for line in (cut_folder / "environment.jsonl").read_text().splitlines()]
    assert len(starts) == 3 and starts[0] == 0 and all(step % 7 == 0 and step for step in starts[1:])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_to_the_whole_group_save_and_leave(tiny, tmp_path, number, code):
    """As a terminal and a scheduler send them: loader processes get them too."""
    recipe = tiny(train__steps=100_000, checkpoint__every=100_000, data__workers=1)
    folder = Path(recipe.run_dir) / "tiny"
    process = start(recipe, tmp_path / "recipe.yaml")
    wait_for_step(process, folder, 5)
    os.killpg(process.pid, number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code, out
    ((step, _),) = store.complete(folder)
    assert f"stopped at step {step} of 100000; the same command continues" in out and "Traceback" not in out
    assert logged(folder)[-1]["step"] == step
    again = tiny(train__steps=step + 2, checkpoint__every=100_000)
    train(again)
    assert [line["step"] for line in logged(folder)] == list(range(1, step + 3))


def test_a_finished_run_says_so_and_goes_on_when_it_gets_longer(tiny, capsys):
    folder = train(tiny(train__steps=4))
    before = fingerprint(folder)
    capsys.readouterr()
    assert train(tiny(train__steps=4)) == folder
    assert "is finished: 4 of 4 steps are done. Raise train.steps to train on." in capsys.readouterr().out
    assert fingerprint(folder) == before
    train(tiny(train__steps=6, train__log_every=2, sample__every=6, sample__prompts="[p]", data__workers=0))
    assert [line["step"] for line in logged(folder)] == [1, 2, 3, 4, 6]
    longer = store.load(store.find(folder, 6)).tensors["model"]
    at_once = store.load(store.find(train(tiny(name="at_once")), 6)).tensors["model"]
    assert all(torch.equal(t, at_once[name]) for name, t in longer.items())


def test_another_run_is_refused_and_all_keys_are_named(tiny):
    folder = train(tiny(train__steps=2))
    before = fingerprint(folder)
    with pytest.raises(RecipeError) as error:
        train(tiny(train__steps=2, seed=5, model__num_layers=3, optimizer__lr=0.5, log__peak_tflops=1))
    text = str(error.value)
    assert "seed is 0 in the run and 5 now; model.num_layers is 2 in the run and 3 now" in text
    assert "optimizer.lr" in text and "peak_tflops" not in text and "name=…" in text and str(folder) in text
    assert fingerprint(folder) == before


def test_another_data_set_is_refused_wherever_it_lies(pictures, data, tiny, tmp_path):
    folder = train(tiny(train__steps=2))
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    train(tiny(train__steps=4, data__path=moved))  # the same data at another place
    before = fingerprint(folder)
    shutil.rmtree(moved)
    encode_dataset(pictures, moved, tiny(), dtype="fp16")
    with pytest.raises(RecipeError, match=r"data\.path=.*moved holds another data set than the one this run"):
        train(tiny(train__steps=6, data__path=moved))
    assert fingerprint(folder) == before


def test_faults_of_the_recipe_leave_no_run_behind(tiny, tmp_path):
    with pytest.raises(DataError, match="there is no such folder"):
        train(tiny(data__path=tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"data\.batch_size=1000 is larger than its split"):
        train(tiny(data__batch_size=1000))
    with pytest.raises(DataError, match=r"validation\.split=nothing is not one of its splits"):
        train(tiny(validation__every=1, validation__split="nothing"))
    folder = Path(tiny().run_dir) / "tiny"
    assert fingerprint(folder) == {}
    train(tiny(train__steps=2))


def test_full_disk_keeps_the_earlier_checkpoints(tiny):
    folder = train(tiny(train__steps=2))
    kept = fingerprint(folder / "checkpoints")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(p.stat().st_size for p in (folder / "checkpoints").rglob("optimizer/*"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, hard))
    try:
        with pytest.raises(CheckpointError, match="the checkpoint of step 4 could not be written") as error:
            train(tiny(train__steps=6))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "Earlier checkpoints are as they were" in str(error.value)
    assert fingerprint(folder / "checkpoints") == kept
    train(tiny(train__steps=6))
    at_once = store.load(store.find(train(tiny(name="at_once")))).tensors["optimizer"]
    assert all(torch.equal(t, at_once[n]) for n, t in store.load(store.find(folder)).tensors["optimizer"].items())


def test_a_damaged_newest_checkpoint_is_passed_over(tiny, capsys):
    folder = train(tiny(train__steps=4))
    with (store.find(folder, 4) / "optimizer/part_00000.safetensors").open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"xyz")
    train(tiny())
    out = capsys.readouterr().out
    assert "damaged" in out and "continuing at step 2" in out
    assert [line["step"] for line in logged(folder)] == [1, 2, 3, 4, 5, 6]


def test_two_processes_never_train_in_one_folder(tiny):
    recipe = tiny(train__steps=2)
    folder = Path(recipe.run_dir) / "tiny"
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another process is training in this run folder"):
            train(recipe)
    train(recipe)


def test_folders_that_are_no_runs_are_left_alone(tiny):
    recipe = tiny(train__steps=2)
    folder = Path(recipe.run_dir) / "tiny"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("chapter 1")
    with pytest.raises(CheckpointError, match=r"no recipe\.yaml, so it is not a run \(thesis\.txt\)"):
        train(recipe)
    assert list(fingerprint(folder)) == ["thesis.txt"]
    (folder / "thesis.txt").unlink()
    (folder / "recipe.yaml").write_text("model: {dim: [")
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        train(recipe)
    file = Path(recipe.run_dir) / "file"
    file.write_text("")
    with pytest.raises(CheckpointError, match="the run folder cannot be written"):
        train(tiny(name="file"))
    with pytest.raises(CheckpointError, match="the run folder cannot be written"):
        train(tiny(run_dir=file, name="below"))
