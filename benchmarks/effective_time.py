"""Effective training time under failures: how much of the wall time of a long run trains, by event simulation.

    flagdit bench effective_time

Failures come at the rate of Llama 3's pretraining (arXiv 2407.21783, section 3.3.4: 466 interruptions in 54 days on
16,384 GPUs, 47 of them planned), as independent exponential waits, in proportion to the number of GPUs. What a failure
costs is taken from the real program: the pause of training by a checkpoint, written beside training and not, and the
time of a restart from process start to the first new step; all are measured here with a small model, in processes of
their own, after SIGKILL. To them are added, as stated assumptions (the constants below), what only a cluster has:
noticing, requeueing, health checks, copying, writing and reading the checkpoint of a 7B model. The interval between
checkpoints is Young's and Daly's, √(2 · pause · mean time between failures), but not shorter than writing takes.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from _conditions import write_result
from PIL import Image

INTERRUPTIONS, DAYS, GPUS = 466, 54, 16384
PLANNED = 47
DAY = 86400.0
DETECT = {"crash": 5.0, "hang": 0.9 * 600 + 10}
HANGS = 0.05
"""Share of failures that show as a hang, which the watchdog ends after 0.9 · parallel.timeout: an assumption; most
of Llama 3's were crashes of GPUs, hosts or software."""
REQUEUE = 60.0
"""Seconds from the end of a job to the start of the next on nodes that are there: an assumption."""
HEALTH = 30.0
"""Seconds of the checks before training: an assumption."""
STATE = 8.4e9 * 16
"""Bytes of a 7B model's fp32 weights, moments and one average."""
COPY = 20e9
"""Bytes/s at which a GPU's share of them is copied to its host: an assumption."""
STORAGE = 5e9
"""Bytes/s of the shared file system, for writing and reading a checkpoint: an assumption, and a modest one."""
SAVES = 5
"""Checkpoints that each start of the measured program writes."""
COMMAND = [sys.executable, "-m", "flagdit.cli"]
GOAL = 0.97


@dataclass(frozen=True)
class Costs:
    """Measured seconds.

    Attributes:
        beside: pause of training by a checkpoint that is written while it goes on.
        synchronous: pause by one that training waits for.
        restart: from process start to the first step after the checkpoint.
    """

    beside: float
    synchronous: float
    restart: float


@dataclass(frozen=True)
class Outcome:
    """Of one simulated run."""

    effective: float
    failures: int
    lost: float
    interval: float


def measure(folder: Path) -> Costs:
    """Times checkpoints and restarts of the real program, with a small model on this machine's CPU."""
    (folder / "src").mkdir()
    rng = np.random.default_rng(0)
    for i in range(16):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / "src" / f"{i}.png")
        (folder / "src" / f"{i}.txt").write_text(f"picture {i}")
    (folder / "r.yaml").write_text(
        f"run_dir: {folder}\nmodel: {{dim: 128, num_layers: 4, num_heads: 4, text_dim: 0}}\n"
        f"data: {{path: {folder}/encoded, batch_size: 4}}\nsample: {{size: 16x16}}\n"
        f"train: {{steps: 100000, log_every: 1, device: cpu}}\ncheckpoint: {{every: 5}}\n"
    )
    for line in (
        ["data", "build", "folder", f"{folder}/raw", "--from", f"{folder}/src", "--size", "16"],
        ["data", "encode", f"{folder}/raw", f"{folder}/encoded", "--recipe", f"{folder}/r.yaml"],
    ):
        subprocess.run([*COMMAND, *line], check=True, capture_output=True)
    pauses, restarts = {}, []
    for beside in (True, False):
        run = folder / f"beside_{beside}"
        keys = [f"name={run.name}", f"checkpoint.asynchronous={str(beside).lower()}"]
        one_life([*COMMAND, "train", f"{folder}/r.yaml", *keys])
        restarts.append(one_life([*COMMAND, "train", f"{folder}/r.yaml", *keys]))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        pauses[beside] = statistics.median(line["save_stall"] for line in lines if line["save_stall"])
    return Costs(pauses[True], pauses[False], statistics.mean(restarts))


