"""Checkpoints: every rank writes what it holds, any mesh reads it, and no crash spoils it.

RUN/checkpoints/step_00001000/
    model/            a folder for each group of tensors: optimizer/, ema_0.9999/ …
        part_00000.safetensors …   what each rank wrote
        index.json                 where every rectangle of every tensor lies
    state.json        step and the rest of the state
    recipe.yaml …     documents
    manifest.json     size and hash of the files above
    COMPLETE          hash of manifest.json

Tensors are stored as rectangles of whole tensors, under the names and shapes of the plain model: nothing in a
checkpoint speaks of the mesh that wrote it. Nothing is pickled. `folders` keeps the promise about crashes.
"""

from __future__ import annotations

import json
import shutil
import uuid
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from flagdit.checkpoint.chunks import StoredTensors
from flagdit.checkpoint.dcp import WRITERS, Group, LoadPlans, Reader, SavePlans, Writer, parts_of
from flagdit.checkpoint.durable import hash_bytes, write_file
from flagdit.checkpoint.folders import (
    STAGING,
    Manifest,
    check,
    complete,
    finish,
    folder_name,
    named_folders,
    read_manifest,
    set_aside,
)
from flagdit.checkpoint.tensors import TensorSource
from flagdit.errors import CheckpointError
from flagdit.parallel.ranks import ALONE, Ranks
from flagdit.parallel.shards import Shard, whole_shards

STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been found sound.

    Attributes:
        path: its folder.
        step: optimizer steps done.
        state: what `save` was given.
        tensors: group → name → whole CPU tensor; a group is read from disk when it is asked for.
    """

    path: Path
    step: int
    state: dict[str, Any]
    tensors: Mapping[str, Mapping[str, Tensor]]


def save(
    run_dir: Path | str,
    step: int,
    groups: Mapping[str, Group | Mapping[str, Tensor]],
    state: dict[str, Any],
    *,
    documents: Mapping[str, str] | None = None,
    validation: float | None = None,
    fingerprints: dict[str, str] | None = None,
    files: int = 1,
    ranks: Ranks = ALONE,
) -> Path:
    """Writes a checkpoint; one of the same step is replaced. All ranks call it, with their own shards.

    Beside what the caller holds, at most four slabs (64 MiB) of tensors are in memory, or one tensor of a TensorSource.

    Args:
        run_dir: the run folder. Only one run may save into it at a time.
        step: optimizer steps done.
        groups: group → name → this rank's part of a tensor, on any device. A group may also be whole tensors or a
            TensorSource, in one process.
        state: anything that JSON can hold; rank 0's counts.
        documents: more files, by name.
        validation: held-out loss at this step, if it was measured.
        fingerprints: of groups whose tensors come from another checkpoint.
        files: into how many files each rank spreads a group.
        ranks: who saves.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: it could not be written; earlier checkpoints are as they were. All ranks raise it.
    """
    root = Path(run_dir) / "checkpoints"
    target = root / folder_name(step)
    staging = root / f"{STAGING}{step}-{ranks.from_first(uuid.uuid4().hex[:8])}"
    # Tensors that are read when they are written are read one at a time.
    writers = 1 if any(isinstance(named, TensorSource) for named in groups.values()) else WRITERS
    writer = Writer(staging, ranks.rank, list(groups), files, writers)

    def begin() -> None:
        for group in groups:
            (staging / group).mkdir(parents=True)

    def end() -> None:
        records = dict(writer.records)
        texts = {STATE: json.dumps({"step": step, "state": state}, indent=1) + "\n", **(documents or {})}
        for name, text in texts.items():
            records[name] = write_file(staging / name, text.encode())
        finish(staging, target, Manifest(step, records, validation, fingerprints))

    try:
        with _readable_errors(f"the checkpoint of step {step} could not be written", target):
            ranks.first(begin)
            parts = parts_of({group: _shards(named) for group, named in groups.items()})
            with _silent():
                dcp.save(
                    parts,
                    storage_writer=writer,
                    planner=SavePlans(),
                    process_group=ranks.group,
                    no_dist=ranks.world == 1,
                )
            ranks.first(end)
    finally:
        if ranks.is_first:
            shutil.rmtree(staging, ignore_errors=True)
    return target


def load_into(path: Path, groups: Mapping[str, Mapping[str, Shard]], ranks: Ranks = ALONE) -> None:
    """Fills shards with what a checkpoint holds, whoever saved it. All ranks call it, with their own shards.

    Beside the shards, at most one slab (64 MiB) of tensors is in memory.

    Args:
        path: of a checkpoint that has been found sound.
        groups: group → name → shard; all names that the checkpoint has, with the shapes that it has.

    Raises:
        CheckpointError: names or shapes differ (nothing has been written then), or a file cannot be read.
    """
    with _readable_errors("the checkpoint could not be loaded", path), _silent():
        dcp.load(
            parts_of(groups),
            storage_reader=Reader(path, list(groups)),
            planner=LoadPlans(),
            process_group=ranks.group,
            no_dist=ranks.world == 1,
        )


def load(path: Path | str, groups: Collection[str] | None = None, *, hashes: bool = True) -> Checkpoint:
    """A checkpoint after comparing every file that is needed with its hash.

    Args:
        path: the checkpoint's folder.
        groups: the groups of tensors that will be used; None: all. Others are neither verified nor offered.
        hashes: false: compare sizes only.

    Raises:
        CheckpointError: it is incomplete or damaged, or has no such group.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {path}")
    manifest, faults = check(path, groups, hashes=hashes)
    if manifest is None or faults:
        raise _damaged(path, faults)
    return _opened(path, manifest, groups)


