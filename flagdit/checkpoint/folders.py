"""Checkpoint folders of a run: which are complete, which may go, and how a finished one gets its name.

A folder is written as `.staging-…`. When every file in it and the folder itself are durable, it gets its name by one
atomic rename, and then its marker COMPLETE, which names the manifest, which names all files. A crash at any moment
leaves the checkpoint or none; an older one of the same step stands by as `.replaced-…` until the marker is durable.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flagdit.checkpoint.durable import FileRecord, hash_bytes, hash_file, sync, write_file
from flagdit.errors import CheckpointError
from flagdit.parallel.ranks import ALONE, Ranks

FORMAT = 1
MANIFEST, COMPLETE = "manifest.json", "COMPLETE"
TENSORS = ".safetensors"
STAGING, REPLACED, DAMAGED = ".staging-", ".replaced-", ".damaged"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of.

    Attributes:
        step: optimizer steps done.
        files: path inside the folder → size and hash, of all files but this one and the marker.
        validation: held-out loss at this step, if it was measured.
        fingerprints: group → fingerprint that its tensors had where they were converted from.
    """

    step: int
    files: dict[str, FileRecord]
    validation: float | None = None
    fingerprints: dict[str, str] | None = None

    def encode(self) -> bytes:
        return (json.dumps({"format": FORMAT, "hash": "xxh3_128", **asdict(self)}, indent=1) + "\n").encode()

    @classmethod
    def decode(cls, raw: bytes) -> Manifest:
        content: dict[str, Any] = json.loads(raw)
        del content["hash"], content["format"]
        files = {name: FileRecord(**record) for name, record in content.pop("files").items()}
        return cls(files=files, **content)

    def of_groups(self, groups: Collection[str] | None) -> dict[str, FileRecord]:
        """The files that are needed for some groups of tensors; None: all."""
        return {
            name: record
            for name, record in self.files.items()
            if groups is None or "/" not in name or name.partition("/")[0] in groups
        }


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def named_folders(run_dir: Path | str) -> list[tuple[int, Path]]:
    """(step, folder) of everything that is or was to be a checkpoint, oldest first."""
    root = Path(run_dir) / "checkpoints"
    found: dict[int, Path] = {}
    for path in root.glob(f"{REPLACED}step_*"):
        found[_step_of(path)] = path
    for path in root.glob("step_*"):
        if path.is_dir() and re.fullmatch(r"step_\d+", path.name):
            step = _step_of(path)
            # An older one of the same step counts until the new one has its marker.
            if step not in found or not read_manifest(path)[1]:
                found[step] = path
    return sorted(found.items())


def read_manifest(path: Path) -> tuple[Manifest | None, list[str]]:
    """The manifest, and what is wrong with it and with the sizes of the files it names."""
    try:
        raw = (path / MANIFEST).read_bytes()
        marker = (path / COMPLETE).read_bytes()
    except FileNotFoundError as error:
        return None, [f"{Path(error.filename).name} is missing"]
    except OSError as error:
        return None, [f"it cannot be read ({error})"]
    if marker != _marker(raw):
        return None, [f"{MANIFEST} is not the one that {COMPLETE} names"]
    format_ = json.loads(raw)["format"]
    if format_ != FORMAT:
        return None, [f"it has format {format_}, and this version of FlagDiT reads {FORMAT}"]
    manifest, faults = Manifest.decode(raw), []
    for name, record in manifest.files.items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size is None:
            faults.append(f"{name} is missing")
        elif size != record.bytes:
            faults.append(f"{name} has {size:,} bytes instead of {record.bytes:,}")
    return manifest, faults


def check(
    path: Path, groups: Collection[str] | None = None, *, hashes: bool = True, ranks: Ranks = ALONE
) -> tuple[Manifest | None, list[str]]:
    """The manifest of a checkpoint, and all that is wrong with it.

    Args:
        groups: of tensors that will be used; the files of others are not read. None: all.
        hashes: whether to read the files and compare their hashes.
        ranks: share the reading; all get the same answer.
    """
    manifest, faults = ranks.from_first(read_manifest(path) if ranks.is_first else None)
    if manifest is None or faults or not hashes:
        return manifest, faults
    by_size = sorted(manifest.of_groups(groups).items(), key=lambda item: -item[1].bytes)
    mine = []
    for name, record in by_size[ranks.rank :: ranks.world]:
        try:
            if hash_file(path / name) != record:
                mine.append(f"the content of {name} has changed since it was written")
        except OSError as error:
            mine.append(f"{name} cannot be read ({error.strerror})")
    return manifest, [fault for of_rank in ranks.from_all(mine) for fault in of_rank]