def one_life(command: list[str]) -> float:
    """Trains until a few checkpoints are on the disk and kills; seconds until the first step."""
    began, first, saved = time.perf_counter(), 0.0, 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    for line in process.stdout:
        if line.startswith("step") and not first:
            first = time.perf_counter() - began
        saved += "checkpoint saved in" in line
        if saved == SAVES:
            process.kill()  # a failure: nothing is saved at its end
    if process.wait() != -signal.SIGKILL:
        raise SystemExit(f"training ended by itself with {process.returncode}: {' '.join(command)}")
    return first


def simulate(gpus: int, costs: Costs, seed: int, *, beside: bool) -> Outcome:
    """One run of DAYS of wall time, with checkpoints written beside training or not."""
    rng = random.Random(seed)
    mean = DAYS * DAY / (INTERRUPTIONS - PLANNED) * GPUS / gpus
    planned_every = DAYS * DAY / PLANNED * GPUS / gpus
    write = STATE / STORAGE
    pause = costs.beside + STATE / gpus / COPY if beside else costs.synchronous + write
    interval = max(math.sqrt(2 * pause * mean), write)
    restart = REQUEUE + HEALTH + write + costs.restart
    wall = lost = 0.0
    failures = 0
    trained = 0.0
    next_planned = planned_every
    while wall < DAYS * DAY:
        alive = rng.expovariate(1 / mean)
        if wall + alive > next_planned:
            # Told beforehand: the run saves, and only the restart is lost.
            alive = next_planned - wall
            next_planned += planned_every
            since_save, notice = 0.0, pause
        else:
            failures += 1
            since_save = alive % (interval + pause)
            notice = DETECT["hang" if rng.random() < HANGS else "crash"]
        saves = alive // (interval + pause)
        trained += max(alive - saves * pause - since_save, 0)
        lost += since_save
        wall += alive + notice + restart
    return Outcome(trained / wall, failures, lost / wall, interval)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="also write figures and conditions to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        costs = measure(Path(folder))
    print(
        f"measured: a checkpoint stops training for {costs.beside:.3f} s, for {costs.synchronous:.2f} s where it waits "
        f"for the disk; a restart takes {costs.restart:.1f} s\n"
    )
    print(f"{'GPUs':>6} {'checkpoints':>12} {'failures':>9} {'every':>9} {'lost work':>10} {'effective':>10}")
    effective = {}
    for gpus in (64, 512, 2048, GPUS):
        for beside in (True, False):
            runs = [simulate(gpus, costs, seed, beside=beside) for seed in range(args.seeds)]
            effective[gpus, beside] = statistics.mean(run.effective for run in runs)
            failures, lost = (statistics.mean(getattr(run, key) for run in runs) for key in ("failures", "lost"))
            print(
                f"{gpus:>6} {'beside' if beside else 'synchronous':>12} {failures:>9.1f} "
                f"{runs[0].interval / 60:>5.1f} min {lost:>10.2%} {effective[gpus, beside]:>10.2%}"
            )
    reached = effective[GPUS, True] >= GOAL
    print(
        f"\nOn {GPUS:,} GPUs {effective[GPUS, True]:.1%} of the time trains; the goal of {GOAL:.0%} is "
        f"{'reached' if reached else 'missed'}. Assumed: {REQUEUE:g} s to requeue, {HEALTH:g} s of checks, "
        f"{HANGS:.0%} of the failures are hangs, which cost {DETECT['hang']:g} s, and storage moves "
        f"{STATE / 1e9:.0f} GB at {STORAGE / 1e9:g} GB/s."
    )
    figures = {
        "effective": round(effective[GPUS, True], 4),
        "effective_512": round(effective[512, True], 4),
        "effective_synchronous": round(effective[GPUS, False], 4),
        **{key: round(value, 4) for key, value in asdict(costs).items()},
    }
    if args.out:
        write_result(args.out, figures, ("torch",), seeds=args.seeds)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
