"""Context parallelism: every rank holds a contiguous range of a pack's tokens.

Everything but self-attention works on single tokens and needs nobody else. For self-attention the ranks exchange: by
heads (Ulysses, arXiv 2309.14509): every rank gets all tokens of its part of the heads; by keys and values (ring
attention, arXiv 2310.01889, in `ring.py`); or by heads inside groups that form a ring.

Shape legend
    T        tokens of the whole pack, padded to equal parts
    t        tokens of one rank
    H, K, D  query heads, key/value heads, channels of a head
    U        ranks that exchange heads
    S, P     samples of the pack, features of a patch
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flagdit.batch import PackedBatch, PackLayout, Patches, Share
from flagdit.parallel.mesh import Axis, ParallelContext
from flagdit.parallel.ring import RingAttention


def share(batch: PackedBatch, mesh: ParallelContext, patch_dims: Mapping[str, int]) -> PackedBatch:
    """The part of a whole pack that this rank holds.

    The pack is padded to equal parts. Padding belongs to the last sample wherever single tokens are concerned, and is a
    sample of its own in self-attention, so that nobody sees it; its outputs are dropped with the special tokens'.

    Args:
        batch: whole, on any device; its patches may be empty.
        patch_dims: modality → features of a patch, of every modality that the model knows: all appear in the result,
            with no rows where this rank has none, so that all ranks run the same modules.
    """
    layout = batch.layout
    count = layout.num_tokens
    part = -(-count // (mesh.context.size * mesh.tensor.size)) if mesh.sequence else -(-count // mesh.context.size)
    attended_part = part * mesh.tensor.size if mesh.sequence else part
    attended_start = mesh.context.rank * attended_part
    start = attended_start + (mesh.tensor.rank * part if mesh.sequence else 0)
    own, patches, noise = {}, {}, {}
    for modality, width in patch_dims.items():
        own[modality] = _between(layout.patch_index.get(modality), start, start + part)
        if batch.patches:
            rows = batch.patches.get(modality)
            patches[modality] = layout.raster_T.new_empty(0, width).float() if rows is None else rows[own[modality]]
        noise[modality] = _spans(batch, modality, own[modality])
    padding = mesh.context.size * attended_part - count
    seqlens = layout.seqlens + ((padding,) if padding else ())
    return replace(
        batch,
        layout=restrict(layout, start, start + part, own),
        patches=patches,
        share=Share(
            attended=restrict(layout, attended_start, attended_start + attended_part, {}),
            seqlens=seqlens,
            cu_seqlens=_offsets(seqlens, layout.cu_seqlens),
            noise=noise,
        ),
    )


def restrict(layout: PackLayout, start: int, stop: int, own: Mapping[str, slice]) -> PackLayout:
    """The layout of tokens start to stop, which may reach past the pack's end into its padding.

    Args:
        own: modality → which of its patch tokens lie in the range; others are left out.
    """
    count, last = layout.num_tokens, len(layout.seqlens) - 1
    padding = max(0, stop - max(start, count))
    tokens = slice(min(start, count), min(stop, count))

    def padded(x: Tensor, value: int) -> Tensor:
        return torch.cat([x[tokens], x.new_full((padding, *x.shape[1:]), value)])

    def special(index: Tensor) -> Tensor:
        return index[_between(index, start, stop)] - start

    ends = list(accumulate(layout.seqlens))
    seqlens = [max(0, min(end, stop) - max(end - n, start)) for n, end in zip(layout.seqlens, ends, strict=True)]
    seqlens[last] += padding
    none = layout.nextline_index[:0]
    return PackLayout(
        cu_seqlens=_offsets(seqlens, layout.cu_seqlens),
        segment_ids=padded(layout.segment_ids, last),
        raster_T=padded(layout.raster_T, 0),
        axes_TA=padded(layout.axes_TA, 0),
        patch_index={m: layout.patch_index.get(m, none)[part] - start for m, part in own.items()},
        patch_segment={m: layout.patch_segment.get(m, none)[part] for m, part in own.items()},
        nextline_index=special(layout.nextline_index),
        nextframe_index=special(layout.nextframe_index),
        seqlens=tuple(seqlens),
    )


def _between(index: Tensor | None, start: int, stop: int) -> slice:
    """Which entries of an ascending index lie from start to below stop."""
    if index is None:
        return slice(0, 0)
    bounds = torch.tensor([start, stop], device=index.device)
    first, end = torch.searchsorted(index, bounds).tolist()
    return slice(first, end)


def _spans(batch: PackedBatch, modality: str, own: slice) -> tuple[tuple[int, int], ...]:
    """First element and number of elements of each sample of a modality among its patch tokens `own`."""
    sizes = [math.prod(s.shape) for s in batch.segments if s.modality == modality]
    if not sizes:
        return ()
    width = sum(sizes) // len(batch.layout.patch_index[modality])
    spans, first = [], 0
    for size in sizes:
        begin, end = (min(max(at - first, 0), size // width) for at in (own.start, own.stop))
        spans.append((begin * width, (end - begin) * width))
        first += size // width
    return tuple(spans)


def _offsets(seqlens: list[int] | tuple[int, ...], like: Tensor) -> Tensor:
    return torch.tensor(list(accumulate(seqlens, initial=0)), dtype=torch.int32).to(like.device)


class ContextAttention:
    """Self-attention over tokens that lie on several ranks.

    Args:
        attention: an attention backend of the model: called as attention(q, k, v, pairs), and for rings with `forward`
            and `backward` that give and take the log-sum-exp of every query.
        mesh: says which ranks exchange heads and which pass keys and values around.
    """

    def __init__(self, attention: Any, mesh: ParallelContext):
        self._ulysses = mesh.ulysses
        self._inner: Callable[..., Tensor] = RingAttention(attention, mesh.ring) if mesh.ring.size > 1 else attention

    def __call__(self, q_tHD: Tensor, k_tKD: Tensor, v_tKD: Tensor, pairs: Any) -> Tensor:
        """softmax(q·kᵀ/√D)·v inside each sample of the whole pack: (t, H, D) for this rank's tokens."""
        size = self._ulysses.size
        if size == 1:
            return self._inner(q_tHD, k_tKD, v_tKD, pairs)
        # With fewer key/value heads than ranks, each is sent to all ranks whose queries read it.
        copies = size // math.gcd(k_tKD.shape[1], size)
        if copies > 1:
            k_tKD, v_tKD = (x.repeat_interleave(copies, dim=1) for x in (k_tKD, v_tKD))
        heads, kv_heads = q_tHD.shape[1] // size, k_tKD.shape[1] // size
        # One message instead of three: each rank's heads of queries, keys and values side by side.
        joint_tUhD = torch.cat([x.unflatten(1, (size, -1)) for x in (q_tHD, k_tKD, v_tKD)], dim=2)
        joint_ThD = _Exchange.apply(joint_tUhD.transpose(0, 1), self._ulysses).flatten(0, 1)
        q, k, v = joint_ThD.split([heads, kv_heads, kv_heads], dim=1)
        out_ThD = self._inner(q, k, v, pairs)
        out_UthD = _Exchange.apply(out_ThD.unflatten(0, (size, -1)), self._ulysses)
        return out_UthD.transpose(0, 1).flatten(1, 2)


