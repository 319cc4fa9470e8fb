"""Queues a job again without some of its nodes. Runs beside the job's script, which SLURM ends meanwhile.

    python -m flagdit.launch.requeue JOB NODE,NODE

A running job's nodes cannot be changed: it is put back on hold, its exclusions are set, and it is released.
"""

from __future__ import annotations

import sys
import time

from flagdit.launch.scheduler import command, job

TRIES = 60


def requeue_without(number: str, nodes: str) -> None:
    """Raises SystemExit with SLURM's message if it refuses."""
    _must(["scontrol", "requeuehold", number])
    given = job(number).get("ExcNodeList", "(null)")
    excluded = nodes if given in ("", "(null)") else f"{given},{nodes}"
    for _ in range(TRIES):
        if command(["scontrol", "update", f"JobId={number}", f"ExcNodeList={excluded}"]).returncode == 0:
            break
        time.sleep(1)
    _must(["scontrol", "release", number])


def _must(arguments: list[str]) -> None:
    done = command(arguments)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}: {done.stderr.strip()}")


if __name__ == "__main__":
    requeue_without(*sys.argv[1:3])
