"""`flagdit launch local`: all ranks of a run on this machine, without torchrun."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from flagdit.config.load import load_recipe
from flagdit.config.schema import Recipe
from flagdit.errors import LaunchError
from flagdit.launch.processes import run_ranks


def train_locally(recipe: str, overrides: Sequence[str], ranks: int | None, tell: Callable[[str], None]) -> int:
    """Trains a recipe with `ranks` processes here, as `flagdit train` under torchrun would.

    Args:
        recipe: file or name, as on the command line.
        overrides: keys to change.
        ranks: processes; None: one for each GPU, or as many as hold one pack where there is none.
        tell: gets lines for people.

    Returns:
        The exit code: 0, or 128 + n after signal n.

    Raises:
        RecipeError: the recipe is wrong; nothing was started.
        LaunchError: the number of ranks does not fit, or a rank failed.
    """
    resolved = load_recipe(recipe, overrides)
    gpus = visible_gpus()
    ranks = ranks or gpus or resolved.parallel.tensor * resolved.parallel.context
    check_ranks(resolved, ranks, gpus)
    logs = Path(resolved.run_dir) / resolved.name / "logs"
    if ranks > 1:
        tell(f"{ranks} ranks; logs in {logs}")
    argv = [sys.executable, "-m", "flagdit.cli", "train", recipe, *overrides]
    port = free_port()
    return run_ranks(argv, ranks, logs, lambda rank: rank_environment(rank, ranks, port), tell)


def check_ranks(recipe: Recipe, ranks: int, gpus: int) -> None:
    """Whether so many ranks can run this recipe here.

    Raises:
        LaunchError: they do not fill the mesh, or they are more than the GPUs that they want.
    """
    p = recipe.parallel
    together = p.tensor * p.context
    if ranks % together:
        near = [n for n in (ranks // together * together, (ranks // together + 1) * together) if n]
        raise LaunchError(
            f"--ranks {ranks} is not a multiple of parallel.tensor={p.tensor} times parallel.context={p.context}",
            fix=f"Try --ranks {' or '.join(map(str, near))}.",
        )
    on_gpu = recipe.train.device == "cuda" or (recipe.train.device == "auto" and gpus > 0)
    if on_gpu and ranks > gpus:
        raise LaunchError(
            f"--ranks {ranks}, but this machine shows {gpus} GPUs",
            fix=f"Use --ranks {gpus}, or train.device=cpu." if gpus else "Use train.device=cpu.",
        )


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun sets for a rank of one machine, and a fair share of its cores."""
    share = max(len(os.sched_getaffinity(0)) // ranks, 1)
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(share)),
        "PYTHONUNBUFFERED": "1",
        # A crash inside native code then says where in Python it was.
        "PYTHONFAULTHANDLER": "1",
    }


def visible_gpus() -> int:
    """GPUs that a process started now would see, without asking the driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    devices = Path("/dev")
    return sum(bool(re.fullmatch(r"nvidia\d+", device.name)) for device in devices.iterdir())


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