def finish(staging: Path, target: Path, manifest: Manifest) -> None:
    """Makes a written folder a checkpoint.

    Raises:
        OSError: it could not; the target is as it was before.
    """
    raw = manifest.encode()
    write_file(staging / MANIFEST, raw)
    # What the ranks wrote is durable. The rest is synced together: one after the other would be as many waits.
    for path in [*(path for path in staging.rglob("*") if path.suffix != TENSORS), staging]:
        sync(path)
    root = target.parent
    recover(root)
    aside = root / f"{REPLACED}{target.name}"
    if target.exists():
        os.rename(target, aside)
    try:
        os.rename(staging, target)
        sync(root)
        write_file(target / COMPLETE, _marker(raw))
        sync(target / COMPLETE)
        sync(target)
    except BaseException:
        if not staging.exists():
            os.rename(target, staging)
        recover(root)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def recover(root: Path) -> None:
    """Ends what a killed `finish` began: the newer of two checkpoints of one step stays if it is whole."""
    for aside in root.glob(f"{REPLACED}step_*"):
        target = root / aside.name.removeprefix(REPLACED)
        if not read_manifest(target)[1]:
            shutil.rmtree(aside, ignore_errors=True)
        else:
            if target.exists():
                remove(target)
            os.rename(aside, target)


def remove(path: Path) -> None:
    """Removes a checkpoint; renamed first, so that a kill half-way leaves a staging folder, not half a checkpoint."""
    doomed = path.with_name(f"{STAGING}{path.name}-removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def set_aside(damaged: Iterable[Path]) -> None:
    """Renames damaged checkpoints, so that they neither count as kept nor stand in the way."""
    for path in damaged:
        away = path.with_name(path.name.removeprefix(REPLACED) + DAMAGED)
        shutil.rmtree(away, ignore_errors=True)
        os.rename(path, away)


def clean(run_dir: Path | str) -> None:
    """Removes what killed processes left behind. Only for whoever holds the run's lock: nobody else is writing then."""
    root = Path(run_dir) / "checkpoints"
    for path in root.glob(f"{STAGING}*"):
        shutil.rmtree(path, ignore_errors=True)
    recover(root)


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay; what one rule keeps, another does not remove.

    Attributes:
        last: the newest so many; 0: all.
        every: those of steps that are multiples of it; 0: no rule.
        best: the so many with the lowest held-out loss.
    """

    last: int
    every: int = 0
    best: int = 0


def retention(run_dir: Path | str, keep: Keep) -> None:
    """Removes checkpoints that no rule keeps, and damaged ones that are older than all that count as newest. The newest
    complete one always stays.

    Raises:
        CheckpointError: a folder cannot be removed.
    """
    good = {step: (path, manifest) for step, path, manifest in manifests(run_dir)}
    if keep.last < 1 or len(good) <= keep.last:
        return
    newest = sorted(good)[-keep.last :]
    measured = {step: m.validation for step, (_, m) in good.items() if m.validation is not None}
    best = sorted(measured, key=lambda step: (measured[step], step))[: keep.best]
    kept = {*newest, *best, *(step for step in good if keep.every and step % keep.every == 0)}
    old = [path for step, (path, _) in good.items() if step not in kept]
    old += [path for step, path in named_folders(run_dir) if step not in good and step < newest[0]]
    old += [p for p in (Path(run_dir) / "checkpoints").glob(f"step_*{DAMAGED}") if _step_of(p) < newest[0]]
    try:
        for path in old:
            remove(path)
    except OSError as error:
        raise CheckpointError(
            f"an old checkpoint cannot be removed: {error.strerror}",
            where=str(path),
            fix="Make the run folder writable, or set checkpoint.keep=0.",
        ) from error


def complete(run_dir: Path | str) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints whose marker, manifest and sizes are right, oldest first."""
    return [(step, path) for step, path, _ in manifests(run_dir)]


def manifests(run_dir: Path | str) -> Iterator[tuple[int, Path, Manifest]]:
    """(step, folder, manifest) of the complete checkpoints, oldest first."""
    for step, path in named_folders(run_dir):
        manifest, faults = read_manifest(path)
        if manifest is not None and not faults:
            yield step, path, manifest


def _step_of(path: Path) -> int:
    match = re.search(r"step_(\d+)", path.name)
    assert match
    return int(match[1])


def _marker(manifest: bytes) -> bytes:
    return f"{hash_bytes(manifest)}\n".encode()
