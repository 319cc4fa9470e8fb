"""Which queries see which keys: those of the same sample, or of the same set of neighbouring samples.

Shape legend
    T, U  query tokens and key tokens of the pack
    K, D  key/value heads, channels of a head
    B, L  samples of one run, tokens of each of them
    S     samples
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, groupby

import torch
from torch import Tensor

from flagdit.errors import RecipeError
from flagdit.model.segments import runs_of

Range = tuple[int, int]
"""First token and the one past the last."""


@dataclass
class Pairs:
    """The samples of a pack as attention sees them. A sample may have no queries, no keys or neither.

    Attributes:
        seqlens_q, seqlens_k: tokens of each sample, as Python ints.
        cu_seqlens_q, cu_seqlens_k: (S+1,) int32 offsets, on the device of the tokens.
        longest_q, longest_k: of the samples; 0 without any.
        all_live: every sample has both queries and keys.
    """

    seqlens_q: tuple[int, ...]
    seqlens_k: tuple[int, ...]
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    # Plain attributes, so that compiled blocks that read them depend on three values instead of on every length.
    longest_q: int = field(init=False)
    longest_k: int = field(init=False)
    all_live: bool = field(init=False)

    def __post_init__(self) -> None:
        assert len(self.seqlens_q) == len(self.seqlens_k), "one number of queries and one of keys for each sample"
        self.longest_q = max(self.seqlens_q, default=0)
        self.longest_k = max(self.seqlens_k, default=0)
        self.all_live = bool(self.seqlens_q) and min(self.seqlens_q) > 0 and min(self.seqlens_k) > 0

    @classmethod
    def of(cls, seqlens_q: Sequence[int], seqlens_k: Sequence[int], device: torch.device | str) -> Pairs:
        """Pairs with their offsets."""
        offsets = [torch.tensor([0, *accumulate(lens)], dtype=torch.int32) for lens in (seqlens_q, seqlens_k)]
        return cls(tuple(seqlens_q), tuple(seqlens_k), offsets[0].to(device), offsets[1].to(device))

    @classmethod
    def within(cls, sets: tuple[int, ...], seqlens: tuple[int, ...], cu_seqlens: Tensor) -> Pairs:
        """Self-attention inside sets of so many neighbouring samples each: to attention a set is one long sample.

        Samples beyond the sets, such as the padding of a pack, are sets of their own.
        """
        sets = sets + (1,) * (len(seqlens) - sum(sets))
        if len(sets) < len(seqlens):
            cu_seqlens = cu_seqlens[list(accumulate(sets, initial=0))]
            seqlens = joined(seqlens, sets)
        return cls(seqlens, seqlens, cu_seqlens, cu_seqlens)

    @cached_property
    def live(self) -> Live:
        """The samples that have both queries and keys; computed once for all layers."""
        lens = list(zip(self.seqlens_q, self.seqlens_k, strict=True))
        kept = [i for i, (queries, keys) in enumerate(lens) if queries and keys]
        pairs = Pairs.of([lens[i][0] for i in kept], [lens[i][1] for i in kept], self.cu_seqlens_q.device)
        return Live(pairs, _ranges(self.seqlens_q, kept), _ranges(self.seqlens_k, kept))

    @cached_property
    def groups(self) -> list[Group]:
        """Runs of neighbouring samples with equally many queries; their keys may differ in number."""
        runs = runs_of(self.seqlens_q)
        ends = list(accumulate(run.count for run in runs))
        device = self.cu_seqlens_k.device
        return [
            Group.build(run.length, self.seqlens_k[end - run.count : end], device)
            for run, end in zip(runs, ends, strict=True)
        ]

    @cached_property
    def blocks(self) -> list[Block]:
        """Runs of neighbouring samples with equally many queries and equally many keys."""
        lens = zip(self.seqlens_q, self.seqlens_k, strict=True)
        return [Block(len(list(run)), *key) for key, run in groupby(lens)]


def set_sizes(pattern: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Sizes of the sets of `count` samples, the pattern repeated; empty: every sample is a set.

    Raises:
        RecipeError: the pattern does not fit.
    """
    pattern = pattern or (1,)
    if min(pattern) < 1 or count % sum(pattern):
        raise RecipeError(f"sets of {', '.join(map(str, pattern))} samples do not make up the {count} of the pack")
    return pattern * (count // sum(pattern))


def joined(seqlens: tuple[int, ...], sets: tuple[int, ...]) -> tuple[int, ...]:
    """Tokens of every set."""
    ends = accumulate(sets)
    return tuple(sum(seqlens[end - size : end]) for end, size in zip(ends, sets, strict=True))


@dataclass(frozen=True)
class Live:
    """Samples that have both queries and keys.

    Attributes:
        pairs: of these samples alone.
        queries, keys: where their tokens stand among all.
    """

    pairs: Pairs
    queries: tuple[Range, ...]
    keys: tuple[Range, ...]


def _ranges(seqlens: tuple[int, ...], kept: list[int]) -> tuple[Range, ...]:
    """Where the tokens of some samples stand; neighbours as one range."""
    ends = list(accumulate(seqlens))
    ranges: list[Range] = []
    for i in kept:
        start, end = ends[i] - seqlens[i], ends[i]
        if ranges and ranges[-1][1] == start:
            start = ranges.pop()[0]
        ranges.append((start, end))
    return tuple(ranges)


def take(x_TX: Tensor, ranges: tuple[Range, ...]) -> Tensor:
    """The tokens of some ranges; one range is a view."""
    parts = [x_TX[start:end] for start, end in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def put(x_NX: Tensor, ranges: tuple[Range, ...], count: int, fill: float = 0.0) -> Tensor:
    """The inverse of `take`: `count` tokens, `fill` outside the ranges."""
    out_TX = x_NX.new_full((count, *x_NX.shape[1:]), fill)
    parts = x_NX.split([end - start for start, end in ranges])
    for (start, end), part in zip(ranges, parts, strict=True):
        out_TX[start:end] = part
    return out_TX


@dataclass(frozen=True)
class Block:
    """`count` neighbouring samples of `len_q` queries and `len_k` keys each."""

    count: int
    len_q: int
    len_k: int


@dataclass(frozen=True)
class Group:
    """Samples that one call to SDPA serves.

    Attributes:
        len_q: queries of each sample.
        seqlens_k: keys of each sample.
        places: where each key goes in the padded (B·L) keys; None when all samples have equally many keys.
        mask_B11L: True where there is a key; None when all are.
    """

    len_q: int
    seqlens_k: tuple[int, ...]
    places: Tensor | None
    mask_B11L: Tensor | None

    @classmethod
    def build(cls, len_q: int, seqlens_k: tuple[int, ...], device: torch.device) -> Group:
        longest = max(seqlens_k)
        if min(seqlens_k) == longest:
            return cls(len_q, seqlens_k, None, None)
        mask_BL = torch.arange(longest) < torch.tensor(seqlens_k)[:, None]
        places = mask_BL.flatten().nonzero()[:, 0]
        return cls(len_q, seqlens_k, places.to(device), mask_BL[:, None, None].to(device))

    def batch_keys(self, x_UKD: Tensor) -> Tensor:
        """(U, K, D) of this group → (B, K, L, D), padded where samples differ."""
        count, longest = len(self.seqlens_k), max(self.seqlens_k)
        if self.places is not None:
            empty = x_UKD.new_zeros(count * longest, *x_UKD.shape[1:])
            x_UKD = empty.index_copy(0, self.places, x_UKD)
        return x_UKD.unflatten(0, (count, longest)).transpose(1, 2)
