"""Safetensors files as a stream: read and written one tensor at a time, without mapping whole files into memory.

The library's own `save_file` wants every tensor at once, and its reader maps the file, so that all of a checkpoint
counts as resident in the end. The format is simple (8 bytes of header length, a JSON header, the data), and the library
still checks every file that is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flagdit.checkpoint.tensors import Derived, Entry, TensorSource, in_order
from flagdit.errors import CheckpointError

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH = {name: dtype for dtype, name in NAMES.items()}
METADATA = "__metadata__"

Advance = Callable[[int], None]
"""Told how many bytes have been written since the last call."""


class SafetensorsFiles(TensorSource):
    """The tensors of one or several files, whose names must not repeat.

    Raises:
        CheckpointError: a file is missing, truncated or otherwise not as its header says.
    """

    def __init__(self, *files: Path):
        self.metadata: dict[str, str] = {}
        self._place: dict[str, tuple[Path, int]] = {}
        entries: dict[str, Entry] = {}
        for file in files:
            header, start = read_header(file)
            self.metadata |= header.pop(METADATA, {})
            for name, spec in header.items():
                if name in entries:
                    raise CheckpointError(f"{name} is in {file.name} and in {self._place[name][0].name}")
                entries[name] = Entry(tuple(spec["shape"]), TORCH[spec["dtype"]])
                self._place[name] = file, start + spec["data_offsets"][0]
        self.entries = entries

    def read(self, name: str) -> Tensor:
        file, offset = self._place[name]
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        try:
            with file.open("rb", buffering=0) as f:
                f.seek(offset)
                into = bytes_of(tensor)
                while into:
                    count = f.readinto(into)
                    if not count:
                        raise CheckpointError(f"the file ends inside {name}", where=str(file))
                    into = into[count:]
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read: {error.strerror}", where=str(file)) from error
        return tensor


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a file that the library has found sound, and where the data begins.

    Raises:
        CheckpointError: the file is missing, truncated or damaged.
    """
    try:
        # Offsets that overlap, leave holes or reach past the end are refused here.
        with safe_open(file, "pt"):
            pass
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(length))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"this is not a whole safetensors file: {error}",
            where=str(file),
            fix="Copy or download it again.",
        ) from error
    unknown = sorted({spec["dtype"] for name, spec in header.items() if name != METADATA} - TORCH.keys())
    if unknown:
        raise CheckpointError(f"it holds tensors of type {', '.join(unknown)}, which cannot be read", where=str(file))
    return header, 8 + length


def header_of(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    """What a file begins with: where each tensor lies, in the order of `entries`, and texts."""
    header: dict[str, Any] = {METADATA: dict(sorted({"format": "pt", **metadata}.items()))}
    offset = 0
    for name, entry in entries.items():
        offsets = [offset, offset := offset + entry.nbytes]
        header[name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class SafetensorsWriter:
    """Writes one file; a context manager.

    The bytes are a function of names, dtypes, shapes, values and metadata alone.

    Args:
        file: to create.
        entries: all tensors, in the order in which `write` will be called.
        metadata: texts for the header.

    Attributes:
        record: the file's size and SHA-256, after the context has ended.
    """

    def __init__(self, file: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]):
        self.record: dict[str, Any] = {}
        self._digest = hashlib.sha256()
        self._left = list(entries)[::-1]
        self._entries = entries
        self._file = file.open("xb")
        self._put(header_of(entries, metadata))

    def write(self, name: str, tensor: Tensor) -> None:
        expected = self._left.pop()
        assert name == expected and Entry.of(tensor) == self._entries[name], f"{name} is not {expected}"
        self._put(bytes_of(tensor))

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        with self._file:
            if kind is None:
                assert not self._left, f"not written: {self._left}"
                self._file.flush()
                os.fsync(self._file.fileno())
                self.record = {"bytes": self._file.tell(), "sha256": self._digest.hexdigest()}

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)


def write_file(
    file: Path, source: TensorSource, metadata: Mapping[str, str] | None = None, advance: Advance | None = None
) -> dict[str, Any]:
    """Writes all tensors of a source into one file; returns its size and SHA-256."""
    names = in_order(source)
    with SafetensorsWriter(file, {name: source.entries[name] for name in names}, metadata or {}) as writer:
        for name in names:
            writer.write(name, source.read(name))
            if advance:
                advance(source.entries[name].nbytes)
    return writer.record


def write_sharded(
    folder: Path, stem: str, source: TensorSource, most_bytes: int, advance: Advance | None = None
) -> dict[str, dict[str, Any]]:
    """Writes `stem-00001-of-0000N.safetensors` and their index, as transformers and diffusers name them; a single file
    is called `stem.safetensors` and has no index.

    Returns:
        File name → size and SHA-256.
    """
    parts: list[list[str]] = [[]]
    filled = 0
    for name in in_order(source):
        size = source.entries[name].nbytes
        if parts[-1] and filled + size > most_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
    records: dict[str, dict[str, Any]] = {}
    weight_map: dict[str, str] = {}
    for i, names in enumerate(parts, start=1):
        file = f"{stem}.safetensors" if len(parts) == 1 else f"{stem}-{i:05d}-of-{len(parts):05d}.safetensors"
        part = Derived({name: source.entries[name] for name in names}, source.read)
        records[file] = write_file(folder / file, part, advance=advance)
        weight_map |= dict.fromkeys(names, file)
    if len(parts) > 1:
        index = {"metadata": {"total_size": source.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
        raw = (json.dumps(index, indent=2) + "\n").encode()
        (folder / f"{stem}.safetensors.index.json").write_bytes(raw)
        records[f"{stem}.safetensors.index.json"] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    return records


def open_sharded(folder: Path, stem: str) -> SafetensorsFiles:
    """What `write_sharded` wrote, here or by another library.

    Raises:
        CheckpointError: a file is missing or damaged, or the index and the files disagree.
    """
    single, index_file = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file() or not index_file.is_file():
        return SafetensorsFiles(single)
    try:
        weight_map: dict[str, str] = json.loads(index_file.read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the index cannot be read: {error}", where=str(index_file)) from error
    missing = [name for name in names if name not in outside and not (folder / name).is_file()]
    for what, those in (("names files outside its folder", outside), ("names files that are not there", missing)):
        if those:
            raise CheckpointError(f"the index {what}: {', '.join(those)}", where=str(index_file))
    source = SafetensorsFiles(*(folder / name for name in names))
    different = sorted(source.entries.keys() ^ weight_map.keys())
    if different:
        raise CheckpointError(
            f"the index and the files disagree about {', '.join(different[:12])}", where=str(index_file)
        )
    return source


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous copy of the tensor, or of itself."""
    flat: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)
