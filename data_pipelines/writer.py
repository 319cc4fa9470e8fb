"""Fills a folder with a data set, shard by shard, so that a killed run can go on and a finished one is recognised.

While it works, `building.json` holds the settings and `parts/` the index rows of each finished shard; a shard is done
when its part is there. `finish` joins the parts into the index and writes `dataset.json` as the last file.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flagdit.data_pipelines.index import BUILDING, COLUMNS, FORMAT, INFO, NULL_TEXT, QUARANTINE, Dataset
from flagdit.data_pipelines.records import Rejected
from flagdit.data_pipelines.shards import Row, Sample, atomic, npy_bytes, write_shard
from flagdit.errors import DataError

FINISHING = "finishing"
"""A folder that the one task makes that completes the data set. Should it be killed there, a run without --task ends
its work."""


class DatasetWriter:
    """A data set in the making.

    Attributes:
        out: its folder.
        settings: everything that decides its content, as JSON.
        complete: whether the folder already holds the finished data set of these settings.
    """

    def __init__(self, out: Path, settings: dict[str, Any], *, overwrite: bool, resume: bool):
        """Claims the folder.

        Args:
            out: its folder; made if missing.
            settings: everything that decides the content.
            overwrite: delete a data set of other settings that stands there.
            resume: keep the finished shards of a stopped run; else start over.

        Raises:
            DataError: the folder holds a data set of other settings, or files that are not a data set's.
        """
        self.out = out
        self.settings = json.loads(json.dumps(settings))
        self.complete = False
        if out.exists() and not out.is_dir():
            raise DataError("is a file; a folder is needed", where=str(out))
        standing = self._standing()
        finished = (out / INFO).is_file()
        if standing is not None and standing != self.settings and (finished or resume):
            if not overwrite:
                differing = sorted(
                    k for k in standing.keys() | self.settings if standing.get(k) != self.settings.get(k)
                )
                raise DataError(
                    f"holds a data set made with other settings ({', '.join(differing)})",
                    where=str(out),
                    fix="Give another folder, or delete this one (--overwrite does).",
                )
            self._clear()
        elif finished:
            Dataset.open(out, None)
            self._tidy()
            self.complete = True
            return
        elif not resume:
            self._clear()
        try:
            for folder in ("shards", "parts"):
                (out / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot be made: {error.strerror}", where=str(out), fix="Give another folder.") from error
        self._write_json(BUILDING, self.settings)

    def _standing(self) -> dict[str, Any] | None:
        if not self.out.is_dir() or not any(self.out.iterdir()):
            return None
        for name in (INFO, BUILDING):
            try:
                content = json.loads((self.out / name).read_text(encoding="utf-8"))
                return content["settings"] if name == INFO else content
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{name} cannot be read ({error})", where=str(self.out), fix="Delete the folder."
                ) from error
        raise DataError("is not empty and holds no data set", where=str(self.out), fix="Give a new or empty folder.")

    def _clear(self) -> None:
        """Deletes a data set, and nothing that a data set does not have."""
        # In this order: shards that are kept always belong to the settings that stand in the folder.
        shutil.rmtree(self.out / "parts", ignore_errors=True)
        if self.out.is_dir():
            self._write_json(BUILDING, self.settings)
        for name in (INFO, QUARANTINE, NULL_TEXT):
            (self.out / name).unlink(missing_ok=True)
        for name in ("index", "shards"):
            shutil.rmtree(self.out / name, ignore_errors=True)

    def _tidy(self) -> None:
        """Removes what a finished data set no longer needs."""
        shutil.rmtree(self.out / "parts", ignore_errors=True)
        (self.out / BUILDING).unlink(missing_ok=True)
        if (self.out / FINISHING).is_dir():
            (self.out / FINISHING).rmdir()
        for stray in (self.out / "shards").glob(".*.tmp"):
            stray.unlink()

    def done(self, name: str) -> bool:
        """Whether a shard is finished."""
        return (self.out / "parts" / f"{name}.npy").is_file()

    def all_done_here(self, shards: Sequence[str]) -> bool:
        """Whether every shard is finished and this process is the one to complete the data set, of several that may
        ask at the same time."""
        if not all(self.done(name) for name in shards):
            return False
        try:
            (self.out / FINISHING).mkdir()
        except FileExistsError:
            return False
        return True

    def put(self, name: str, samples: Sequence[Sample], rejected: Iterable[Rejected] = ()) -> None:
        """Writes one shard, its ledger and its index rows.

        Raises:
            DataError: it cannot be written.
        """
        rows = write_shard(self.out / "shards" / f"{name}.tar", samples)
        self._write_ledger(self.out / "parts" / f"{name}.jsonl", rejected)
        with atomic(self.out / "parts" / f"{name}.npy") as file:
            file.write(npy_bytes(_part(rows)))

    def ledger(self, rejected: Iterable[Rejected]) -> None:
        """Writes `quarantine.jsonl`; removes it when there is nothing to write."""
        self._write_ledger(self.out / QUARANTINE, rejected)

    def rejected(self, shards: Iterable[str]) -> list[Rejected]:
        """What the ledgers of finished shards hold, in the order of the shards."""
        found = []
        for name in shards:
            path = self.out / "parts" / f"{name}.jsonl"
            if path.is_file():
                found += [Rejected(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
        return found

    def finish(
        self,
        info: dict[str, Any],
        shards: Sequence[str],
        rejected: Sequence[Rejected],
        null_text: np.ndarray | None = None,
    ) -> Dataset:
        """Joins the parts and makes the data set complete.

        Args:
            info: kind, modality and whatever else `dataset.json` shall say.
            shards: names of all shards as "split-number", split by split: sample ids follow this order.
            rejected: the whole ledger.
            null_text: (L, Y) features of the empty caption.

        Raises:
            DataError: no samples, or it cannot be written.
        """
        parts = [np.load(self.out / "parts" / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in shards]
        total = sum(map(len, parts))
        self.ledger(rejected)
        if not total:
            raise DataError(
                "no sample is left", where=str(self.out), fix=f"The reasons are in {self.out / QUARANTINE}."
            )
        (self.out / "index").mkdir(exist_ok=True)
        content = hashlib.sha256(json.dumps(list(shards)).encode())
        summary: dict[str, Any] = {}
        for name in COLUMNS:
            if name == "shard":
                column = np.repeat(np.arange(len(shards), dtype=np.int32), [len(p) for p in parts])
            else:
                column = np.concatenate([p[name] for p in parts if len(p)])
            with atomic(self.out / "index" / f"{name}.npy") as file:
                np.save(file, column, allow_pickle=False)
            if name in ("key", "xxh3"):
                content.update(column.tobytes())
            if name == "shape":
                sizes, counts = np.unique(column, axis=0, return_counts=True)
                found = Counter({tuple(s): n for s, n in zip(sizes.tolist(), counts.tolist(), strict=True)})
                summary["shapes"] = [[list(s), n] for s, n in sorted(found.items(), key=lambda x: (-x[1], x[0]))]
            if name == "label":
                summary["labels"] = {"samples": int((column >= 0).sum()), "max": int(column.max())}
        if null_text is not None:
            with atomic(self.out / NULL_TEXT) as file:
                file.write(npy_bytes(null_text))
        filled = [[name, len(part)] for name, part in zip(shards, parts, strict=True)]
        info = {"format": FORMAT, **info, "samples": total, "splits": _splits(filled), "shards": filled, **summary}
        info |= {"quarantined": len(rejected), "content": content.hexdigest()[:32], "settings": self.settings}
        self._write_json(INFO, info)
        self._tidy()
        return Dataset.open(self.out, None)

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        with atomic(self.out / name) as file:
            lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in content.items()]
            file.write(("{\n " + ",\n ".join(lines) + "\n}\n").encode())

    def _write_ledger(self, path: Path, rejected: Iterable[Rejected]) -> None:
        lines = [json.dumps({"key": r.key, "reason": r.reason}, ensure_ascii=False) + "\n" for r in rejected]
        if not lines:
            path.unlink(missing_ok=True)
            return
        with atomic(path) as file:
            file.write("".join(lines).encode(errors="backslashreplace"))


def _part(rows: Sequence[Row]) -> np.ndarray:
    keys = [row.key.encode() for row in rows]
    width = max(map(len, keys), default=1)
    fields = [
        (n, f"S{width}") if n == "key" else (n, *(t if isinstance(t, tuple) else (t,))) for n, t in COLUMNS.items()
    ]
    part = np.zeros(len(rows), dtype=[f for f in fields if f[0] != "shard"])
    for name in part.dtype.names or ():
        if rows:
            part[name] = keys if name == "key" else [getattr(row, name) for row in rows]
    return part


def _splits(shards: Iterable[Sequence[Any]]) -> dict[str, list[int]]:
    """Split → [first, past the last] sample id, from (shard name, samples) pairs that stand split by split."""
    splits: dict[str, list[int]] = {}
    at = 0
    for name, count in shards:
        split = name.rpartition("-")[0]
        splits.setdefault(split, [at, at])[1] = at + count
        assert splits[split][1] - at == count and list(splits)[-1] == split, "shards do not stand split by split"
        at += count
    return {split: span for split, span in splits.items() if span[0] < span[1]}
