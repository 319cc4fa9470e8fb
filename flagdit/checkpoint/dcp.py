"""torch.distributed.checkpoint on our files: it plans what is written and read; how that reaches the disk is here.

Every rank writes the rectangles that it holds into files of its own, one folder for each group of tensors; a rectangle
that several ranks hold is written by one of them, and the planner spreads these. Files are plain safetensors with the
header entries of `HuggingFaceStorageWriter`, so `HuggingFaceStorageReader(CHECKPOINT/GROUP)` reads them too. A file can
hold a name once: a tensor's second and third rectangle go to a second and third file.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from flagdit.checkpoint.chunks import INDEX, SLAB, Chunk, Index, Stored, index_bytes, opened, read_box, read_index
from flagdit.checkpoint.durable import DurableFile, FileRecord, sync, write_file
from flagdit.checkpoint.folders import TENSORS
from flagdit.checkpoint.safetensors_files import bytes_of, header_of
from flagdit.checkpoint.tensors import Entry, TensorSource
from flagdit.errors import CheckpointError
from flagdit.parallel.shards import Box, Shard

WRITERS = 4
"""Files that a process writes at once: several cores copy and hash, and fast disks have several queues."""
SEPARATOR = "/"
"""Between group and name of a tensor, in plans."""


class Parts:
    """A shard as the planner sees it: a list of rectangles, and their memory when its turn comes."""

    def __init__(self, shard: Shard):
        self.entry = Entry(shard.shape, shard.dtype)
        self.boxes = tuple(box for box, _ in shard.parts)
        self._memory = {box.offsets: memory for box, memory in shard.parts}

    def memory(self, offsets: tuple[int, ...]) -> Tensor:
        return self._memory[offsets]

    def __create_write_items__(self, fqn: str, parts: Any) -> list[WriteItem]:
        data = [
            TensorWriteData(chunk, TensorProperties(self.entry.dtype), torch.Size(self.entry.shape))
            for chunk in self.__create_chunk_list__()
        ]
        return [WriteItem(MetadataIndex(fqn, d.chunk.offsets), WriteItemType.SHARD, tensor_data=d) for d in data]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in self.boxes]


class FromSource(Parts):
    """A whole tensor that is read when it is written."""

    def __init__(self, source: TensorSource, name: str):
        self.entry = source.entries[name]
        self.boxes = (Box((0,) * len(self.entry.shape), self.entry.shape),)
        self._read = lambda: source.read(name)

    def memory(self, offsets: tuple[int, ...]) -> Tensor:
        return self._read()


Group = Mapping[str, Shard] | TensorSource


def parts_of(groups: Mapping[str, Group]) -> dict[str, Parts]:
    """What the planner gets: GROUP/NAME → rectangles."""
    found: dict[str, Parts] = {}
    for group, named in groups.items():
        if isinstance(named, TensorSource):
            found |= {f"{group}{SEPARATOR}{name}": FromSource(named, name) for name in named.entries}
        else:
            found |= {f"{group}{SEPARATOR}{name}": Parts(shard) for name, shard in named.items()}
    return found


class SavePlans(DefaultSavePlanner):
    """Plans the writing of `Parts`."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.state_dict[index.fqn].memory(tuple(index.offset))


