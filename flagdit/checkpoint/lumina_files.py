"""Folders of the official code: `consolidated[_ema].{mp:02d}-of-{MP:02d}.{pth,safetensors}` and `model_args.pth`.

Each file is one rank's part of the model-parallel split. Parts are joined as they are read, and written side by side,
so that no more than one tensor is in memory.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flagdit.checkpoint.lumina import PAD_TOKEN, split_dim
from flagdit.checkpoint.pth import PthFile
from flagdit.checkpoint.safetensors_files import Advance, SafetensorsFiles, SafetensorsWriter
from flagdit.checkpoint.tensors import Entry, TensorSource, in_order
from flagdit.errors import CheckpointError

FILE = re.compile(r"(consolidated(?:_ema)?)\.(\d+)-of-(\d+)\.(pth|safetensors)")
ARGUMENTS = "model_args.pth"
EMA, RAW = "consolidated_ema", "consolidated"
RANK = "model_parallel_rank"


class Joined(TensorSource):
    """Parts of all ranks as whole tensors.

    Args:
        parts: in the order of the ranks.
        where: for errors.

    Raises:
        CheckpointError: the parts have different tensors, or shapes that cannot be joined.
    """

    def __init__(self, parts: list[TensorSource], where: Path):
        self._parts, self._where = parts, where
        first = parts[0].entries
        for rank, part in enumerate(parts[1:], start=1):
            odd = sorted(first.keys() ^ part.entries.keys())
            odd += [n for n in first.keys() & part.entries.keys() if first[n] != part.entries[n]]
            if odd:
                raise CheckpointError(
                    f"parts 0 and {rank} do not belong together: they differ in {', '.join(odd[:12])}", where=str(where)
                )
        self.entries = {name: self._whole(name, entry) for name, entry in first.items()}

    def _whole(self, name: str, entry: Entry) -> Entry:
        dim = split_dim(name)
        if dim is None or len(self._parts) == 1:
            return entry
        if len(entry.shape) <= dim:
            raise CheckpointError(f"{name} has the shape {entry.shape}, which is never split", where=str(self._where))
        shape = list(entry.shape)
        shape[dim] *= len(self._parts)
        return Entry(tuple(shape), entry.dtype)

    def read(self, name: str) -> Tensor:
        tensors = [part.read(name) for part in self._parts]
        if len(tensors) == 1:
            return tensors[0]
        dim = split_dim(name)
        if dim is not None:
            return torch.cat(tensors, dim)
        # Padding is drawn by every rank alone and read by none of ours.
        if name != PAD_TOKEN and not all(same_bits(tensors[0], other) for other in tensors[1:]):
            raise CheckpointError(
                f"the parts belong to different checkpoints: {name}, which all ranks share, differs",
                where=str(self._where),
                fix="Take all parts from one folder as it was saved.",
            )
        return tensors[0]


def open_official(folder: Path, weights: str | None) -> Joined:
    """The whole tensors of an official folder.

    Args:
        folder: with one set of parts, or two: averaged and raw.
        weights: ema or raw; None: the average where there is one.

    Raises:
        CheckpointError: no parts, missing or surplus ones, parts out of place, or a part that cannot be read.
    """
    kinds: dict[str, dict[tuple[int, int, str], Path]] = {}
    for file in sorted(folder.iterdir()):
        if match := FILE.fullmatch(file.name):
            kinds.setdefault(match[1], {})[int(match[2]), int(match[3]), match[4]] = file
    stem = {"ema": EMA, "raw": RAW, None: EMA if EMA in kinds else RAW}[weights]
    if stem not in kinds:
        there = ", ".join(f"{kind}.*" for kind in kinds) or "none"
        raise CheckpointError(f"there is no {stem}.00-of-NN file here (there is: {there})", where=str(folder))
    files = _complete(kinds[stem], stem, folder)
    parts: list[TensorSource] = [_open_part(file, rank, len(files)) for rank, file in enumerate(files)]
    return Joined(parts, folder)


def _complete(found: Mapping[tuple[int, int, str], Path], stem: str, folder: Path) -> list[Path]:
    """The files of all ranks in order; safetensors where both kinds are there."""
    totals = sorted({total for _, total, _ in found})
    if len(totals) > 1:
        raise CheckpointError(
            f"{stem} is split into {' and into '.join(map(str, totals))} parts here",
            where=str(folder),
            fix="Keep the parts of one split in the folder.",
        )
    (total,) = totals
    for ending in ("safetensors", "pth"):
        files = {rank: file for (rank, _, kind), file in found.items() if kind == ending}
        if not files:
            continue
        missing = [f"{stem}.{rank:02d}-of-{total:02d}.{ending}" for rank in range(total) if rank not in files]
        surplus = [file.name for rank, file in files.items() if rank >= total]
        if missing or surplus or not total:
            what = f"missing {', '.join(missing)}" if missing else f"too many parts: {', '.join(surplus)}"
            raise CheckpointError(what, where=str(folder), fix="Copy all parts, as they were saved, into the folder.")
        return [files[rank] for rank in range(total)]
    raise AssertionError("the pattern knows two endings")


def _open_part(file: Path, rank: int, total: int) -> TensorSource:
    """One part, if nothing in it says that it is another rank's."""
    if file.suffix == ".pth":
        part = PthFile(file)
        saved = FILE.fullmatch(part.saved_as + file.suffix)
        place = (int(saved[2]), int(saved[3])) if saved else None
        source: TensorSource = part
    else:
        source = SafetensorsFiles(file)
        said = re.fullmatch(r"(\d+) of (\d+)", source.metadata.get(RANK, ""))
        place = (int(said[1]), int(said[2])) if said else None
    if place not in (None, (rank, total)):
        raise CheckpointError(
            f"this was saved as part {place[0]} of {place[1]}, but its name says {rank} of {total}",
            where=str(file),
            fix="Give the parts back the names under which they were saved.",
        )
    return source


