"""Random SIGKILLs of training processes: does a run that is killed again and again end as one that never was?

    flagdit bench chaos
    python benchmarks/chaos.py --kills 20

A tiny model trains on real pictures, with two averages, bad steps, and a checkpoint every third step, in every second
run written beside training. Runs are killed at random moments, while they start, train or save, each a few dozen times,
and continued every time; then weights, averages, moments, counters and the losses of all steps are compared with the
uninterrupted run, bit by bit. Processes are forked from one that has imported everything, so that a life takes a
fraction of a second; what they run is `flagdit.train.loop.train` as the command does. The last line is one JSON object:
kills (`faults`), and whether every run ended the same (`bit_equal`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _conditions import write_result
from PIL import Image

from flagdit.checkpoint import store
from flagdit.config.load import load_recipe
from flagdit.config.schema import Recipe
from flagdit.data_pipelines.build import build_dataset
from flagdit.data_pipelines.encode import encode_dataset
from flagdit.train.loop import train

TINY = {
    "model": "{dim: 16, num_layers: 2, num_heads: 2, ffn_dim: 32, cond_dim: 16, text_dim: 0}",
    "data.batch_size": 8,
    "optimizer.lr": 0.01,
    "optimizer.warmup_steps": 2,
    # Just above most gradient norms: some steps are bad, so that the guard's state counts too.
    "guard.max_grad_norm": 0.5,
    "guard.max_consecutive": 1000,
    "train.steps": 150,
    "train.log_every": 1,
    "train.device": "cpu",
    "train.ema_decays": "[0.99,0.5]",
    "checkpoint.every": 3,
    "checkpoint.keep": 2,
    "sample.size": "8x8",
}
KILLS_A_RUN = 50
TIMES = ("seconds", "val_seconds", "tokens_per_s", "samples_per_s", "mfu", "ema_seconds", "save_stall")
"""Figures of a metrics line that no two runs share."""
FROM_THE_START = 0.25
"""Share of the kills whose moment is drawn from the whole life, start included; the others come after it."""


@dataclass
class Counts:
    """What the kills hit."""

    kills: int = 0
    starting: int = 0
    saving: int = 0
    runs: int = 0
    different: int = 0


def prepare(folder: Path) -> Recipe:
    """A data set of 40 pictures of two sizes, and the recipe."""
    (folder / "src").mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        height, width = [(8, 8), (4, 12)][i % 2]
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(folder / "src" / f"p{i:02d}.png")
        (folder / "src" / f"p{i:02d}.txt").write_text(f"picture {i}")
    (folder / "empty.yaml").write_text("{}\n")
    keys = {**TINY, "run_dir": folder / "runs", "name": "whole", "data.path": folder / "encoded"}
    recipe = load_recipe(folder / "empty.yaml", [f"{key}={value}" for key, value in keys.items()])
    build_dataset("folder", folder / "raw", src=folder / "src", size=8, multiple=2)
    encode_dataset(folder / "raw", folder / "encoded", recipe)
    return recipe


def start(recipe: Recipe, log: Path) -> int:
    """Trains in a forked process, leader of a group of its own; its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        train(recipe)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def ended(pid: int, seconds: float) -> int | None:
    """Exit status of a process once it has ended; None where it is still there after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        time.sleep(min(0.002, seconds))
    return None


def whole_run(recipe: Recipe, log: Path) -> tuple[float, float]:
    """Trains without interruption; seconds until the first step, and of the whole life."""
    began = time.monotonic()
    pid = start(recipe, log)
    metrics = Path(recipe.run_dir) / recipe.name / "metrics.jsonl"
    while not metrics.exists() and ended(pid, 0.005) is None:
        pass
    first = time.monotonic() - began
    if ended(pid, 600) != 0:
        raise SystemExit(f"the uninterrupted run failed:\n{log.read_text()}")
    return first, time.monotonic() - began


def killed_run(recipe: Recipe, log: Path, kills: int, span: tuple[float, float], rng: random.Random, c: Counts) -> None:
    """Kills and continues one run so many times, or until it is done, and then lets it end.

    Args:
        span: seconds from a start after which nearly all runs train, and up to which kills come.
    """
    folder = Path(recipe.run_dir) / recipe.name
    for _ in range(kills):
        before = starts_of(folder)
        pid = start(recipe, log)
        status = ended(pid, rng.uniform(0 if rng.random() < FROM_THE_START else span[0], span[1]))
        if status is not None:
            if status:
                raise SystemExit(f"a run that was not killed ended with {status}:\n{log.read_text()[-4000:]}")
            return
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        c.kills += 1
        c.saving += any(not path.name.startswith("step_") for path in (folder / "checkpoints").glob("*"))
        c.starting += starts_of(folder) == before
    if ended(start(recipe, log), 600) != 0:
        raise SystemExit(f"the last start failed:\n{log.read_text()[-4000:]}")


def starts_of(folder: Path) -> int:
    """How many starts have got as far as to open the run folder."""
    file = folder / "environment.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """Whole lines of the metrics, without what depends on the clock."""
    file = folder / "metrics.jsonl"
    whole = file.read_text().rpartition("\n")[0] if file.exists() else ""
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in whole.splitlines()]


def ledger_of(folder: Path) -> str:
    file = folder / "ledger.jsonl"
    return file.read_text() if file.exists() else ""


def differences(a: Path, b: Path) -> Iterator[str]:
    """All in which two finished runs differ."""
    if steps_of(a) != steps_of(b):
        yield "metrics"
    if ledger_of(a) != ledger_of(b):
        yield "ledger"
    ours, theirs = (store.load(store.find(folder)) for folder in (a, b))
    if ours.state["guard"] != theirs.state["guard"] or ours.step != theirs.step:
        yield "counters"
    if list(ours.tensors) != list(theirs.tensors):
        yield "groups"
        return
    for group in ours.tensors:
        mine, others = ours.tensors[group], theirs.tensors[group]
        if mine.keys() != others.keys():
            yield group
        for name, tensor in mine.items():
            if name not in others or not torch.equal(tensor, others[name]):
                yield f"{group}/{name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write figures and conditions to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng, c = random.Random(args.seed), Counts()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = prepare(folder)
        whole = folder / "runs" / "whole"
        first, life = whole_run(recipe, folder / "log")
        span = (first, first + (life - first) / 15)
        bad = ledger_of(whole).count("\n")
        print(
            f"uninterrupted: {life:.1f} s, {bad} bad steps, first step after {first:.2f} s; kills up to {span[1]:.2f} s"
        )
        while c.kills < args.kills:
            c.runs += 1
            beside = c.runs % 2 == 0
            cut = replace(recipe, name=f"cut_{c.runs}", checkpoint=replace(recipe.checkpoint, asynchronous=beside))
            before = c.kills
            killed_run(cut, folder / "log", min(KILLS_A_RUN, args.kills - c.kills), span, rng, c)
            found = list(differences(whole, folder / "runs" / cut.name))
            c.different += bool(found)
            told = f"DIFFERS in {', '.join(found[:5])}" if found else "equal, bit by bit"
            how = "written beside training" if beside else "waited for"
            print(f"run {c.runs}, saves {how}: killed {c.kills - before} times, then {told}", flush=True)
    print(f"{c.kills} kills, {c.saving} of them during a save, {c.starting} before its first step; {c.runs} runs")
    figures = {
        "faults": c.kills,
        "bit_equal": c.different == 0,
        "during_a_save": c.saving,
        "while_starting": c.starting,
        "runs": c.runs,
    }
    if args.out:
        write_result(args.out, figures, ("torch",), seed=args.seed, **{k: str(v) for k, v in TINY.items()})
    print(json.dumps(figures))
    sys.exit(bool(c.different))


if __name__ == "__main__":
    main()
