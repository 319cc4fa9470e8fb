"""A data set on disk: shards, an index of columns that is mapped rather than read, and `dataset.json`.

    OUT/dataset.json        what it is; written last, so its presence means that the data set is complete
    OUT/shards/*.tar        webdataset shards; each holds one split, so a split is a range of sample ids
    OUT/index/COLUMN.npy    one row a sample: where it stands, its size and its checksum
    OUT/null_text.npy       features of the empty caption (encoded data sets with text)
    OUT/quarantine.jsonl    samples that were left out, and why (when there are any)

Opening costs milliseconds at any size. Keys and captions of shards stay in the shards; the key column is there to
name samples in ledgers.

Shape legend
    C, F, H, W  channels, frames or views, rows, columns of a latent (or of pixels, in a raw data set)
    L, Y        tokens and width of text features
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flagdit.data_pipelines.remote import Cache, RemoteShards, is_remote, mirror
from flagdit.data_pipelines.shards import ShardReader, read_npy, split_members
from flagdit.errors import DataError

FORMAT = 2
INFO, BUILDING, QUARANTINE, NULL_TEXT = "dataset.json", "building.json", "quarantine.jsonl", "null_text.npy"
COLUMNS: dict[str, Any] = {
    "shard": np.int32,
    "offset": np.int64,
    "nbytes": np.int64,
    "xxh3": np.uint64,
    "shape": (np.int32, (4,)),
    "text_tokens": np.int32,
    "label": np.int32,
    "key": np.bytes_,
}
KINDS = {"raw": "pictures or other media that are not encoded", "encoded": "encoded latents"}


@dataclass(frozen=True)
class Encoded:
    """One sample as the model sees it."""

    sample_id: int
    key: str
    latent_CFHW: Tensor
    text_LY: Tensor | None
    caption: str
    label: int


def text_member(number: int) -> str:
    """Ending of the file with the features of a sample's number-th caption."""
    return f"text{number or ''}.npy"


def caption_of(members: Mapping[str, memoryview], turn: int) -> tuple[str, int]:
    """The caption of a sample's files whose turn it is, and its number; `turn` counts on beyond the last.

    Raises:
        KeyError, ValueError, TypeError, AttributeError: there is none.
    """
    caption, number = bytes(members["txt"]).decode(), 0
    if turn and b"captions" in (about := bytes(members["json"])):
        captions = [caption, *json.loads(about).get("captions", [])]
        number = turn % len(captions)
        caption = captions[number]
    return caption, number


