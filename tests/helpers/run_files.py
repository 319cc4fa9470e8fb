"""What tests read of a run folder."""

import json
from pathlib import Path

import torch

from flagdit.checkpoint import store


def lines(file: Path) -> list[dict]:
    """A file of JSON lines."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, as group/name."""
    saved = store.load(store.find(folder, step))
    return {f"{group}/{name}": t for group in saved.tensors for name, t in saved.tensors[group].items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())