class LoadPlans(DefaultLoadPlanner):
    """Plans the reading into `Parts`."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        saved = {
            fqn: tuple(known.size)
            for fqn, known in self.metadata.state_dict_metadata.items()
            if isinstance(known, TensorStorageMetadata)
        }
        _check_names({fqn: parts.entry.shape for fqn, parts in self.state_dict.items()}, saved)
        plan = super().create_local_plan()
        wanted = sum(box.numel for parts in self.state_dict.values() for box in parts.boxes)
        found = sum(math.prod(item.lengths) for item in plan.items)
        if found != wanted:
            raise CheckpointError(f"the checkpoint's rectangles cover {found:,} of {wanted:,} elements")
        return plan

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.state_dict[index.fqn].memory(tuple(index.offset))


@dataclass(frozen=True)
class Written:
    """Where a rectangle went: the group's folder, the place in it, and the file's record."""

    group: str
    chunk: Chunk
    record: FileRecord


class Writer(StorageWriter):
    """Writes a rank's rectangles; on the rank that coordinates, the indexes too.

    Args:
        folder: of the checkpoint; the folders of its groups exist.
        rank: of this process.
        groups: names of all groups.
        files: into how many files this process spreads a group's tensors.
        writers: how many of them it writes at once.

    Attributes:
        records: path inside the folder → record, of all files of all ranks; on the coordinating rank, at the end.
    """

    def __init__(self, folder: Path, rank: int, groups: Sequence[str], files: int = 1, writers: int = WRITERS):
        self.records: dict[str, FileRecord] = {}
        self._folder, self._rank, self._groups, self._files, self._writers = folder, rank, groups, files, writers

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        places = self._by_file(plan)

        def write(place: tuple[str, str]) -> list[WriteResult]:
            group, file = place
            with DurableFile(self._folder / group / file) as durable:
                return list(_write_file(durable, group, file, places[place], planner))

        with ThreadPoolExecutor(self._writers) as pool:
            written = list(pool.map(write, places))
        # Only now waited for, so that the disk has had all of them to work on.
        for group, file in places:
            sync(self._folder / group / file)
        future: Future[list[WriteResult]] = Future()
        future.set_result([result for results in written for result in results])
        return future

    def _by_file(self, plan: SavePlan) -> dict[tuple[str, str], list[WriteItem]]:
        """(group, file) → rectangles; the largest of a tensor in the first file."""
        by_name: dict[str, list[WriteItem]] = defaultdict(list)
        for item in plan.items:
            by_name[item.index.fqn].append(item)
        found: dict[tuple[str, str], list[WriteItem]] = defaultdict(list)
        filled: dict[str, list[int]] = defaultdict(lambda: [0] * self._files)
        for fqn, items in by_name.items():
            group = fqn.partition(SEPARATOR)[0]
            place = filled[group].index(min(filled[group]))
            for level, item in enumerate(sorted(items, key=lambda item: -_entry(item).nbytes)):
                filled[group][place] += _entry(item).nbytes
                found[group, _file_name(self._rank + place, level)].append(item)
        return found

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        chunks: dict[str, list[Chunk]] = defaultdict(list)
        records: dict[str, dict[str, FileRecord]] = {group: {} for group in self._groups}
        for result in (result for of_rank in results for result in of_rank):
            written: Written = result.storage_data
            chunks[result.index.fqn].append(written.chunk)
            records[written.group][written.chunk.file] = written.record
        indexes: dict[str, Index] = {group: {} for group in self._groups}
        for fqn in sorted(chunks):
            known = metadata.state_dict_metadata[fqn]
            assert isinstance(known, TensorStorageMetadata)
            entry = Entry(tuple(known.size), known.properties.dtype)
            group, _, name = fqn.partition(SEPARATOR)
            indexes[group][name] = Stored(entry, tuple(sorted(chunks[fqn], key=lambda chunk: chunk.box.offsets)))
        for group, index in indexes.items():
            self.records |= {f"{group}/{file}": records[group][file] for file in sorted(records[group])}
            self.records[f"{group}/{INDEX}"] = write_file(self._folder / group / INDEX, index_bytes(index))

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def reset(self, checkpoint_id: Any = None) -> None: ...

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class Reader(StorageReader):
    """Reads rectangles of any shape out of a checkpoint.

    Args:
        folder: of the checkpoint.
        groups: that are wanted.
    """

    def __init__(self, folder: Path, groups: list[str]):
        self._folder, self._groups = folder, groups
        self._stored: dict[str, Stored] = {}

    def read_metadata(self) -> Metadata:
        for group in self._groups:
            for name, stored in read_index(self._folder / group).items():
                self._stored[f"{group}{SEPARATOR}{name}"] = stored
        known: dict[str, Any] = {
            fqn: TensorStorageMetadata(
                TensorProperties(stored.entry.dtype), torch.Size(stored.entry.shape), [_meta(c) for c in stored.chunks]
            )
            for fqn, stored in self._stored.items()
        }
        return Metadata(known)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file = defaultdict(list)
        for item in plan.items:
            stored, i = self._stored[item.storage_index.fqn], item.storage_index.index
            assert i is not None
            group = item.storage_index.fqn.partition(SEPARATOR)[0]
            by_file[self._folder / group / stored.chunks[i].file].append((item, stored.chunks[i], stored.entry.dtype))
        for path, wanted in by_file.items():
            with opened(path) as file:
                for item, chunk, dtype in wanted:
                    box = Box(tuple(item.storage_offsets), tuple(item.lengths)).moved(chunk.box.offsets)
                    read_box(file, chunk, dtype, box, planner.resolve_tensor(item))
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def reset(self, checkpoint_id: Any = None) -> None: ...

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _check_names(expected: Mapping[str, tuple[int, ...]], saved: Mapping[str, tuple[int, ...]]) -> None:
    missing, extra = sorted(expected.keys() - saved.keys()), sorted(saved.keys() - expected.keys())
    shapes = sorted(name for name in expected.keys() & saved.keys() if expected[name] != saved[name])
    if missing or extra or shapes:
        faults = [("missing", missing), ("not of this model", extra), ("of another shape", shapes)]
        told = "; ".join(f"{len(names)} {fault} ({', '.join(names[:3])})" for fault, names in faults if names)
        raise CheckpointError(
            f"the checkpoint's tensors do not fit this recipe: {told}",
            fix="Use the recipe that the run was started with.",
        )


def _write_file(
    file: DurableFile, group: str, name: str, items: list[WriteItem], planner: SavePlanner
) -> Iterator[WriteResult]:
    ordered = sorted(items, key=lambda item: -_entry(item).dtype.itemsize)  # wide ones first: all are aligned
    entries = {item.index.fqn.partition(SEPARATOR)[2]: _entry(item) for item in ordered}
    offsets = {
        entry: {"saved_offsets": list(item.index.offset or ())} for entry, item in zip(entries, ordered, strict=True)
    }
    file.write(header_of(entries, {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)}))
    places = {}
    for item in ordered:
        data = planner.resolve_data(item)
        assert isinstance(data, Tensor) and Entry.of(data) == _entry(item), item.index
        places[item.index] = file.size
        for slab in data.detach().contiguous().view(-1).split(max(SLAB // data.itemsize, 1)):
            file.write(bytes_of(slab.cpu()))
    for item in ordered:
        box = Box(tuple(item.index.offset or ()), _entry(item).shape)
        written = Written(group, Chunk(box, name, places[item.index]), file.record)
        yield WriteResult(item.index, _entry(item).nbytes, written)


def _file_name(number: int, level: int) -> str:
    return f"part_{number:05d}" + (f"_{level}" if level else "") + TENSORS


def _entry(item: WriteItem) -> Entry:
    data = item.tensor_data
    assert data is not None
    return Entry(tuple(data.chunk.sizes), data.properties.dtype)


def _meta(chunk: Chunk) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(chunk.box.offsets), torch.Size(chunk.box.sizes))