def newest(
    run_dir: Path | str,
    report: Callable[[str], None],
    *,
    hashes: bool = True,
    fall_back: bool = True,
    ranks: Ranks = ALONE,
) -> Checkpoint | None:
    """The newest sound checkpoint, for the run that will go on saving. All ranks call it and share the reading.

    Damaged ones are set aside as `step_….damaged`.

    Args:
        run_dir: the run folder.
        report: told about every damaged checkpoint.
        hashes: whether to read the files and compare their hashes; false: sizes only.
        fall_back: whether an older checkpoint may take a damaged one's place.

    Returns:
        None when the run has no checkpoints.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged; or the newest is, and none may take its place.
    """
    bad: list[Path] = []
    for _, path in reversed(ranks.first(lambda: named_folders(run_dir))):
        manifest, faults = check(path, hashes=hashes, ranks=ranks)
        if manifest is not None and not faults:
            ranks.first(lambda: set_aside(bad))
            return _opened(path, manifest, None)
        error = _damaged(path, faults)
        if not fall_back:
            error.fix = "Restore it from a copy, or set checkpoint.fall_back=true to continue from the one before."
            raise CheckpointError(error.what, where=str(path), fix=error.fix)
        bad.append(path)
        report(f"damaged checkpoint left out: {error}")
    if bad:
        raise CheckpointError(
            f"none of the {len(bad)} checkpoints can be read",
            where=str(bad[0].parent),
            fix="Restore one from a copy, or remove the run folder to start afresh.",
        )
    return None


def latest(run_dir: Path | str) -> Path | None:
    """The newest checkpoint that is complete by its marker, manifest and sizes; None when there is none."""
    return next((path for _, path in reversed(complete(run_dir))), None)


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


def open_group(path: Path | str, group: str) -> TensorSource:
    """A group's tensors, read one at a time from a checkpoint that `load` has found sound."""
    return StoredTensors(Path(path) / group)


def fingerprint(path: Path | str, group: str) -> str:
    """Tells the tensors of one group from any others.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    manifest, faults = read_manifest(Path(path))
    if manifest is None:
        raise _damaged(Path(path), faults)
    if manifest.fingerprints and group in manifest.fingerprints:
        return manifest.fingerprints[group]
    files = sorted((name, record.xxh3) for name, record in manifest.files.items() if name.startswith(f"{group}/"))
    return hash_bytes(json.dumps(files).encode())


class _Groups(Mapping[str, Mapping[str, Tensor]]):
    """Groups that are read when asked for."""

    def __init__(self, path: Path, names: list[str]):
        self._path, self._names = path, names

    def __getitem__(self, group: str) -> dict[str, Tensor]:
        if group not in self._names:
            raise CheckpointError(
                f"the checkpoint has no tensors {group!r}, only {', '.join(self._names)}", where=str(self._path)
            )
        return dict(open_group(self._path, group).items())

    def __contains__(self, group: object) -> bool:
        return group in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _opened(path: Path, manifest: Manifest, groups: Collection[str] | None) -> Checkpoint:
    present = dict.fromkeys(name.partition("/")[0] for name in manifest.files if "/" in name)
    wanted = [group for group in present if groups is None or group in groups]
    record = json.loads((path / STATE).read_text())
    return Checkpoint(path, record["step"], record["state"], _Groups(path, wanted))


def _shards(named: Group | Mapping[str, Tensor]) -> Group:
    if isinstance(named, TensorSource):
        return named
    if all(isinstance(value, Shard) for value in named.values()):
        return named  # type: ignore[return-value]
    return whole_shards(named)  # type: ignore[arg-type]


def _damaged(path: Path, faults: list[str]) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint is damaged: {'; '.join(faults)}",
        where=str(path),
        fix="Use another checkpoint of the run, or restore this one from a copy.",
    )


@contextmanager
def _silent() -> Iterator[None]:
    """A process that saves alone means to.

    The filter stays: taking it back from a thread that saves would race with the warnings of the thread that trains.
    """
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
    yield


@contextmanager
def _readable_errors(what: str, where: Path) -> Iterator[None]:
    """Turns what the disk or another rank's disk answered into an error that a person can act on."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        if not isinstance(cause, (OSError, SafetensorError)):
            raise cause from error
        raise _unwritten(what, where, cause, f" (rank {rank})" if rank else "") from error
    except (OSError, SafetensorError) as error:
        raise _unwritten(what, where, error) from error


def _unwritten(what: str, where: Path, cause: Exception, who: str = "") -> CheckpointError:
    why = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
    return CheckpointError(
        f"{what}: {why}{who}",
        where=str(where),
        fix="Earlier checkpoints are as they were. Free space or choose another run_dir, then start again.",
    )
