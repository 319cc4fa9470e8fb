"""Checkpoints on disk: written aside, made durable, then put in place by one atomic rename.

RUN/checkpoints/step_00001000/
    model.safetensors …   one file per group of tensors
    state.json            step and the rest of the state
    manifest.json         size and SHA-256 of the files above
    COMPLETE              SHA-256 of manifest.json

A folder is written as `.staging-…`, every file and the folder itself are fsynced, and only then does it get its name,
so that a crash or a full disk at any moment leaves either the whole checkpoint or none. COMPLETE guards against what a
rename cannot: folders copied by hand and stopped half-way. Nothing is ever pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flagdit.checkpoint.safetensors_files import SafetensorsFiles, write_file
from flagdit.checkpoint.tensors import TensorSource
from flagdit.errors import CheckpointError

FORMAT = 1
STATE, MANIFEST, COMPLETE = "state.json", "manifest.json", "COMPLETE"
TENSORS = ".safetensors"
STAGING = ".staging-"
DAMAGED = ".damaged"
CHUNK = 1 << 22


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been read and verified.

    Attributes:
        path: its folder.
        step: optimizer steps done.
        tensors: group → name → CPU tensor; a group is read from disk when it is asked for.
        state: what `save` was given.
    """

    path: Path
    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: dict[str, Any]


Group = Mapping[str, Tensor] | TensorSource


