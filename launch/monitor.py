"""`flagdit status`, `flagdit logs`, `flagdit stop`: what became of a run, read from its folder and from SLURM."""

from __future__ import annotations

import fcntl
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flagdit.config.load import load_recipe
from flagdit.config.validate_cluster import ranks_per_node
from flagdit.errors import LaunchError
from flagdit.launch import scheduler

TAIL = 65536
WELL = ("RUNNING", "PENDING", "COMPLETED", "COMPLETING", "finished", "stopped", "training here", "no job")
ERROR = re.compile(r"^(error: .*|\w*(Error|Exception)(: .*)?|slurmstepd.*(error|CANCELLED).*)$")


@dataclass(frozen=True)
class Status:
    """A run as it stands.

    Attributes:
        state: SLURM's, or what the folder tells: finished, stopped, failed, gave up, training here, no job.
        step, steps: done and of the whole run.
        tokens_per_s: of the last metrics line.
        checkpoint: step of the newest one; None: none yet.
        eta: seconds until the end at the last pace; None: not known.
        error: last line of the logs that tells of one, if the run is not well.
    """

    name: str
    job: str | None
    state: str
    nodes: str
    restarts: int
    step: int
    steps: int
    tokens_per_s: float | None
    checkpoint: int | None
    eta: float | None
    error: str | None


def status_of(run: Path) -> Status:
    """Looks at a run.

    Raises:
        LaunchError: there is no run in that folder.
    """
    recipe_file = next((f for f in (run / "recipe.yaml", run / "slurm" / "recipe.yaml") if f.exists()), None)
    if recipe_file is None:
        raise LaunchError(f"there is no run in {run}", fix="Give a run folder such as runs/quickstart.")
    steps = load_recipe(recipe_file).train.steps
    lines = list(_last_lines(run / "metrics.jsonl"))
    trained = [line for line in lines if "tokens_per_s" in line]
    saved = sorted(int(p.name.removeprefix("step_")) for p in (run / "checkpoints").glob("step_*[0-9]"))
    # Metrics come every few steps; a signal saves at any.
    step = max([line["step"] for line in lines] + saved, default=0)
    job, facts = _current_job(run)
    state = _state(run, job, facts, done=step >= steps)
    return Status(
        name=run.name,
        job=job,
        state=state + (f" ({facts['Reason']})" if state == "PENDING" and facts.get("Reason", "None") != "None" else ""),
        nodes=facts.get("NodeList", "").replace("(null)", ""),
        restarts=int(facts.get("Restarts", 0)),
        step=step,
        steps=steps,
        tokens_per_s=trained[-1]["tokens_per_s"] if trained else None,
        checkpoint=saved[-1] if saved else None,
        eta=_eta(trained, steps) if step < steps else None,
        error=None if state in WELL else last_error(run),
    )


def _state(run: Path, job: str | None, facts: dict[str, str], *, done: bool) -> str:
    if done:
        return "finished"
    if job is None or scheduler.ended(facts):
        if _held(run):
            return "training here"
        if (run / "slurm" / "stop").exists():
            return "stopped"
    if job is None:
        return "no job"
    # Without accounting SLURM forgets a job minutes after its end; its script has written down what it could.
    told = [line["event"] for line in _last_lines(run / "slurm" / "events.jsonl")]
    return facts.get("JobState") or (told[-1] if told and told[-1] in ("failed", "gave up") else "UNKNOWN")


