"""A checkpoint in another number of files, whole or in part, and whether checkpoints are sound."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flagdit.checkpoint import store
from flagdit.checkpoint.folders import STAGING, check, folder_name, named_folders, read_manifest
from flagdit.checkpoint.progress import counted, progress
from flagdit.checkpoint.weights import load_run_recipe
from flagdit.config.load import save_recipe
from flagdit.errors import CheckpointError, RecipeError


def verify(run_dir: Path, step: int | None = None) -> dict[str, Any]:
    """Reads every file of a run's checkpoints and compares it with its hash. JSON-able.

    Args:
        step: of one checkpoint; None: all.

    Returns:
        `sound`: steps of the checkpoints that a run can be continued from; `damaged`: step → faults.

    Raises:
        CheckpointError: no run, or no such checkpoint.
    """
    load_run_recipe(run_dir)
    there = [(found, path) for found, path in named_folders(run_dir) if step in (None, found)]
    if not there:
        raise CheckpointError(
            "the run has no checkpoint" + (f" of step {step}" if step is not None else ""), where=str(run_dir)
        )
    damaged: dict[str, list[str]] = {}
    sound = []
    for found, path in there:
        faults = check(path)[1]
        if faults:
            damaged[str(found)] = faults
        else:
            sound.append(found)
    return {"sound": sound, "damaged": damaged}


def convert(run_dir: Path, out: Path, *, step: int | None, groups: Sequence[str], files: int) -> str:
    """Makes a run folder with one checkpoint of another, in other files: the same tensors, bit by bit.

    Reads and writes one tensor at a time.

    Args:
        run_dir: the run.
        out: run folder to make; must not exist.
        step: of the checkpoint; None: the newest.
        groups: tensors to take: model, optimizer, ema_…; none: all. A run can be continued from all of them only.
        files: how many files each group gets.

    Returns:
        What was written, for people.

    Raises:
        CheckpointError: no run, a damaged checkpoint, or a folder that exists or cannot be written.
        RecipeError: no such group.
    """
    if out.exists():
        raise CheckpointError("the folder exists", where=str(out), fix="Choose another one, or remove it.")
    recipe = load_run_recipe(run_dir)
    path = store.find(run_dir, step)
    checkpoint = store.load(path, groups or None)
    manifest, _ = read_manifest(path)
    assert manifest is not None
    if missing := [group for group in groups if group not in checkpoint.tensors]:
        there = dict.fromkeys(name.partition("/")[0] for name in manifest.files if "/" in name)
        raise RecipeError(f"the checkpoint has no group {', '.join(missing)}", fix=f"It has {', '.join(there)}.")
    sources = {group: store.open_group(path, group) for group in checkpoint.tensors}
    size = sum(source.nbytes for source in sources.values())
    documents = {name: (path / name).read_text() for name in manifest.files if "/" not in name and name != store.STATE}
    staging = out.with_name(f"{STAGING}{out.name}-{uuid.uuid4().hex[:8]}")
    try:
        staging.mkdir(parents=True)
        save_recipe(recipe, staging / "recipe.yaml")
        with progress("converting", size) as advance:
            store.save(
                staging,
                checkpoint.step,
                {group: counted(source, advance) for group, source in sources.items()},
                checkpoint.state,
                documents=documents,
                validation=manifest.validation,
                fingerprints={group: store.fingerprint(path, group) for group in sources},
                files=files,
            )
        os.rename(staging, out)
    except OSError as error:
        raise CheckpointError(f"the run cannot be written: {error.strerror}", where=str(out)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    written = out / "checkpoints" / folder_name(checkpoint.step)
    count = len(list(written.rglob("*.safetensors")))
    return f"{written}: {', '.join(sources)}; {size / 1e9:.2f} GB in {count} files"
