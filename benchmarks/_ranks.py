"""Runs a benchmark's script once more, as several ranks of this machine."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from flagdit.launch.local import free_port, rank_environment
from flagdit.launch.processes import run_ranks


def from_ranks(script: str, world: int, *arguments: str) -> list[Any]:
    """What every rank found, in the order of the ranks.

    Args:
        script: started as `script --rank-of FOLDER arguments…`; each rank writes FOLDER/RANK.json.

    Raises:
        LaunchError: a rank failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, port = Path(folder), free_port()
        argv = [sys.executable, script, "--rank-of", folder, *arguments]
        stopped = run_ranks(argv, world, out / "logs", lambda rank: rank_environment(rank, world, port), print)
        if stopped:
            sys.exit(stopped)
        return [json.loads((out / f"{rank}.json").read_text()) for rank in range(world)]
