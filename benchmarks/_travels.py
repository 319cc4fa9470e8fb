"""What one training step sends, by the formulas of docs/parallelism.md ("What travels").

Letters as there: T tokens of a pack, S samples, M text tokens; L blocks, E width, H and K query and key/value heads of
D channels; n, U, R, Z ranks of the tensor, Ulysses, ring and shards axes; e bytes of an element.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import accumulate

import torch
from _collectives import Amount, Traffic

from flagdit.batch import PackedBatch
from flagdit.config.schema import Recipe
from flagdit.model.block import TP_PLAN
from flagdit.model.flag_dit import FlagDiT
from flagdit.parallel.deepspeed import BUCKET
from flagdit.parallel.mesh import ParallelContext

Item = tuple[str, str, int, float]
"""Axis, kind, calls, bytes of one call."""

PERSISTENT = 100_000
"""ZeRO 3: a weight of at most this many elements stays gathered (DeepSpeed's stage3_param_persistence_threshold)."""


def step_traffic(recipe: Recipe, mesh: ParallelContext, packs: Iterable[PackedBatch]) -> Traffic:
    """What this rank hands to its groups in one optimizer step.

    Args:
        packs: its micro-batches, whole.
    """
    model = Shape.of(recipe, mesh)
    found: Traffic = defaultdict(Amount)
    items = [*(item for pack in packs for item in micro_batch(model, mesh, pack)), *update(model, mesh)]
    for axis, kind, calls, size in items:
        if calls:
            found[axis, kind] += Amount(calls, round(size)) if calls == 1 else Amount(1, round(size)) * calls
    return dict(found)


@dataclass(frozen=True)
class Shape:
    """What the formulas need of a recipe and a mesh.

    Attributes:
        e: bytes of a weight or activation.
        replicated: elements of each parameter that is whole on all tensor ranks while each sees a part of its gradient.
        local: elements of each parameter's part on this tensor rank, and whether it is a matrix.
        forwards: times that a block runs forward in a step: 2 with block checkpointing.
    """

    recipe: Recipe
    e: int
    replicated: tuple[int, ...]
    local: tuple[tuple[int, bool], ...]
    forwards: int

    @classmethod
    def of(cls, recipe: Recipe, mesh: ParallelContext) -> Shape:
        with torch.device("meta"):
            model = FlagDiT(recipe.model)
        replicated, local = [], []
        for name, p in model.named_parameters():
            kind = _kind(name)
            split = kind in ("column", "column_gather", "heads", "row") or (
                kind == "qk_norm" and recipe.model.qk_norm == "layer"
            )
            if not split and (mesh.sequence or kind in ("feeds_split", "qk_norm")):
                replicated.append(p.numel())
            local.append((p.numel() // (mesh.tensor.size if split else 1), p.ndim >= 2))
        return cls(
            recipe,
            2 if recipe.train.precision == "bf16" else 4,
            tuple(replicated),
            tuple(local),
            2 if recipe.model.checkpointing == "block" else 1,
        )


def _kind(parameter: str) -> str | None:
    names = [parameter, parameter.rpartition(".")[0], parameter.partition(".")[0]]
    return next((kind for name in names for pattern, kind in TP_PLAN.items() if fnmatch(name, pattern)), None)


def micro_batch(model: Shape, mesh: ParallelContext, pack: PackedBatch) -> Iterator[Item]:
    """Forward and backward of one pack."""
    tokens = pack.layout.num_tokens
    parts = mesh.context.size * (mesh.tensor.size if mesh.sequence else 1)
    attended = -(-tokens // parts) * parts // mesh.context.size
    if mesh.tensor.size > 1:
        yield from tensor(model, mesh, pack, attended)
    if mesh.ulysses.size > 1:
        yield from ulysses(model, mesh, attended)
    if mesh.ring.size > 1:
        yield from ring(model, mesh, pack, attended)
    if mesh.shards.size > 1 and model.recipe.parallel.zero > 1:
        yield from gradients(model, mesh)


def tensor(model: Shape, mesh: ParallelContext, pack: PackedBatch, attended: int) -> Iterator[Item]:
    m, n, e = model.recipe.model, mesh.tensor.size, model.e
    layers, passes = m.num_layers, model.forwards
    stream = attended * m.dim * e
    chunks, last_chunks = (6, 2) if m.block == "flag" else (4, 1)
    modulation, last = (len(pack.segments) * c * m.dim * e for c in (chunks, last_chunks))
    yield "tensor", "all_gather", passes * layers, modulation / n
    yield "tensor", "all_gather", 1, last / n
    if mesh.sequence:
        # Forward: attention and feed-forward gather, then scatter sums. Backward: both again the other way round, and
        # the inputs of the split linears once more.
        yield "tensor", "all_gather", (2 * passes + 4) * layers, stream / n
        yield "tensor", "reduce_scatter", (2 * passes + 2) * layers, stream
        yield "tensor", "reduce_scatter", layers, modulation
        yield "tensor", "reduce_scatter", 1, last
    else:
        yield "tensor", "all_reduce", (2 * passes + 2) * layers, stream
    if m.qk_norm == "layer":
        text = sum(pack.text.seqlens) if pack.text else 0
        for count, norms in ((attended, 2), (text, 1 if text else 0)):
            yield "tensor", "all_gather", norms * passes * layers, 2 * count * 4
            yield "tensor", "all_reduce", norms * layers, 2 * count * 4
    for size in model.replicated:
        yield "tensor", "all_reduce", 1, size * e


def ulysses(model: Shape, mesh: ParallelContext, attended: int) -> Iterator[Item]:
    heads, kv_heads, width = _heads(model, mesh)
    times = (model.forwards + 1) * model.recipe.model.num_layers
    yield "ulysses", "all_to_all", times, attended * (heads + 2 * kv_heads) * width * model.e
    yield "ulysses", "all_to_all", times, attended * heads * width * model.e


def ring(model: Shape, mesh: ParallelContext, pack: PackedBatch, attended: int) -> Iterator[Item]:
    part = attended * mesh.ulysses.size
    _, kv_heads, width = _heads(model, mesh)
    numbers = 2 * part * (kv_heads // mesh.ulysses.size) * width
    peers = len(sharing(pack, part, mesh.ring.rank))
    layers = model.recipe.model.num_layers
    yield "ring", "send", (model.forwards + 1) * layers * peers, numbers * model.e
    yield "ring", "send", layers * peers, numbers * 4


def sharing(pack: PackedBatch, part: int, own: int) -> set[int]:
    """The other ranges of `part` tokens that have a sample in common with range `own`."""
    ends = list(accumulate(pack.layout.seqlens))
    spans = [(first // part, (end - 1) // part) for first, end in zip([0, *ends], ends, strict=False)]
    # What pads the last range is one more sample.
    spans.append((ends[-1] // part, -(-ends[-1] // part) - 1))
    return {r for first, last in spans if first <= own <= last for r in range(first, last + 1)} - {own}


def _heads(model: Shape, mesh: ParallelContext) -> tuple[int, int, int]:
    """Query heads and key/value heads of a tensor rank, the latter with the copies that Ulysses makes; channels."""
    m = model.recipe.model
    heads, kv_heads = m.num_heads // mesh.tensor.size, (m.num_kv_heads or m.num_heads) // mesh.tensor.size
    size = mesh.ulysses.size
    return heads, kv_heads * (size // math.gcd(kv_heads, size)), m.dim // m.num_heads


def gradients(model: Shape, mesh: ParallelContext) -> Iterator[Item]:
    """Gradients travel in fp32, a bucket at a time."""
    total, shards = sum(size for size, _ in model.local), mesh.shards.size
    assert total <= BUCKET, "a larger model needs more than one bucket"
    if model.recipe.parallel.zero == 3:
        parts = [(-(-size // shards), size > PERSISTENT) for size, _ in model.local]
        # Fetched once for forward and backward: a model of less than DeepSpeed's stage3_max_reuse_distance stays.
        fetched = sum(part for part, large in parts if large)
        yield "shards", "all_gather", 1 if fetched else 0, fetched * model.e
        yield "shards", "reduce_scatter", 1, sum(part for part, _ in parts) * shards * 4
    else:
        yield "shards", "all_reduce", 1, total * 4


def update(model: Shape, mesh: ParallelContext) -> Iterator[Item]:
    """What a step sends once: counts, loss, norm, verdict, and what ZeRO does at the end of it."""
    if mesh.data.size > 1:
        yield "data", "all_reduce", 1, 4 * 8  # counts of samples, tokens, FLOPs and the loss's denominator
    if mesh.distinct.group is not None:
        yield ("world" if mesh.sequence else "shards"), "all_reduce", 1, 4  # loss
    yield "world", "all_reduce", 1, 4  # gradient norm
    yield "world", "all_reduce", 1, 8  # the guard's verdict
    shards, stage = mesh.shards.size, model.recipe.parallel.zero
    groups = [[size for size, matrix in model.local if matrix is wanted] for wanted in (True, False)]
    if stage == 3:
        for axis, ranks in (("shards", shards), ("tensor", mesh.tensor.size)):
            if ranks > 1:
                yield axis, "all_reduce", len(groups), 8  # DeepSpeed's own norm
    if shards == 1:
        return
    if stage == 1:
        yield from gradients(model, mesh)
    if stage < 3:
        for group in groups:
            yield "shards", "all_gather", 1, -(-sum(group) // (2 * shards)) * 2 * model.e
        return
    for size, _ in model.local:
        if size <= PERSISTENT:
            yield "shards", "all_gather", 1, -(-size // shards) * model.e
