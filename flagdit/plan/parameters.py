"""Parameters by part, counted from the real model on the meta device, and how many of them a tensor rank holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatch

import torch

from flagdit.config.schema import ModelConfig
from flagdit.model.block import TP_PLAN
from flagdit.model.flag_dit import FlagDiT

SPLIT = ("column", "row", "column_gather", "heads")
PARTS = (
    ("attention", "blocks.*.attention.*"),
    ("feed-forward", "blocks.*.feed_forward.*"),
    ("modulation", "*adaLN_modulation*"),
    ("block norms", "blocks.*"),
    ("embedders", "*"),
)


@dataclass(frozen=True)
class Parameters:
    """Counts.

    Attributes:
        total: of the model.
        by_part: what they belong to.
        per_rank: of one tensor rank.
        largest_block: of one block of one tensor rank: what ZeRO 3 gathers at a time.
    """

    total: int
    by_part: dict[str, int]
    per_rank: int
    largest_block: int


def count_parameters(cfg: ModelConfig, tensor: int = 1) -> Parameters:
    """Counts the parameters of a model that is never filled with numbers."""
    with torch.device("meta"):
        model = FlagDiT(cfg)
    by_part: Counter[str] = Counter()
    blocks: Counter[str] = Counter()
    per_rank = 0
    for name, p in model.named_parameters():
        by_part[next(part for part, pattern in PARTS if fnmatch(name, pattern))] += p.numel()
        own = p.numel() // tensor if _split(name, model.cfg) else p.numel()
        per_rank += own
        if name.startswith("blocks."):
            blocks[name.split(".")[1]] += own
    return Parameters(sum(by_part.values()), dict(by_part), per_rank, max(blocks.values()))


def _split(name: str, cfg: ModelConfig) -> bool:
    for pattern, kind in TP_PLAN.items():
        if fnmatch(name, pattern) or fnmatch(name, f"{pattern}.*"):
            if kind == "row":
                return not name.endswith(".bias")
            return kind in SPLIT or (kind == "qk_norm" and cfg.qk_norm == "layer")
    return False
