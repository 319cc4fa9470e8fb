"""Effective training time under failures: how much of the wall time of a long run trains, by event simulation.

    flagdit bench effective_time [--out benchmarks/results/effective_time.json]

Failures come at the rate of Llama 3's pretraining (arXiv 2407.21783, section 3.3.4: 466 interruptions in 54 days on
16,384 GPUs, 47 of them planned), as independent exponential waits, in proportion to the number of GPUs.

Measured, here, from the real program: the pause of training by a checkpoint, written beside training and not, and the
time of a restart, from process start to the first new step. A small model is trained on this machine's CPU in a process
of its own, which is killed (SIGKILL) and started again.

Assumed, since only a cluster has them (the constants below): noticing, requeueing, health checks, the meeting of
thousands of ranks, and copying, writing and reading the checkpoint of a 7B model. Its pauses and restart are the
measured ones and these on top.

The interval between checkpoints is Young's and Daly's, √(2 · pause · mean time between failures), but so long that
storage writes a fifth of the time at most. What a failure loses is everything since the newest checkpoint that was on
the disk: one that was still being written counts for nothing.
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
SIZES = (64, 512, 2048, GPUS)
PLANNED = 47
DAY = 86400.0
DETECT = {"crash": 5.0, "hang": 0.9 * 600 + 10}
HANGS = 0.05
"""Share of failures that show as a hang, which the watchdog ends after 0.9 · parallel.timeout: an assumption; most
of Llama 3's were crashes of GPUs, hosts or software."""
JOIN = 60.0
"""Seconds in which thousands of ranks form their groups, beyond what one process takes to start: an assumption."""
REQUEUE = 60.0
"""Seconds from the end of a job to the start of the next on nodes that are there: an assumption."""
HEALTH = 30.0
"""Seconds of the checks before training: an assumption."""
STATE = 8.4e9 * 16
"""Bytes of a 7B model's fp32 weights, moments and one average."""
COPY = 20e9
"""Bytes/s at which a GPU's share of them is copied to its host: an assumption."""
STORAGE, STORAGE_PER_GPU = 5e9, 3e6
"""Bytes/s at which the shared file system reads and writes a checkpoint: the first, or so much a GPU where that is
more. An assumption: 49 GB/s for 16,384 GPUs, a fortieth of what Llama 3's cluster had."""
RARE = 600.0
"""Seconds between checkpoints of somebody who did not compute the best interval."""
BUSY = 0.2
"""Share of the time that storage may be writing checkpoints."""
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


@dataclass
class Outcome:
    """What became of the seconds of one simulated run.

    Attributes:
        interval: between checkpoints.
        failures: unplanned ones.
        trained: kept; the others are none.
        pauses: by checkpoints.
        lost: trained, but not on the disk when a failure came.
        noticing: until a failure was seen, or the last save of a planned stop.
        restarting: until the first new step.
    """

    interval: float
    failures: int = 0
    trained: float = 0.0
    pauses: float = 0.0
    lost: float = 0.0
    noticing: float = 0.0
    restarting: float = 0.0

    @property
    def wall(self) -> float:
        return self.trained + self.pauses + self.lost + self.noticing + self.restarting

    def share(self, kind: str) -> float:
        """Of the wall time."""
        return getattr(self, kind) / self.wall


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


def simulate(gpus: int, costs: Costs, seed: int, *, beside: bool, interval: float = 0.0) -> Outcome:
    """One run of DAYS of wall time.

    Args:
        beside: checkpoints are written beside training.
        interval: seconds between them; 0: the best one.
    """
    rng = random.Random(seed)
    mean = DAYS * DAY / (INTERRUPTIONS - PLANNED) * GPUS / gpus
    planned_every = DAYS * DAY / PLANNED * GPUS / gpus
    write = STATE / max(STORAGE, STORAGE_PER_GPU * gpus)
    waited = costs.synchronous + write
    pause = costs.beside + STATE / gpus / COPY if beside else waited
    run = Outcome(interval or max(math.sqrt(2 * pause * mean), write / BUSY))
    period = run.interval + pause
    next_planned = planned_every
    while run.wall < DAYS * DAY:
        alive = rng.expovariate(1 / mean)
        if run.wall + alive > next_planned:
            # Told beforehand: the run saves, and only that and the restart are lost.
            alive = max(next_planned - run.wall, 0.0)
            next_planned += planned_every
            saves, unsaved = int(alive // period), 0.0
            run.noticing += waited
        else:
            run.failures += 1
            saves = max(int((alive - write * beside) // period), 0)
            unsaved = alive - saves * period
            run.noticing += DETECT["hang" if rng.random() < HANGS else "crash"]
        run.pauses += saves * pause
        run.lost += unsaved
        run.trained += alive - saves * pause - unsaved
        run.restarting += REQUEUE + HEALTH + JOIN + write + costs.restart
    return run


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
    kinds = ("pauses", "lost", "noticing", "restarting", "trained")
    print(f"{'GPUs':>6} {'checkpoints':>12} {'failures':>9} {'every':>9} {' '.join(f'{kind:>10}' for kind in kinds)}")
    effective = {}
    for gpus in SIZES:
        for beside in (True, False):
            runs = [simulate(gpus, costs, seed, beside=beside) for seed in range(args.seeds)]
            shares = {kind: statistics.mean(run.share(kind) for run in runs) for kind in kinds}
            effective[gpus, beside] = shares["trained"]
            print(
                f"{gpus:>6} {'beside' if beside else 'synchronous':>12} "
                f"{statistics.mean(run.failures for run in runs):>9.1f} {runs[0].interval / 60:>5.1f} min "
                + " ".join(f"{share:>10.2%}" for share in shares.values())
            )
    rare = [simulate(GPUS, costs, seed, beside=True, interval=RARE).share("trained") for seed in range(args.seeds)]
    reached = effective[GPUS, True] >= GOAL
    print(
        f"\nOn {GPUS:,} GPUs {effective[GPUS, True]:.1%} of the time trains; the goal of {GOAL:.0%} is "
        f"{'reached' if reached else 'missed'}; with a checkpoint only every {RARE / 60:g} minutes it is "
        f"{statistics.mean(rare):.1%}. Assumed: {REQUEUE:g} s to requeue, {HEALTH:g} s of checks, {JOIN:g} s "
        f"until all ranks have met, {HANGS:.0%} of the failures are hangs of {DETECT['hang']:g} s, and storage "
        f"moves {STATE / 1e9:.0f} GB at {STORAGE_PER_GPU * GPUS / 1e9:.0f} GB/s."
    )
    figures = {
        "effective": round(effective[GPUS, True], 4),
        **{f"effective_{gpus}": round(effective[gpus, True], 4) for gpus in SIZES if gpus != GPUS},
        f"effective_every_{RARE / 60:g}_min": round(statistics.mean(rare), 4),
        "effective_synchronous": round(effective[GPUS, False], 4),
        **{key: round(value, 4) for key, value in asdict(costs).items()},
    }
    if args.out:
        assumed = {
            "requeue_s": REQUEUE,
            "health_s": HEALTH,
            "join_s": JOIN,
            "hangs": HANGS,
            "hang_s": DETECT["hang"],
            "checkpoint_gb": STATE / 1e9,
            "storage_gb_per_s": STORAGE_PER_GPU * GPUS / 1e9,
        }
        measured = "pauses and restart: one process with a model of 4 layers, 128 wide, on this CPU"
        write_result(args.out, figures, ("torch",), seeds=args.seeds, measured=measured, assumed=assumed)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
