"""SLURM's commands, each with a time limit: a controller that does not answer must not hang a launch."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence

from flagdit.errors import LaunchError

PATIENCE = 30.0
"""Seconds that a command may take."""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


def there() -> bool:
    """Whether this machine can talk to SLURM."""
    return shutil.which("sbatch") is not None


def command(arguments: Sequence[str]) -> subprocess.CompletedProcess:
    """Runs one of SLURM's commands.

    Raises:
        LaunchError: it does not answer.
    """
    try:
        return subprocess.run(arguments, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"{arguments[0]} did not answer within {PATIENCE:g} seconds",
            fix="Is the controller up? Try `scontrol ping`.",
        ) from None
    except OSError as error:
        raise LaunchError(f"{arguments[0]} cannot be run: {error.strerror}") from error


def live_partitions() -> dict[str, str] | None:
    """Partition → longest time, as sinfo tells; None where SLURM is not at hand."""
    if not there():
        return None
    done = command(["sinfo", "--noheader", "--format=%R %l"])
    rows = [line.split() for line in done.stdout.splitlines()]
    return {row[0]: row[1] for row in rows if len(row) == 2} if done.returncode == 0 and rows else None


def job(number: str) -> dict[str, str]:
    """What SLURM knows of a job: JobState, Restarts, NodeList …; empty when it has forgotten it.

    From scontrol, and from the accounting database for jobs that have left the controller's memory.
    """
    done = command(["scontrol", "show", "job", "--oneliner", number])
    if done.returncode == 0:
        pairs = (pair.partition("=") for pair in done.stdout.split())
        return {key: value for key, equals, value in pairs if equals}
    if shutil.which("sacct") is None:
        return {}
    done = command(
        ["sacct", "--noheader", "--parsable2", "-X", "--format=State,NodeList,Restarts,Reason", "-j", number]
    )
    rows = [line.split("|") for line in done.stdout.splitlines()]
    if done.returncode or not rows:
        return {}
    state, nodes, restarts, reason = rows[-1][:4]
    return {"JobState": state.split()[0], "NodeList": nodes, "Restarts": restarts or "0", "Reason": reason}


def ended(facts: dict[str, str]) -> bool:
    """Whether a job is over."""
    return not facts or facts["JobState"].startswith(ENDED)