def _held(run: Path) -> bool:
    """Whether a process of this machine trains in the folder."""
    try:
        with (run / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # never trained, or on a file system without locks
    return False


def all_runs(folder: Path) -> list[Path]:
    """Every run of a folder of runs, the newest last."""
    found = (
        [p for p in folder.iterdir() if (p / "recipe.yaml").exists() or (p / "slurm").exists()]
        if folder.is_dir()
        else []
    )
    return sorted(found, key=lambda p: p.stat().st_mtime)


def table_of(runs: list[Path]) -> RenderableType:
    """The states of runs, a row each, and below them what went wrong with those that are unwell."""
    table = Table(box=None, pad_edge=False)
    for column in ("run", "job", "state", "nodes", "restarts", "step", "tokens/s", "saved", "left"):
        table.add_column(column, overflow="fold", no_wrap=column not in ("run", "state", "nodes"))
    found = [status_of(run) for run in runs]
    for s in found:
        table.add_row(
            s.name,
            s.job or "",
            s.state,
            s.nodes,
            str(s.restarts),
            f"{s.step}/{s.steps}",
            "" if s.tokens_per_s is None else f"{s.tokens_per_s:,.0f}",
            "" if s.checkpoint is None else str(s.checkpoint),
            "" if s.eta is None else _duration(s.eta),
        )
    return Group(table, *(Text(f"\n{s.name}: {s.error}") for s in found if s.error))


def log_files(run: Path, rank: int | None) -> list[Path]:
    """The log of a rank (that of its node, where torchrun started it), or of the job itself.

    Raises:
        LaunchError: there is none.
    """
    pattern = "slurm_*.out" if rank is None else f"rank_{rank}.log"
    folder = _log_folder(run)
    files = sorted(folder.glob(pattern), key=lambda p: p.stat().st_mtime)
    submitted = run / "slurm" / "recipe.yaml"
    if not files and rank is not None and submitted.exists():
        files = list(folder.glob(f"node_{rank // ranks_per_node(load_recipe(submitted))}.log"))
    if not files:
        there = sorted(p.name for p in folder.glob("*.*"))
        fix = f"There are {', '.join(there[:8])}." if there else "The job may not have started yet: flagdit status."
        raise LaunchError(f"there is no {pattern}", where=str(folder), fix=fix)
    return files[-1:]


def follow(file: Path, lines: int, on: bool, tell: Callable[[str], None]) -> None:
    """Gives the last lines of a log and, if `on`, what is added to it until somebody interrupts."""
    with file.open(errors="replace") as f:
        for line in f.readlines()[-lines:]:
            tell(line.rstrip("\n"))
        while on:
            line = f.readline()
            if line:
                tell(line.rstrip("\n"))
            else:
                time.sleep(0.5)


def stop(run: Path, seconds: float, tell: Callable[[str], None]) -> None:
    """Stops a run's jobs: the running one saves and leaves, waiting ones leave the queue, none is queued again.

    Raises:
        LaunchError: the run has no job, or its job has not left after so many seconds.
    """
    live = live_jobs(run)
    if not live:
        raise LaunchError(
            f"{run} has no job in the queue", fix="A run on this machine is stopped by Ctrl-C or SIGTERM."
        )
    (run / "slurm" / "stop").touch()
    for job, facts in live:
        # Signals reach a job's steps; one that waits, or checks its nodes, has none that could save.
        running = facts["JobState"] == "RUNNING"
        scheduler.command(["scancel", *(["--signal=USR1"] if running else []), job])
        tell(f"job {job}: " + ("asked to save and leave" if running else "taken out of the queue"))
    end = time.monotonic() + seconds
    while any(not scheduler.ended(scheduler.job(job)) for job, _ in live):
        if time.monotonic() > end:
            jobs = ", ".join(job for job, _ in live)
            raise LaunchError(f"job {jobs} is still there after {seconds:g} seconds", fix="Kill it with scancel.")
        time.sleep(1)
    tell(f"stopped at step {status_of(run).step}; the same launch continues the run")


def last_error(run: Path) -> str | None:
    """The last line of the newest logs that tells of an error."""
    folder = _log_folder(run)
    for file in sorted(folder.glob("*.*"), key=lambda p: p.stat().st_mtime, reverse=True)[:16]:
        for line in reversed(_tail(file).splitlines()):
            if ERROR.match(line.strip()):
                return f"{file.name}: {line.strip()}"
    own = sorted(folder.glob("slurm_*.out"), key=lambda p: p.stat().st_mtime)
    lines = _tail(own[-1]).split("\n") if own else []
    return next((f"{own[-1].name}: {line}" for line in reversed(lines) if line.strip()), None)


def live_jobs(run: Path) -> list[tuple[str, dict[str, str]]]:
    """Jobs of a run that run or wait, the newest first."""
    return [(job, facts) for job, facts in _jobs(run) if not scheduler.ended(facts)]


def _jobs(run: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Submitted jobs of a run with what SLURM knows of them, the newest first."""
    file = run / "slurm" / "jobs.jsonl"
    lines = file.read_text().splitlines() if file.exists() and scheduler.there() else []
    for line in reversed(lines):
        job = json.loads(line)["job"]
        yield job, scheduler.job(job)


def _current_job(run: Path) -> tuple[str | None, dict[str, str]]:
    """The running job, else the one that will run next, else the last one."""
    jobs = list(_jobs(run))
    live = [pair for pair in reversed(jobs) if not scheduler.ended(pair[1])]
    running = [pair for pair in live if pair[1]["JobState"] == "RUNNING"]
    return next(iter(running + live + jobs), (None, {}))


def _log_folder(run: Path) -> Path:
    file = run / "slurm" / "recipe.yaml"
    logs = load_recipe(file).cluster.logs if file.exists() else None
    return Path(logs) if logs else run / "logs"


def _last_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Whole JSON lines of a log's end."""
    for line in _tail(file).splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue  # cut off at the front, or being written


def _tail(file: Path) -> str:
    if not file.exists():
        return ""
    with file.open("rb") as f:
        f.seek(max(0, file.stat().st_size - TAIL))
        return f.read().decode(errors="replace")


def _eta(trained: list[dict[str, Any]], steps: int) -> float | None:
    if len(trained) < 2 or trained[-1]["step"] == trained[0]["step"]:
        return None
    first, last = trained[0], trained[-1]
    return (steps - last["step"]) * (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])


def _duration(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d{hours % 24:02d}h"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m"
