"""`flagdit data build`: a source's samples into a raw data set."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flagdit.data_pipelines.index import QUARANTINE, Dataset
from flagdit.data_pipelines.progress import progress
from flagdit.data_pipelines.records import Raw, Rejected, Source
from flagdit.data_pipelines.shards import Sample
from flagdit.data_pipelines.sources import emoji, folder
from flagdit.data_pipelines.writer import DatasetWriter
from flagdit.errors import DataError, RecipeError

SOURCES: dict[str, Callable[..., Source]] = {
    "emoji": emoji.source,
    "folder": folder.source,
}
"""Kind → source. A new kind is a file in `sources/` and a row here."""

SPLITS = ("train", "heldout")


def build_dataset(
    kind: str,
    out: str | Path,
    *,
    shard_samples: int = 1000,
    max_bad: float = 0.1,
    overwrite: bool = False,
    **options: Any,
) -> Dataset:
    """Builds a raw data set, or opens it if it stands there, complete and with the same settings.

    Args:
        kind: a row of SOURCES.
        out: its folder.
        shard_samples: samples per shard, at most.
        max_bad: share of rejected samples above which the build fails.
        overwrite: replace a data set of other settings.
        options: the source's own; see the `source` function in its file.

    Raises:
        RecipeError: unknown kind or option, or an option that cannot be met.
        DataError: nothing to read, too many rejected samples, or OUT cannot be used.
    """
    if kind not in SOURCES:
        raise RecipeError(f"there is no source {kind!r}", fix=f"Known ones: {', '.join(SOURCES)}.")
    known = inspect.signature(SOURCES[kind]).parameters
    unknown = sorted(options.keys() - known)
    needed = sorted(n for n, p in known.items() if p.default is inspect.Parameter.empty and n not in options)
    if unknown or needed:
        what = (
            f"the source {kind} has no option {', '.join(unknown)}" if unknown else f"{kind} needs {', '.join(needed)}"
        )
        raise RecipeError(what, fix=f"Its options: {', '.join(known)}.")
    if shard_samples < 1:
        raise RecipeError(f"--shard-samples {shard_samples} must be at least 1")
    out = Path(out)
    source = SOURCES[kind](**options)
    writer = DatasetWriter(out, {**source.settings, "shard_samples": shard_samples}, overwrite=overwrite, resume=False)
    if writer.complete:
        print(f"{out} is complete and up to date", flush=True)
        return Dataset.open(out, "raw")
    shards, rejected = _fill(writer, source, shard_samples, max_bad)
    writer.ledger(rejected)
    check_rejected(out, rejected, source.total, max_bad)
    info = {"kind": "raw", "modality": source.modality, "source": source.settings["kind"], "licence": source.licence}
    return writer.finish(info, shards, rejected)


def _fill(
    writer: DatasetWriter, source: Source, shard_samples: int, max_bad: float
) -> tuple[list[str], list[Rejected]]:
    waiting: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    written: dict[str, list[str]] = {split: [] for split in SPLITS}
    rejected: list[Rejected] = []

    def flush(split: str) -> None:
        name = f"{split}-{len(written[split]):06d}"
        writer.put(name, waiting[split])
        written[split].append(name)
        waiting[split] = []

    with progress(f"building {writer.out}", source.total) as advance:
        for item in source.items:
            advance(1)
            if isinstance(item, Rejected):
                rejected.append(item)
                if len(rejected) > max(100, max_bad * source.total):
                    break  # no need to read on: the caller refuses the data set
                continue
            waiting[item.split].append(_sample(item))
            if len(waiting[item.split]) == shard_samples:
                flush(item.split)
        for split in SPLITS:
            if waiting[split]:
                flush(split)
    return [name for split in SPLITS for name in written[split]], rejected


def _sample(raw: Raw) -> Sample:
    meta = {**raw.meta, "label": raw.label} if raw.label >= 0 else raw.meta
    members = {"txt": raw.caption.encode(), "json": json.dumps(meta, ensure_ascii=False, sort_keys=True).encode()}
    return Sample(raw.key, {**members, **raw.media}, raw.shape, label=raw.label)


def check_rejected(out: Path, rejected: list[Rejected], total: int, max_bad: float) -> None:
    """Shows how many samples were rejected.

    Raises:
        DataError: their share is above `max_bad`.
    """
    if not rejected:
        return
    ledger = out / QUARANTINE
    first = f"{rejected[0].key}: {rejected[0].reason}"
    if len(rejected) > max_bad * total:
        raise DataError(
            f"{len(rejected)} of {total} samples cannot be used, more than the share of {max_bad:g} that is accepted "
            f"(first {first})",
            where=str(out),
            fix=f"All are listed in {ledger}. Repair them, or accept more with --max-bad.",
        )
    print(f"left out {len(rejected)} of {total} samples (first {first}); see {ledger}", flush=True)
