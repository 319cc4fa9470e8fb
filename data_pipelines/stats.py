"""`flagdit data stats`: what is in a data set."""

from __future__ import annotations

from collections import Counter
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np

from flagdit.data_pipelines.index import Dataset
from flagdit.errors import DataError
from flagdit.model.tokens import TokenSpec, num_tokens_of_all

CAPTIONS_READ = 2000
MOST_BARS = 16
QUANTILES = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}


def describe(path: str | Path, patch_size: int = 2) -> dict[str, Any]:
    """Counts and distributions of a raw or encoded data set, as JSON.

    Args:
        patch_size: rows and columns of latent per token, for the tokens.

    Returns:
        kind, modality, source, licence, samples, splits (name → samples), shards, bytes, quarantined, labels
        (class → samples); sizes ("WIDTH×HEIGHT" or "WIDTH×HEIGHT×FRAMES", in pixels or latents → samples); aspects
        ("W:H" → samples);
        channels, codec, text, dtype_error (encoded only); tokens of the latents, special ones included, and text_tokens
        (quantiles, and a histogram of [from, to, samples]);
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
        described |= {k: info[k] for k in ("channels", "factor", "codec", "text", "dtype", "dtype_error") if k in info}
        lengths = num_tokens_of_all(dataset.columns["shape"], dataset.modality, TokenSpec(patch_size, True, True))
        described["tokens"] = {**_quantiles(lengths), "total": int(lengths.sum()), "histogram": _histogram(lengths)}
        described["text_tokens"] = {**_quantiles(tokens), "histogram": _histogram(tokens)}
    return described


def write_plots(described: dict[str, Any], out: Path) -> Path:
    """Draws sizes, aspect ratios, tokens and caption lengths of what `describe` found as one picture.

    Raises:
        DataError: it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplots(2, 2).flat
    for title, counts in (("sizes", described["sizes"]), ("aspect ratios", described["aspects"])):
        axes = next(panels)
        shown = dict(list(counts.items())[:MOST_BARS])
        axes.barh(list(shown)[::-1], list(shown.values())[::-1], color="#4269d0")
        axes.set_title(title if len(shown) == len(counts) else f"{title}: the {len(shown)} commonest of {len(counts)}")
        axes.set_xlabel("samples")
    for title in ("tokens", "text_tokens", "caption_letters"):
        found = described.get(title)
        if not found or (axes := next(panels, None)) is None:
            continue
        if "histogram" in found:
            edges = [low for low, _, _ in found["histogram"]]
            widths = [high - low + 1 for low, high, _ in found["histogram"]]
            axes.bar(edges, [n for _, _, n in found["histogram"]], widths, align="edge", color="#3ca951")
            axes.set_ylabel("samples")
        else:
            axes.plot(list(found.values()), list(QUANTILES.values()), "o-", color="#ff725c")
            axes.set_ylabel("share of samples below")
        axes.set_title(title.replace("_", " "))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=110)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be written ({error})", where=str(out), fix="Give a .png, .svg or .pdf.") from error
    return out


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