def save(run_dir: Path | str, step: int, tensors: Mapping[str, Group], state: dict[str, Any]) -> Path:
    """Writes a checkpoint; one of the same step is replaced.

    Args:
        run_dir: the run folder. Only one process may save into it at a time.
        step: optimizer steps done.
        tensors: group → name → tensor, on any device; views and shared tensors are stored as tensors of their own.
            A group may be a TensorSource, which is read and written one tensor at a time.
        state: anything that JSON can hold.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: it could not be written; earlier checkpoints are as they were.
    """
    root = Path(run_dir) / "checkpoints"
    target = root / folder_name(step)
    staging = root / f"{STAGING}{step}-{uuid.uuid4().hex[:8]}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        clean(run_dir)
        staging.mkdir()
        files = {}
        for group, named in tensors.items():
            files[group + TENSORS] = _write_tensors(staging / (group + TENSORS), named)
        files[STATE] = _write_json(staging / STATE, {"format": FORMAT, "step": step, "state": state})
        manifest = _write_json(staging / MANIFEST, {"format": FORMAT, "step": step, "files": files})
        _write(staging / COMPLETE, (manifest["sha256"] + "\n").encode())
        _sync(staging)
        _put_in_place(staging, target)
        _sync(root)
    except (OSError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written: {why}",
            where=str(target),
            fix="Earlier checkpoints are as they were. Free space or choose another run_dir, then start again.",
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def latest(run_dir: Path | str) -> Path | None:
    """The newest complete checkpoint, judged by its manifest and the sizes of its files; None when there is none."""
    return next((path for _, path in reversed(complete(run_dir))), None)


def complete(run_dir: Path | str) -> list[tuple[int, Path]]:
    """(step, folder) of the complete checkpoints, oldest first."""
    return [(step, path) for step, path in _folders(run_dir) if not _read_manifest(path)[1]]


def load(path: Path | str, groups: Collection[str] | None = None) -> Checkpoint:
    """Reads a checkpoint and compares every file that is needed with its SHA-256.

    Args:
        path: the checkpoint's folder.
        groups: the groups of tensors that will be used; None: all. Others are neither verified nor offered.

    Raises:
        CheckpointError: it is incomplete or damaged, or has no such group.
    """
    path = Path(path)
    manifest = _verified_manifest(path, groups)
    record = json.loads((path / STATE).read_text())
    if record["format"] != FORMAT:
        raise CheckpointError(
            f"the checkpoint has format {record['format']}, this version reads {FORMAT}",
            where=str(path),
            fix="Use the version of FlagDiT that wrote it.",
        )
    present = [name.removesuffix(TENSORS) for name in manifest["files"] if name.endswith(TENSORS)]
    wanted = present if groups is None else [group for group in present if group in groups]
    return Checkpoint(path, record["step"], _Groups(path, wanted), record["state"])


def open_group(path: Path | str, group: str) -> TensorSource:
    """A group's tensors, read one at a time from a checkpoint that `load` has verified."""
    return SafetensorsFiles(Path(path) / (group + TENSORS))


def fingerprint(path: Path | str, group: str) -> str:
    """Tells the tensors of one group from any others."""
    return json.loads((Path(path) / MANIFEST).read_text())["files"][group + TENSORS]["sha256"]


def load_latest(run_dir: Path | str, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that can be read whole, for the process that will go on saving into the run.

    Damaged ones are set aside as `step_….damaged`, so that they neither count as kept nor stand in the way.

    Args:
        run_dir: the run folder.
        report: told about every damaged checkpoint.

    Returns:
        None when the run has no checkpoints.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    damaged = []
    for _, path in reversed(_folders(run_dir)):
        try:
            found = load(path)
        except CheckpointError as error:
            damaged.append(path)
            report(f"damaged checkpoint left out: {error}")
            continue
        for bad in damaged:
            shutil.rmtree(bad.with_name(bad.name + DAMAGED), ignore_errors=True)
            os.rename(bad, bad.with_name(bad.name + DAMAGED))
        return found
    if damaged:
        raise CheckpointError(
            f"none of the {len(damaged)} checkpoints can be read",
            where=str(damaged[0].parent),
            fix="Restore one from a copy, or remove the run folder to start afresh.",
        )
    return None


def find(run_dir: Path | str, step: int | None = None) -> Path:
    """The checkpoint of a step, or the newest, for reading.

    Raises:
        CheckpointError: there is no run, or no such checkpoint in it.
    """
    run = Path(run_dir)
    if not run.is_dir():
        raise CheckpointError(f"there is no run folder {run}", fix="Give the folder of a run, such as runs/quickstart.")
    there = dict(complete(run))
    if not there:
        raise CheckpointError(
            f"{run} has no complete checkpoint",
            fix="Give the folder of a run that has saved one (checkpoint.every says when), such as runs/quickstart.",
        )
    if step is None:
        return there[max(there)]
    if step not in there:
        raise CheckpointError(
            f"{run} has no complete checkpoint of step {step}",
            fix=f"There are checkpoints of steps {', '.join(map(str, there))}.",
        )
    return there[step]


def verify(path: Path | str) -> None:
    """Compares every file of a checkpoint with its size and SHA-256.

    Raises:
        CheckpointError: lists all files that are missing, damaged or of another size.
    """
    _verified_manifest(Path(path), None)


def retention(run_dir: Path | str, keep: int) -> None:
    """Removes the checkpoints before the `keep` newest complete ones; 0 keeps all. The newest complete one always
    stays.

    Raises:
        CheckpointError: a folder cannot be removed.
    """
    good = complete(run_dir)
    if keep < 1 or len(good) <= keep:
        return
    oldest_kept = good[-keep][0]
    try:
        for step, path in _folders(run_dir):
            if step < oldest_kept:
                # Renamed first: a kill half-way leaves a staging folder, not half a checkpoint.
                doomed = path.with_name(f"{STAGING}{step}-removed")
                os.rename(path, doomed)
                shutil.rmtree(doomed)
    except OSError as error:
        raise CheckpointError(
            f"an old checkpoint cannot be removed: {error.strerror}",
            where=str(path),
            fix="Make the run folder writable, or set checkpoint.keep=0.",
        ) from error


def clean(run_dir: Path | str) -> None:
    """Removes what killed processes left behind."""
    for path in (Path(run_dir) / "checkpoints").glob(f"{STAGING}*"):
        shutil.rmtree(path, ignore_errors=True)


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


class _Groups(Mapping[str, Mapping[str, Tensor]]):
    """Tensor files that are read when asked for."""

    def __init__(self, path: Path, names: list[str]):
        self._path, self._names = path, names

    def __getitem__(self, group: str) -> dict[str, Tensor]:
        if group not in self._names:
            raise CheckpointError(
                f"the checkpoint has no tensors {group!r}, only {', '.join(self._names)}", where=str(self._path)
            )
        return load_file(self._path / (group + TENSORS))

    def __contains__(self, group: object) -> bool:
        return group in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _folders(run_dir: Path | str) -> list[tuple[int, Path]]:
    """(step, folder) of everything named like a checkpoint, oldest first."""
    root = Path(run_dir) / "checkpoints"
    named = [(re.fullmatch(r"step_(\d+)", p.name), p) for p in root.glob("step_*") if p.is_dir()]
    return sorted((int(match[1]), path) for match, path in named if match)


def _read_manifest(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The manifest, and what is wrong with it and with the sizes of the files it names."""
    try:
        raw = (path / MANIFEST).read_bytes()
        marker = (path / COMPLETE).read_text().strip()
    except FileNotFoundError as error:
        return {}, [f"{Path(error.filename).name} is missing"]
    except (OSError, UnicodeDecodeError) as error:
        return {}, [f"it cannot be read ({error})"]
    if hashlib.sha256(raw).hexdigest() != marker:
        return {}, [f"{MANIFEST} is not the one that {COMPLETE} names"]
    manifest = json.loads(raw)
    faults = []
    for name, entry in manifest["files"].items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size is None:
            faults.append(f"{name} is missing")
        elif size != entry["bytes"]:
            faults.append(f"{name} has {size:,} bytes instead of {entry['bytes']:,}")
    return manifest, faults


def _verified_manifest(path: Path, groups: Collection[str] | None) -> dict[str, Any]:
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {path}")
    manifest, faults = _read_manifest(path)
    if not faults:
        for name, entry in manifest["files"].items():
            needed = groups is None or not name.endswith(TENSORS) or name.removesuffix(TENSORS) in groups
            try:
                if needed and _hash(path / name) != entry["sha256"]:
                    faults.append(f"the content of {name} has changed since it was written")
            except OSError as error:
                faults.append(f"{name} cannot be read ({error.strerror})")
    if faults:
        raise CheckpointError(
            f"the checkpoint is damaged: {'; '.join(faults)}",
            where=str(path),
            fix="Use another checkpoint of the run, or restore this one from a copy.",
        )
    return manifest


def _put_in_place(staging: Path, target: Path) -> None:
    """Gives a finished folder its name; an older checkpoint of that name makes room and comes back on failure."""
    if not target.exists():
        os.rename(staging, target)
        return
    aside = target.with_name(f"{STAGING}{target.name}-replaced")
    os.rename(target, aside)
    try:
        os.rename(staging, target)
    except OSError:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _write_tensors(file: Path, named: Group) -> dict[str, Any]:
    """Writes one group durably; returns its line of the manifest."""
    if isinstance(named, TensorSource):
        return write_file(file, named)
    own: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in named.items():
        tensor = tensor.detach().to("cpu").contiguous()
        storage = tensor.untyped_storage()
        # safetensors refuses tensors that share memory, and would store the whole of a view's memory.
        if storage.data_ptr() in storages or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        own[name] = tensor
    save_file(own, file, metadata={"format": "pt"})
    _sync(file)
    return {"bytes": file.stat().st_size, "sha256": _hash(file)}


def _write_json(file: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Writes JSON durably; returns its line of the manifest."""
    raw = (json.dumps(content, indent=1) + "\n").encode()
    _write(file, raw)
    return {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}


def _write(file: Path, raw: bytes) -> None:
    file.write_bytes(raw)
    _sync(file)


def _sync(path: Path) -> None:
    """Makes a file or a folder's entries durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hash(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as f:
        while chunk := f.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
