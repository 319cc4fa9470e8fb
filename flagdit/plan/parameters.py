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
    ("embedders and heads", "*"),
)


@dataclass(frozen=True)
class Parameters:
    """Counts.

    Attributes:
        whole: name → elements.
        split: names of those that the tensor axis cuts.
    """

    whole: dict[str, int]
    split: frozenset[str]

    @property
    def total(self) -> int:
        """Of the model."""
        return sum(self.whole.values())

    @property
    def by_part(self) -> dict[str, int]:
        """What they belong to."""
        counts: Counter[str] = Counter()
        for name, count in self.whole.items():
            counts[next(part for part, pattern in PARTS if fnmatch(name, pattern))] += count
        return dict(counts)

    def per_rank(self, tensor: int) -> int:
        """Of one of so many tensor ranks."""
        return sum(self._own(name, tensor) for name in self.whole)

    def largest_block(self, tensor: int) -> int:
        """Of one block of a tensor rank: what ZeRO 3 gathers at a time."""
        blocks: Counter[str] = Counter()
        for name in self.whole:
            if name.startswith("blocks."):
                blocks[name.split(".")[1]] += self._own(name, tensor)
        return max(blocks.values())

    def _own(self, name: str, tensor: int) -> int:
        return self.whole[name] // tensor if name in self.split else self.whole[name]


def count_parameters(cfg: ModelConfig) -> Parameters:
    """Counts the parameters of a model that is never filled with numbers."""
    with torch.device("meta"):
        model = FlagDiT(cfg)
    whole = {name: p.numel() for name, p in model.named_parameters()}
    return Parameters(whole, frozenset(name for name in whole if _split(name, model.cfg)))


def _split(name: str, cfg: ModelConfig) -> bool:
    for pattern, kind in TP_PLAN.items():
        if fnmatch(name, pattern) or fnmatch(name, f"{pattern}.*"):
            return kind in SPLIT or (kind == "qk_norm" and cfg.qk_norm == "layer")
    return False