class Dataset:
    """A complete data set. Picklable; workers open it again by its path.

    Attributes:
        path: its folder.
        info: `dataset.json`.
        columns: the index, one memory-mapped array per column.
    """

    def __init__(
        self, path: Path, info: dict[str, Any], columns: dict[str, np.ndarray], remote: RemoteShards | None = None
    ):
        self.path, self.info, self.columns, self.remote = path, info, columns, remote
        self.shard_names = [name for name, _ in info["shards"]]
        self.reader = ShardReader(path / "shards", remote.local if remote else None)

    @classmethod
    def open(cls, path: str | Path, kind: str | None = "encoded", cache: Cache | None = None) -> Dataset:
        """Opens a data set.

        Args:
            path: its folder, or its address where a cache is given.
            kind: encoded or raw; None: either.
            cache: for the parts of remote data sets.

        Raises:
            DataError: no such folder, not or not yet a data set, of the other kind, or with parts missing.
        """
        remote = mirror(str(path), cache, tuple(COLUMNS)) if is_remote(path) else None
        path = remote.mirror if remote else Path(path)
        info = _read_info(path)
        if kind and info["kind"] != kind:
            fix = (
                f"Run `flagdit data encode {path} OUT --recipe RECIPE` and use OUT."
                if kind == "encoded"
                else "Give the folder that `flagdit data build` made."
            )
            raise DataError(f"holds {KINDS[info['kind']]}; {KINDS[kind]} are needed here", where=str(path), fix=fix)
        columns = {}
        for name in COLUMNS:
            try:
                column = np.load(path / "index" / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                columns[name] = np.asarray(column)  # still mapped; but np.memmap takes its time for every index
            except (OSError, ValueError) as error:
                raise _damaged(path, f"index/{name}.npy cannot be read ({error})") from error
            if len(columns[name]) != info["samples"]:
                raise _damaged(path, f"index/{name}.npy has {len(columns[name])} rows for {info['samples']} samples")
        present = set(os.listdir(path / "shards")) if (path / "shards").is_dir() else set()
        missing = [name for name, _ in info["shards"] if f"{name}.tar" not in present and not remote]
        if missing:
            raise _damaged(path, f"{len(missing)} of {len(info['shards'])} shards are missing, {missing[0]}.tar first")
        return cls(path, info, columns, remote)

    def __reduce__(self) -> tuple:
        if self.remote:
            return (Dataset.open, (self.remote.url, None, self.remote.cache))
        return (Dataset.open, (self.path, None))

    def __len__(self) -> int:
        return self.info["samples"]

    @property
    def modality(self) -> str:
        return self.info["modality"]

    @property
    def codec(self) -> dict[str, Any] | None:
        """`Codec.spec()` of the codec that made the latents; None in a raw data set."""
        return self.info.get("codec")

    @property
    def text(self) -> dict[str, Any] | None:
        """`TextEncoder.spec()` of the encoder that made the features; None without features."""
        return self.info.get("text")

    @property
    def splits(self) -> Mapping[str, range]:
        """Split → its sample ids."""
        return {name: range(start, stop) for name, (start, stop) in self.info["splits"].items()}

    @property
    def shapes(self) -> list[tuple[tuple[int, int, int, int], int]]:
        """Every (C, F, H, W) in the data set and its number of samples, most frequent first."""
        return [(tuple(shape), count) for shape, count in self.info["shapes"]]

    @cached_property
    def null_text(self) -> Tensor | None:
        """(L, Y) fp32 features of the empty caption; None without text features.

        Raises:
            DataError: the file is missing or broken.
        """
        if self.text is None:
            return None
        try:
            return _tensor(memoryview((self.path / NULL_TEXT).read_bytes()))
        except (OSError, DataError) as error:
            raise _damaged(self.path, f"{NULL_TEXT} cannot be read ({error})") from error

    def split(self, name: str) -> range:
        """Sample ids of a split.

        Raises:
            DataError: there is no such split.
        """
        if name not in self.splits:
            have = ", ".join(f"{k} ({len(v)} samples)" for k, v in self.splits.items())
            raise DataError(f"there is no split {name!r}; it has {have}", where=str(self.path))
        return self.splits[name]

    def key(self, sample_id: int) -> str:
        """The sample's name for people: "shard/member"."""
        return f"{self.shard_names[self.columns['shard'][sample_id]]}/{self.columns['key'][sample_id].decode()}"

    def shape(self, sample_id: int) -> tuple[int, int, int, int]:
        """(C, F, H, W) of one sample, from the index."""
        c, f, h, w = self.columns["shape"][sample_id].tolist()
        return c, f, h, w

    def members(self, sample_id: int) -> dict[str, memoryview]:
        """The sample's files by ending, checked against the index.

        Raises:
            DataError: unreadable, or changed since it was written; names the sample.
        """
        columns = self.columns
        name = self.shard_names[columns["shard"][sample_id]]
        try:
            place = (int(columns[column][sample_id]) for column in ("offset", "nbytes", "xxh3"))
            return split_members(self.reader.span(name, *place))
        except DataError as error:
            raise DataError(str(error), where=f"sample {self.key(sample_id)}") from error

    def read(self, sample_id: int, turn: int = 0) -> Encoded:
        """One sample of an encoded data set, its latent and features as fp32 tensors of their own memory.

        Args:
            turn: of several captions, which; counts on beyond the last.

        Raises:
            DataError: unreadable, changed since it was written, not as its index row says, or not finite.
        """
        members, key = self.members(sample_id), self.key(sample_id)
        where = f"sample {key}"
        try:
            latent = _tensor(members["latent.npy"])
            caption, number = caption_of(members, turn)
            text = _tensor(members[text_member(number)]) if self.text is not None else None
        except KeyError as error:
            raise DataError(f"has no {error.args[0]}", where=where) from error
        except (DataError, ValueError, TypeError, AttributeError) as error:
            raise DataError(str(error), where=where) from error
        if tuple(latent.shape) != self.shape(sample_id):
            raise DataError(
                f"a latent of {tuple(latent.shape)}; its index row says {self.shape(sample_id)}", where=where
            )
        if text is not None and (text.ndim != 2 or len(text) < 1 or text.shape[1] != (self.text or {})["dim"]):
            raise DataError(f"text features of {tuple(text.shape)}", where=where)
        if not (_is_finite(latent) and (text is None or _is_finite(text))):
            raise DataError("holds NaN or infinity", where=where)
        return Encoded(sample_id, key, latent, text, caption, int(self.columns["label"][sample_id]))


def _tensor(view: memoryview) -> Tensor:
    return torch.from_numpy(read_npy(view).astype(np.float32, copy=view.readonly))


def _is_finite(x: Tensor) -> bool:
    # A sum is quick, and finite only where all values are; a sum that is too large proves nothing.
    return math.isfinite(float(x.sum())) or bool(torch.isfinite(x).all())


def _damaged(path: Path, what: str) -> DataError:
    return DataError(what, where=str(path), fix="The data set is damaged: copy it again, or build it anew.")


def _read_info(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise DataError(
            "there is no such folder",
            where=str(path),
            fix="Make a data set with `flagdit data build` and `flagdit data encode`, or correct data.path.",
        )
    if not (path / INFO).is_file():
        if (path / BUILDING).is_file():
            raise DataError(
                "the data set is not complete: the command that makes it was stopped",
                where=str(path),
                fix="Run that command again; it continues.",
            )
        inner = sorted(p.parent.name for p in path.glob(f"*/{INFO}"))
        fix = (
            f"Did you mean {path / inner[0]}?"
            if inner
            else "Make one with `flagdit data build` and `flagdit data encode`."
        )
        raise DataError(f"is not a data set: it has no {INFO}", where=str(path), fix=fix)
    try:
        info = json.loads((path / INFO).read_text(encoding="utf-8"))
        if info["format"] != FORMAT:
            raise DataError(
                f"has format {info['format']}; this version reads {FORMAT}", where=str(path), fix="Build it anew."
            )
        complete = {"kind", "modality", "samples", "splits", "shards", "shapes"} <= info.keys() and info[
            "kind"
        ] in KINDS
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"{INFO} cannot be read ({error})") from error
    if not complete:
        raise _damaged(path, f"{INFO} lacks some of its entries")
    return info
