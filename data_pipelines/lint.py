"""`flagdit data lint`: everything that can be wrong with a data set, looked for sample by sample.

Nothing is changed. Each finding names the sample or the file, and says what is wrong with it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flagdit.config.schema import LimitsConfig
from flagdit.data_pipelines.index import NULL_TEXT, Dataset
from flagdit.data_pipelines.progress import progress
from flagdit.data_pipelines.readers import read_values
from flagdit.data_pipelines.user_files import captions_of, time_limit
from flagdit.errors import DataError
from flagdit.model.modality import MODALITIES

BLANK = 1e-6  # spread of values below which a latent or a picture holds nothing


@dataclass(frozen=True)
class Finding:
    """One defect: where it is and what it is."""

    where: str
    what: str


def lint(path: str | Path, limits: LimitsConfig | None = None) -> list[Finding]:
    """Looks through a raw or encoded data set.

    Args:
        path: its folder.
        limits: what a sample may be; None: the defaults.

    Returns:
        All defects, those of the whole first.

    Raises:
        DataError: the folder cannot be opened as a data set at all; says why.
    """
    dataset = Dataset.open(path, None)
    limits = limits or LimitsConfig()
    findings = list(_of_the_whole(dataset))
    with progress(f"looking through {path}", len(dataset)) as advance:
        for sample_id in range(len(dataset)):
            try:
                with time_limit(limits.sample_seconds):
                    faults = list(_of_a_sample(dataset, sample_id, limits))
            except DataError as error:
                faults = [error.what]
            findings += [Finding(dataset.key(sample_id), fault) for fault in faults]
            advance(1)
    return findings


def _of_the_whole(dataset: Dataset) -> Iterator[Finding]:
    info, columns, name = dataset.info, dataset.columns, str(dataset.path)
    counted = sum(count for _, count in info["shards"])
    if counted != len(dataset):
        yield Finding(name, f"its shards are said to hold {counted} samples, and the index has {len(dataset)}")
    at = 0
    for split, ids in dataset.splits.items():
        if ids.start != at or ids.stop < ids.start:
            yield Finding(name, f"split {split} is samples {ids.start} to {ids.stop}, after {at}")
        at = ids.stop
    if at != len(dataset):
        yield Finding(name, f"its splits end at sample {at} of {len(dataset)}")
    if info["modality"] not in MODALITIES:
        yield Finding(name, f"there is no modality {info['modality']!r}")
    known = {f"{shard}.tar" for shard in dataset.shard_names}
    for stray in sorted(p.name for p in (dataset.path / "shards").iterdir() if p.name not in known):
        yield Finding(f"shards/{stray}", "is not in the index")
    for number, shard in enumerate(dataset.shard_names):
        own = columns["shard"] == number
        end = int((columns["offset"][own] + columns["nbytes"][own]).max(initial=0))
        size = (dataset.path / "shards" / f"{shard}.tar").stat().st_size
        if size < end:
            yield Finding(f"shards/{shard}.tar", f"is cut off: {size} bytes, and its samples end at {end}")
    doubled = [key for key, count in Counter(columns["key"].tolist()).items() if count > 1]
    for key in doubled:
        yield Finding(key.decode(errors="replace"), "two samples have this key")
    contents = Counter(zip(columns["xxh3"].tolist(), columns["nbytes"].tolist(), strict=True))
    for (xxh3, nbytes), count in contents.items():
        if count > 1:
            same = np.flatnonzero((columns["xxh3"] == xxh3) & (columns["nbytes"] == nbytes))[:2].tolist()
            yield Finding(dataset.key(same[1]), f"is the same as {dataset.key(same[0])} to the byte")
    if dataset.text is not None:
        try:
            _ = dataset.null_text
        except DataError as error:
            yield Finding(NULL_TEXT, error.what)


def _of_a_sample(dataset: Dataset, sample_id: int, limits: LimitsConfig) -> Iterator[str]:
    shape, nbytes = dataset.shape(sample_id), int(dataset.columns["nbytes"][sample_id])
    if min(shape) < 1:
        yield f"its size is {shape}"
        return
    if nbytes > limits.max_sample_bytes:
        yield f"has {nbytes} bytes; limits.max_sample_bytes={limits.max_sample_bytes}"
        return
    members = dataset.members(sample_id)
    try:
        about = json.loads(bytes(members["json"]).decode())
        entry = {"caption": bytes(members["txt"]).decode(), "captions": about.get("captions", [])}
        captions, _ = captions_of(entry, limits)
        if " ".join(entry["caption"].split()) != entry["caption"]:
            yield "its caption has spaces at its ends, or more than one in a row"
        if "�" in "".join(captions):
            yield "its caption was read in a wrong encoding: it holds �"
    except KeyError as error:
        yield f"has no {error.args[0]}"
    except UnicodeDecodeError:
        yield "its caption is not UTF-8"
    except DataError as error:
        yield error.what
    except (ValueError, AttributeError, RecursionError) as error:
        yield f"its json cannot be read ({error})"
    if dataset.info["kind"] == "encoded":
        sample = dataset.read(sample_id)
        values = sample.latent_CFHW.numpy()
        if sample.text_LY is not None and len(sample.text_LY) != dataset.columns["text_tokens"][sample_id]:
            yield f"has {len(sample.text_LY)} text tokens; its row says {dataset.columns['text_tokens'][sample_id]}"
    else:
        values = read_values(dataset, sample_id, members).numpy()
    if not np.isfinite(values).all():
        yield "holds NaN or infinity"
    elif float(values.std()) < BLANK:
        yield "is blank: all its values are the same"
