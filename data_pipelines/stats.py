"""`flagdit data stats`: what is in a data set."""

from __future__ import annotations

from collections import Counter
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np

from flagdit.data_pipelines.index import Dataset
from flagdit.errors import DataError

CAPTIONS_READ = 2000
QUANTILES = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}


def describe(path: str | Path) -> dict[str, Any]:
    """Counts and distributions of a raw or encoded data set, as JSON.

    Returns:
        kind, modality, source, licence, samples, splits (name → samples), shards, bytes, quarantined, labels
        (class → samples); sizes ("WIDTH×HEIGHT" or "WIDTH×HEIGHT×FRAMES", in pixels or latents → samples); aspects
        ("W:H" → samples);
        channels, codec, text (encoded only); text_tokens (quantiles, and a histogram of [from, to, samples]);
        caption_letters (quantiles over up to 2000 captions spread over the data set); unreadable (of those read).

    Raises:
        DataError: not a complete data set.
    """
    dataset = Dataset.open(path, None)
    info = dataset.info
    sizes: Counter[str] = Counter()
    aspects: Counter[str] = Counter()
    for (_, frames, rows, columns), count in dataset.shapes:
        sizes[f"{columns}×{rows}" + (f"×{frames}" if frames > 1 else "")] += count
        common = gcd(rows, columns)
        aspects[f"{columns // common}:{rows // common}"] += count
    letters, unreadable = _caption_letters(dataset)
    classes, counts = np.unique(dataset.columns["label"], return_counts=True)
    described = {
        **{k: info[k] for k in ("kind", "modality", "source", "licence", "samples", "quarantined")},
        "splits": {name: len(ids) for name, ids in dataset.splits.items()},
        "shards": len(dataset.shard_names),
        "bytes": int(dataset.columns["nbytes"].sum()),
        "sizes": dict(sizes.most_common()),
        "aspects": dict(aspects.most_common()),
        "labels": {str(c): n for c, n in zip(classes.tolist(), counts.tolist(), strict=True) if c >= 0},
        "caption_letters": _quantiles(np.asarray(letters)),
        "unreadable": unreadable,
    }
    if info["kind"] == "encoded":
        tokens = dataset.columns["text_tokens"]
        described |= {k: info[k] for k in ("channels", "factor", "codec", "text", "dtype")}
        described["text_tokens"] = {**_quantiles(tokens), "histogram": _histogram(tokens)}
    return described


def _caption_letters(dataset: Dataset) -> tuple[list[int], int]:
    letters, unreadable = [], 0
    for i in range(0, len(dataset), max(1, len(dataset) // CAPTIONS_READ)):
        try:
            letters.append(len(bytes(dataset.members(i)["txt"]).decode()))
        except (DataError, KeyError, UnicodeDecodeError):
            unreadable += 1
    return letters, unreadable


def _quantiles(values: np.ndarray) -> dict[str, float]:
    return {name: float(np.quantile(values, q)) for name, q in QUANTILES.items()} if len(values) else {}


def _histogram(values: np.ndarray, bins: int = 16) -> list[list[int]]:
    low, high = int(values.min()), int(values.max()) + 1
    edges = np.unique(np.linspace(low, high, min(bins, high - low) + 1).round().astype(int))
    counts, _ = np.histogram(values, edges)
    return [[int(a), int(b) - 1, int(n)] for a, b, n in zip(edges, edges[1:], counts, strict=False)]
