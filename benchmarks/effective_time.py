"""Effective training time under failures: how much of the wall time of a long run trains, by event simulation.

    flagdit bench effective_time

Failures come at the rate of Llama 3's pretraining (arXiv 2407.21783, section 3.3.4: 466 interruptions in 54 days on
16,384 GPUs, 47 of them planned), as independent exponential waits, in proportion to the number of GPUs. What a failure
costs is taken from the real program here: the pause of a step by a checkpoint, and the time of a restart from
process start to the first new step; both are measured here with a small model, in processes of their own. To them are
added, as stated assumptions, the waits that only a cluster has: noticing, requeueing, health checks, reading a large
checkpoint. Checkpoints are taken to be written while training goes on, so that a step waits only until its numbers are
copied; the interval is Young's and Daly's, √(2 · pause · mean time between failures), but not shorter than the writing
takes.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from _conditions import write_result

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


@dataclass(frozen=True)
class Costs:
    """Seconds: of a checkpoint's pause, and of a restart from the job's start to its first step."""

    pause: float
    restart: float


@dataclass(frozen=True)
class Outcome:
    """Of one simulated run."""

    effective: float
    failures: int
    lost: float
    interval: float


def measure(folder: Path) -> Costs:
    """Times a checkpoint and a restart of the real program, with a small model on this machine's CPU."""
    import numpy as np
    from PIL import Image

    (folder / "src").mkdir()
    rng = np.random.default_rng(0)
    for i in range(16):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / "src" / f"{i}.png")
        (folder / "src" / f"{i}.txt").write_text(f"picture {i}")
    (folder / "r.yaml").write_text(
        f"name: r\nrun_dir: {folder}\nmodel: {{dim: 128, num_layers: 4, num_heads: 4, text_dim: 0}}\n"
        f"data: {{path: {folder}/encoded, batch_size: 4}}\nsample: {{size: 16x16}}\n"
        "train: {steps: 100000, log_every: 1, device: cpu}\ncheckpoint: {every: 5}\n"
    )
    command = [sys.executable, "-m", "flagdit.cli"]
    for line in (
        ["data", "build", "folder", f"{folder}/raw", "--from", f"{folder}/src", "--size", "16"],
        ["data", "encode", f"{folder}/raw", f"{folder}/encoded", "--recipe", f"{folder}/r.yaml"],
    ):
        subprocess.run([*command, *line], check=True, capture_output=True)
    began, pauses = [], []
    for start in range(2):
        since = time.perf_counter()
        process = subprocess.Popen([*command, "train", f"{folder}/r.yaml"], stdout=subprocess.PIPE, text=True)
        assert process.stdout
        saved = 0
        for line in process.stdout:
            if line.startswith("step") and len(began) == start:
                began.append(time.perf_counter() - since)
            if "checkpoint saved in" in line:
                pauses.append(float(line.split("saved in")[1].split()[0]))
                saved += 1
            if saved == 3:
                process.kill()  # a failure: nothing is saved at its end
        process.wait()
    return Costs(statistics.median(pauses), began[-1])


def simulate(gpus: int, costs: Costs, days: float, seed: int) -> Outcome:
    """One run of so many days of wall time."""
    rng = random.Random(seed)
    mean = DAYS * DAY / (INTERRUPTIONS - PLANNED) * GPUS / gpus
    planned_every = DAYS * DAY / PLANNED * GPUS / gpus
    pause = costs.pause + STATE / gpus / COPY
    interval = max(math.sqrt(2 * pause * mean), STATE / STORAGE)
    restart = REQUEUE + HEALTH + STATE / STORAGE + costs.restart
    wall = lost = 0.0
    failures = 0
    trained = 0.0
    next_planned = planned_every
    while wall < days * DAY:
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
    print(f"measured: a checkpoint pauses training {costs.pause:.2f} s, a restart takes {costs.restart:.1f} s\n")
    print(f"{'GPUs':>6} {'failures in 54 days':>20} {'checkpoint every':>17} {'lost work':>10} {'effective':>10}")
    effective = {}
    for gpus in (64, 512, 2048, 16384):
        runs = [simulate(gpus, costs, DAYS, seed) for seed in range(args.seeds)]
        effective[gpus] = statistics.mean(run.effective for run in runs)
        failures, lost = (statistics.mean(getattr(run, key) for run in runs) for key in ("failures", "lost"))
        minutes = runs[0].interval / 60
        print(f"{gpus:>6} {failures:>20.1f} {minutes:>13.1f} min {lost:>10.2%} {effective[gpus]:>10.2%}")
    figures = {
        "effective": round(effective[GPUS], 4),
        "effective_512": round(effective[512], 4),
        **{key: round(value, 3) for key, value in asdict(costs).items()},
    }
    if args.out:
        write_result(args.out, figures, ("torch",), seeds=args.seeds)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
