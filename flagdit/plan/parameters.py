"""Parameters by part, counted from the real model on the meta device, and how many of them a tensor rank holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property

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

    @cached_property
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
        return _part(self.total, self._split_total, tensor)

    def largest_block(self, tensor: int) -> int:
        """Of one block of a tensor rank: what ZeRO 3 gathers at a time."""
        return max(_part(whole, split, tensor) for whole, split in self._blocks)

    # A search asks for these thousands of times.

    @cached_property
    def _split_total(self) -> int:
        return sum(self.whole[name] for name in self.split)

    @cached_property
    def _blocks(self) -> set[tuple[int, int]]:
        """(elements, those that are split) of every block; most are alike."""
        whole: Counter[str] = Counter()
        split: Counter[str] = Counter()
        for name, count in self.whole.items():
            if name.startswith("blocks."):
                block = name.split(".")[1]
                whole[block] += count
                split[block] += count if name in self.split else 0
        return {(whole[block], split[block]) for block in whole}


def _part(whole: int, split: int, tensor: int) -> int:
    return whole - split + split // tensor


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