def write_official(
    folder: Path, source: TensorSource, parts: int, stem: str, advance: Advance | None = None
) -> dict[str, dict[str, Any]]:
    """Writes official tensors as the parts of `parts` model-parallel ranks.

    Returns:
        File name → size and SHA-256.

    Raises:
        CheckpointError: a tensor cannot be split so.
    """
    names = in_order(source)
    entries = {name: _part_entry(name, source.entries[name], parts) for name in names}
    records = {}
    with ExitStack() as stack:
        writers = {}
        for rank in range(parts):
            file = f"{stem}.{rank:02d}-of-{parts:02d}.safetensors"
            metadata = {RANK: f"{rank} of {parts}"}
            writers[file] = stack.enter_context(SafetensorsWriter(folder / file, entries, metadata))
        for name in names:
            tensor = source.read(name)
            dim = split_dim(name)
            pieces = [tensor] * parts if dim is None else tensor.chunk(parts, dim)
            for writer, piece in zip(writers.values(), pieces, strict=True):
                writer.write(name, piece)
            if advance:
                advance(source.entries[name].nbytes)
    records = {file: writer.record for file, writer in writers.items()}
    return records


def _part_entry(name: str, entry: Entry, parts: int) -> Entry:
    dim = split_dim(name)
    if dim is None:
        return entry
    if entry.shape[dim] % parts:
        raise CheckpointError(
            f"{name} of {entry.shape} cannot be split into {parts} parts",
            where="--parts",
            fix="Give a number that divides the heads and key/value heads of the model.",
        )
    shape = list(entry.shape)
    shape[dim] //= parts
    return Entry(tuple(shape), entry.dtype)


def write_arguments(file: Path, values: Mapping[str, Any]) -> None:
    """Writes a `model_args.pth` as the official code reads it."""
    torch.save(argparse.Namespace(**values), file)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit; NaNs too."""
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
