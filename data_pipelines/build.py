"""`flagdit data build`: a source's samples into a raw data set."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flagdit.config.schema import LimitsConfig
from flagdit.data_pipelines.index import QUARANTINE, Dataset
from flagdit.data_pipelines.options import help_of, kinds, parse, source_function
from flagdit.data_pipelines.progress import progress
from flagdit.data_pipelines.records import Raw, Rejected, Source
from flagdit.data_pipelines.shards import Sample
from flagdit.data_pipelines.writer import DatasetWriter
from flagdit.errors import DataError, RecipeError

SPLITS = ("train", "heldout")


def build_dataset(
    kind: str,
    out: str | Path,
    *,
    shard_samples: int = 1000,
    max_bad: float = 0.1,
    overwrite: bool = False,
    limits: LimitsConfig | None = None,
    **options: Any,
) -> Dataset:
    """Builds a raw data set, or opens it if it stands there, complete and with the same settings.

    Args:
        kind: a file of `sources/`.
        out: its folder.
        shard_samples: samples per shard, at most.
        max_bad: share of rejected samples above which the build fails.
        overwrite: replace a data set of other settings.
        limits: what a sample may be; None: the defaults of the recipe.
        options: the source's own; see the `source` function in its file.

    Raises:
        RecipeError: unknown kind or option, or an option that cannot be met.
        DataError: nothing to read, too many rejected samples, or OUT cannot be used.
    """
    function = source_function(kind)
    known = inspect.signature(function).parameters
    unknown = sorted(options.keys() - known)
    needed = sorted(n for n, p in known.items() if p.default is inspect.Parameter.empty and n not in options)
    if unknown or needed:
        what = (
            f"the source {kind} has no option {', '.join(unknown)}" if unknown else f"{kind} needs {', '.join(needed)}"
        )
        raise RecipeError(what, fix=f"Its options: {', '.join(known)}.")
    if shard_samples < 1:
        raise RecipeError(f"--shard-samples {shard_samples} must be at least 1")
    if limits is not None and "limits" in known:
        options["limits"] = limits
    out = Path(out)
    source = function(**options)
    writer = DatasetWriter(out, {**source.settings, "shard_samples": shard_samples}, overwrite=overwrite, resume=False)
    if writer.complete:
        print(f"{out} is complete and up to date", flush=True)
        return Dataset.open(out, "raw")
    shards, rejected = _fill(writer, source, shard_samples, max_bad)
    writer.ledger(rejected)
    check_rejected(out, rejected, source.total, max_bad)
    info = {"kind": "raw", "modality": source.modality, "source": source.settings["kind"], "licence": source.licence}
    return writer.finish(info, shards, rejected)


def build_from_words(kind: str, words: Sequence[str], **rest: Any) -> None:
    """`flagdit data build KIND OUT …`, from the words that follow KIND.

    Args:
        words: the folder to make, and the source's options as the command line gives them; with --help the options are
            shown instead.
        rest: as in `build_dataset`.

    Raises:
        RecipeError, DataError: as `build_dataset`, and words that are no options.
    """
    if not kind or kind in ("--help", "-h"):
        lines = [f"  {name:<12} {(source_function(name).__doc__ or '').splitlines()[0]}" for name in kinds()]
        print("Usage: flagdit data build KIND OUT [OPTIONS]\n\nPack media and captions into a data set. Kinds:\n")
        print("\n".join(lines))
        print("\nOptions of a kind: flagdit data build KIND --help\n\nExample:")
        print("  flagdit data build folder data/mine --from ~/pictures --size 256")
        return
    function = source_function(kind)
    if "--help" in words:
        print(help_of(kind))
        return
    if not words or words[0].startswith("-"):
        raise RecipeError("the folder to make is not given", fix=f"Write: flagdit data build {kind} OUT [OPTIONS].")
    build_dataset(kind, words[0], **rest, **parse(function, words[1:]))


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
    meta = {**raw.meta, "label": raw.label} if raw.label >= 0 else dict(raw.meta)
    if raw.more_captions:
        meta["captions"] = list(raw.more_captions)
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
