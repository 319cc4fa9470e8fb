"""Checkpoints that a crash cannot spoil.

    RUN/checkpoints/step_00001000/
        model.safetensors  optimizer.safetensors  ema_0.9999.safetensors  one file per group of tensors
        state.json                                                      counters, as the trainer gave them
        manifest.json                                                   size and sha256 of every file above

A checkpoint is written into a staging folder, every file is flushed to disk, the manifest is written last, and one
rename makes it visible. A folder without a manifest that fits its files is not a checkpoint. Nothing is ever pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flagdit.errors import CheckpointError

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
STATE = "state.json"
STAGING = ".staging-"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        step: optimizer steps done.
        tensors: group → name → tensor, on the CPU.
        state: what the trainer gave, as JSON values.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save(run_dir: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
    """Writes a checkpoint, all or nothing.

    A complete checkpoint of that step is kept as it is: a run has one state per step.

    Args:
        run_dir: the run folder.
        step: optimizer steps done.
        tensors: group → name → tensor; a group becomes one file.
        state: JSON values.

    Raises:
        CheckpointError: the disk is full or cannot be written. What was there before is untouched.
    """
    folder = run_dir / FOLDER
    final = folder / f"step_{step:08d}"
    if final.exists() and not damage(final, hashes=True):
        return final
    staging = folder / f"{STAGING}{final.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_staging(folder)
        staging.mkdir()
        for group, named in tensors.items():
            save_file({name: _plain(t) for name, t in named.items()}, staging / f"{group}.safetensors")
        (staging / STATE).write_text(json.dumps({**state, "step": step}, indent=1))
        files = sorted(staging.iterdir())
        manifest = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}
        for path in files:
            _flush(path)
        (staging / MANIFEST).write_text(json.dumps({"step": step, "files": manifest}, indent=1))
        _flush(staging / MANIFEST)
        _flush(staging)
        if final.exists():  # damaged: it makes way only now, when its successor is on disk
            final.rename(folder / f"{STAGING}damaged-{final.name}")
        staging.rename(final)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written: {error}",
            where=str(folder),
            fix="Earlier checkpoints are untouched. Make room on the disk (or lower checkpoint.keep), then start the "
            "same command again.",
        ) from error
    _remove_staging(folder)
    return final


def latest(run_dir: Path) -> Path | None:
    """The newest checkpoint whose manifest fits its files by name and size; None when there is none."""
    whole = [path for path in all_checkpoints(run_dir) if not damage(path, hashes=False)]
    return whole[-1] if whole else None


def load_latest(run_dir: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole, hashes included.

    Args:
        report: told about every damaged checkpoint that is passed over.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged.
    """
    found = all_checkpoints(run_dir)
    for path in reversed(found):
        problem = damage(path, hashes=True)
        if not problem:
            return load(path, verified=True)
        report(f"{path} is passed over: {problem}")
    if found:
        raise CheckpointError(
            "every checkpoint of this run is damaged",
            where=str(run_dir / FOLDER),
            fix="Restore one from a backup, or remove the folder to start afresh.",
        )
    return None


def load(path: Path, *, verified: bool = False) -> Checkpoint:
    """Reads a whole checkpoint after checking every file's hash.

    Args:
        path: the checkpoint's folder.
        verified: the hashes were just checked.

    Raises:
        CheckpointError: it is damaged.
    """
    problem = None if verified else damage(path, hashes=True)
    if problem:
        raise CheckpointError(f"the checkpoint is damaged: {problem}", where=str(path), fix="Use another one.")
    groups = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    state = json.loads((path / STATE).read_text())
    return Checkpoint(state.pop("step"), groups, state)


def load_group(path: Path, group: str) -> dict[str, Tensor]:
    """One group of tensors, such as an average of the weights, after checking its file's hash.

    Raises:
        CheckpointError: there is no such group, or its file is damaged.
    """
    name = f"{group}.safetensors"
    files = _manifest(path)
    if name not in files:
        groups = [Path(f).stem for f in files if f.endswith(".safetensors")]
        raise CheckpointError(f"there is no {group}", where=str(path), fix=f"It holds {', '.join(groups)}.")
    problem = _file_damage(path / name, files[name], hashes=True)
    if problem:
        raise CheckpointError(f"the checkpoint is damaged: {problem}", where=str(path), fix="Use another one.")
    return load_file(path / name)


def all_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders from the oldest to the newest, damaged ones included."""
    return sorted((run_dir / FOLDER).glob("step_*"))


def retention(run_dir: Path, keep: int) -> None:
    """Removes all but the newest `keep` whole checkpoints; 0 keeps all. Damaged ones are left for a person to see."""
    if keep:
        whole = [path for path in all_checkpoints(run_dir) if not damage(path, hashes=False)]
        for path in whole[:-keep]:
            # Without its manifest it is no checkpoint any more, even if the removal is cut short.
            (path / MANIFEST).unlink()
            shutil.rmtree(path, ignore_errors=True)


def damage(path: Path, *, hashes: bool) -> str | None:
    """What is wrong with a checkpoint folder; None when it is whole.

    Args:
        hashes: read every byte; otherwise only names and sizes are compared.
    """
    try:
        files = _manifest(path)
    except CheckpointError as error:
        return error.what
    if STATE not in files:
        return f"the manifest has no {STATE}"
    for name, wanted in files.items():
        problem = _file_damage(path / name, wanted, hashes)
        if problem:
            return problem
    return None


def _manifest(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_dir():
        raise CheckpointError("there is no checkpoint", where=str(path))
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        assert all(Path(name).name == name and {"bytes", "sha256"} <= wanted.keys() for name, wanted in files.items())
        return files
    except FileNotFoundError:
        raise CheckpointError(f"{MANIFEST} is missing, so it was not finished", where=str(path)) from None
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise CheckpointError(f"{MANIFEST} cannot be read", where=str(path)) from None


def _file_damage(path: Path, wanted: Mapping[str, Any], hashes: bool) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    size = path.stat().st_size
    if size != wanted["bytes"]:
        return f"{path.name} has {size} bytes instead of {wanted['bytes']}"
    if hashes and _sha256(path) != wanted["sha256"]:
        return f"{path.name} does not have the sha256 of the manifest"
    return None


def _plain(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, and alone in its storage, as safetensors wants it."""
    tensor = tensor.detach().to("cpu", memory_format=torch.contiguous_format).contiguous()
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone()


def _remove_staging(folder: Path) -> None:
    for left in folder.glob(f"{STAGING}*"):
        shutil.rmtree(left, ignore_errors=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