class _Exchange(torch.autograd.Function):
    """Entry u of the first axis goes to rank u; what rank u sent becomes entry u. Its own inverse and gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _exchange(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _exchange(grad, ctx.axis), None


def _exchange(x: Tensor, axis: Axis) -> Tensor:
    x = x.contiguous()
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=axis.group)
    return received


@dataclass(frozen=True)
class WholeModel:
    """A model on a mesh as a function of whole packs: every rank gives the whole input and gets the whole output.

    For sampling: all ranks call it with the same pack. Attributes it does not have are the model's.

    Attributes:
        model: runs on this rank's tokens.
        mesh: says which they are.
        patch_dims: see `share`.
    """

    model: Any
    mesh: ParallelContext
    patch_dims: Mapping[str, int]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, x: Patches, t_S: Tensor, batch: PackedBatch, inference: object = None) -> Patches:
        own = share(replace(batch, patches=x), self.mesh, self.patch_dims)
        velocity = self.model(own.patches, t_S, own, inference)
        counts = {m: len(index) for m, index in batch.layout.patch_index.items()}
        return {m: self._gather(velocity[m], count) for m, count in counts.items()}

    def _gather(self, part_NP: Tensor, count: int) -> Tensor:
        axis = self.mesh.tokens
        if axis.size == 1:
            return part_NP
        sizes = torch.zeros(axis.size, dtype=torch.long, device=part_NP.device)
        sizes[axis.rank] = len(part_NP)
        dist.all_reduce(sizes, group=axis.group)
        longest = int(sizes.max())
        padded = part_NP.new_zeros(longest, part_NP.shape[1])
        padded[: len(part_NP)] = part_NP
        everyone = part_NP.new_empty(axis.size * longest, part_NP.shape[1])
        dist.all_gather_into_tensor(everyone, padded, group=axis.group)
        rows = [r[:n] for r, n in zip(everyone.unflatten(0, (axis.size, -1)), sizes.tolist(), strict=True)]
        whole = torch.cat(rows)
        assert len(whole) == count
        return whole
