"""What is in a folder of weights, and how two of them differ. Both read one tensor at a time."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flagdit.checkpoint import store
from flagdit.checkpoint.folders import TENSORS, read_manifest
from flagdit.checkpoint.formats import RUN, Opened, open_any
from flagdit.checkpoint.progress import progress
from flagdit.checkpoint.tensors import TensorSource
from flagdit.config.load import diff as recipe_diff
from flagdit.model.sizes import resolve


def inspect(
    path: Path, *, step: int | None = None, weights: str | None = None, tensors: bool = False
) -> dict[str, Any]:
    """Facts about weights, JSON-able.

    Args:
        path: a folder that `open_any` opens.
        step: of a run's checkpoint; None: the newest.
        weights: ema or raw, where there are both.
        tensors: also shape, dtype and norm of every tensor.

    Raises:
        CheckpointError: see `open_any`.
    """
    opened = open_any(path, step=step, weights=weights)
    entries = opened.tensors.entries
    norms = _norms(opened.tensors, path)
    facts: dict[str, Any] = {
        "format": opened.kind,
        "step": opened.step,
        "weights": opened.group,
        "tensors": len(entries),
        "parameters": sum(entry.numel for entry in entries.values()),
        "dtypes": sorted({str(entry.dtype).removeprefix("torch.") for entry in entries.values()}),
        "bytes": opened.tensors.nbytes,
        "norm": math.sqrt(sum(norm**2 for norm in norms.values())),
        "not_finite": sorted(name for name, norm in norms.items() if not math.isfinite(norm)),
        "model": {key: value for key, value in asdict(resolve(opened.recipe.model)).items() if key != "size"},
    }
    if opened.kind == RUN:
        facts["checkpoints"] = [done for done, _ in store.complete(path)]
        facts["topology"] = asdict(opened.recipe.parallel)
        facts |= _of_checkpoint(store.find(path, opened.step))
    if tensors:
        facts["each"] = {
            name: {
                "shape": list(entry.shape),
                "dtype": str(entry.dtype).removeprefix("torch."),
                "norm": norms[name],
            }
            for name, entry in entries.items()
        }
    return facts


def _of_checkpoint(path: Path) -> dict[str, Any]:
    """What else than the weights is in a checkpoint."""
    manifest, _ = read_manifest(path)
    assert manifest is not None, "it has just been read"
    groups: dict[str, dict[str, int]] = {}
    for name, record in manifest.files.items():
        group, _, file = name.rpartition("/")
        if file.endswith(TENSORS):
            facts = groups.setdefault(group, {"files": 0, "bytes": 0})
            facts["files"] += 1
            facts["bytes"] += record.bytes
    return {"groups": groups, "validation": manifest.validation, "state": store.load(path, groups=()).state}


def diff(a: Path, b: Path, *, weights: str | None = None) -> dict[str, Any]:
    """How two folders of weights differ, whatever their formats, under the names of the plain model. JSON-able.

    Returns:
        `equal`: all tensors are there in both with the same values (dtypes may differ); `recipe`: keys that differ;
        `only_a`, `only_b`: names; `shapes`; `dtypes`; `values`: the largest absolute difference and the norm of the
        difference relative to a's, for tensors that differ, largest first.

    Raises:
        CheckpointError: see `open_any`.
    """
    one, other = open_any(a, weights=weights), open_any(b, weights=weights)
    left, right = one.tensors.entries, other.tensors.entries
    both = [name for name in left if name in right]
    alike = [name for name in both if left[name].shape == right[name].shape]
    values = _differences(one, other, alike)
    shapes = {n: [list(left[n].shape), list(right[n].shape)] for n in both if left[n].shape != right[n].shape}
    only_a, only_b = sorted(left.keys() - right.keys()), sorted(right.keys() - left.keys())
    return {
        "equal": not (values or shapes or only_a or only_b),
        "recipe": {key: [ours, theirs] for key, ours, theirs in recipe_diff(one.recipe, other.recipe)},
        "only_a": only_a,
        "only_b": only_b,
        "shapes": shapes,
        "dtypes": {n: [str(left[n].dtype), str(right[n].dtype)] for n in both if left[n].dtype != right[n].dtype},
        "values": dict(sorted(values.items(), key=lambda item: -item[1]["relative"])),
    }


def _differences(one: Opened, other: Opened, names: list[str]) -> dict[str, dict[str, float]]:
    found = {}
    with progress("comparing", sum(one.tensors.entries[name].nbytes for name in names)) as advance:
        for name in names:
            x, y = one.tensors.read(name).float(), other.tensors.read(name).float()
            gap = x - y
            largest = gap.abs().max().item() if gap.numel() else 0.0
            # Two NaNs in one place are no difference; a NaN against a number is.
            if largest != 0 and not x.equal(y) and not bool(((x == y) | (x.isnan() & y.isnan())).all()):
                base = x.norm().item()
                found[name] = {"largest": largest, "relative": gap.norm().item() / base if base else math.inf}
            advance(one.tensors.entries[name].nbytes)
    return found


def _norms(source: TensorSource, path: Path) -> dict[str, float]:
    norms = {}
    with progress(f"reading {path.name}", source.nbytes) as advance:
        for name, tensor in source.items():
            norms[name] = tensor.float().norm().item()
            advance(tensor.nbytes)
    return norms
