"""The one contract between data and model: many samples of any modality and size as one flat sequence.

Shape legend
    S  samples (segments) in the pack
    T  tokens in the pack: patches and special tokens of all samples, one after the other
    N  patch tokens of one modality in the pack
    P  features of one patch: C·pf·ph·pw, ordered (C, pf, ph, pw)
    M  text tokens of all samples
    Y  width of the text features
    A  position axes: 3, as (frame, row, column)

There is no padding anywhere. Patch features of different modalities differ in width, so they live in a dict by
modality; inside one modality they follow the order of the segments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

Patches = dict[str, Tensor]
"""Patch features by modality: each (N, P), samples in segment order."""


@dataclass(frozen=True)
class Segment:
    """One sample's identity and geometry.

    Attributes:
        sample_id: index in the data of the run; with the run seed and the epoch it decides noise, timestep and dropout.
        modality: a row of `model/modality.py`.
        shape: latent size (channels, frames or views, rows, columns).
        key: name for people, in ledgers and errors: "shard/member".
        epoch: pass over its data set; in a mixture, sets of different sizes are at different passes.
    """

    sample_id: int
    modality: str
    shape: tuple[int, int, int, int]
    key: str = ""
    epoch: int = 0


@dataclass(frozen=True)
class PackLayout:
    """Where every token of a pack stands; a pure function of the segments' shapes (see `model/tokens.py`).

    Attributes:
        cu_seqlens: (S+1,) int32, token offsets of the segments; also as Python ints in `seqlens`.
        segment_ids: (T,) int64, the segment of each token.
        raster_T: (T,) int64, 1D position in the sample, special tokens counted (Flag-DiT).
        axes_TA: (T, 3) int64, (frame, row, column) position (axial RoPE).
        patch_index: modality → (N,) int64 places of its patch tokens in the sequence.
        patch_segment: modality → (N,) int64 segment of each patch token.
        nextline_index, nextframe_index: places of the special tokens, int64.
        seqlens: tokens of each segment, as Python ints (for loops that must not synchronise with a GPU).
    """

    cu_seqlens: Tensor
    segment_ids: Tensor
    raster_T: Tensor
    axes_TA: Tensor
    patch_index: dict[str, Tensor]
    patch_segment: dict[str, Tensor]
    nextline_index: Tensor
    nextframe_index: Tensor
    seqlens: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return sum(self.seqlens)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> PackLayout:
        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=non_blocking)

        return replace(
            self,
            cu_seqlens=move(self.cu_seqlens),
            segment_ids=move(self.segment_ids),
            raster_T=move(self.raster_T),
            axes_TA=move(self.axes_TA),
            patch_index={m: move(i) for m, i in self.patch_index.items()},
            patch_segment={m: move(i) for m, i in self.patch_segment.items()},
            nextline_index=move(self.nextline_index),
            nextframe_index=move(self.nextframe_index),
        )


@dataclass(frozen=True)
class Share:
    """What a rank that holds a part of a pack's tokens knows of the rest (`parallel/context.py`).

    Attributes:
        attended: the tokens from which this rank makes queries, keys and values: its own ones, and under sequence
            parallelism those of the other tensor ranks.
        seqlens: tokens of each sample of the whole pack; what pads the pack comes last, as a sample of its own.
        cu_seqlens: their offsets, int32.
        noise: modality → for each of its samples, the first element and the number of elements that are this rank's.
    """

    attended: PackLayout
    seqlens: tuple[int, ...]
    cu_seqlens: Tensor
    noise: dict[str, tuple[tuple[int, int], ...]]


@dataclass(frozen=True)
class PackedText:
    """Text features of all samples, one after the other.

    Attributes:
        features_MY: (M, Y) encoder outputs of the valid tokens only; at least one token per sample.
        seqlens: text tokens of each segment, as Python ints.
    """

    features_MY: Tensor
    seqlens: tuple[int, ...]

    @classmethod
    def pack(cls, features: Sequence[Tensor], empty: Callable[..., Tensor] | None = None) -> PackedText:
        """Packs one (L, Y) tensor per sample; `empty` makes the tensor that holds them, as `torch.empty` does."""
        seqlens = tuple(len(f) for f in features)
        out = empty and empty(sum(seqlens), features[0].shape[1], dtype=features[0].dtype)
        return cls(torch.cat(list(features), out=out), seqlens)

    def unpack(self) -> tuple[Tensor, ...]:
        return self.features_MY.split(list(self.seqlens))

    def replaced(self, where: Sequence[bool], null_LY: Tensor) -> PackedText:
        """The same pack with the captions of the marked samples replaced by `null_LY` (caption dropout, guidance)."""
        if not any(where):
            return self
        null = null_LY.to(self.features_MY)
        return PackedText.pack([null if drop else f for drop, f in zip(where, self.unpack(), strict=True)])

    @property
    def cu_seqlens(self) -> Tensor:
        """(S+1,) int32 on the features' device."""
        ends = torch.tensor((0, *self.seqlens)).cumsum(0).to(torch.int32)
        return ends.to(self.features_MY.device, non_blocking=True)


@dataclass(frozen=True)
class PackedBatch:
    """A pack: geometry, clean data and conditions of many samples.

    Attributes:
        segments: identity and geometry of the samples.
        layout: where the tokens stand.
        patches: clean patch features x1 by modality; empty when sampling from noise.
        text: captions as packed encoder features, for text-conditioned models.
        labels_S: (S,) int64 class ids, for class-conditioned models.
        share: None for a whole pack. Otherwise `layout` and `patches` hold a rank's own tokens only; `segments`, `text`
            and `labels_S` are those of the whole pack.
        weightless: stands in for a pack none of whose samples can be read, so that all ranks run equally many packs; it
            adds nothing to the loss.
    """

    segments: tuple[Segment, ...]
    layout: PackLayout
    patches: Patches
    text: PackedText | None = None
    labels_S: Tensor | None = None
    share: Share | None = None
    weightless: bool = False

    @property
    def attended(self) -> PackLayout:
        """The tokens from which this process makes queries, keys and values."""
        return self.share.attended if self.share else self.layout

    def noise_spans(self, modality: str) -> tuple[tuple[int, int], ...]:
        """First element and number of elements, in patch order, that this process holds of a modality's samples."""
        if self.share:
            return self.share.noise[modality]
        return tuple((0, math.prod(s.shape)) for s in self.segments if s.modality == modality)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> PackedBatch:
        return replace(
            self,
            layout=self.layout.to(device, non_blocking),
            patches={m: x.to(device, non_blocking=non_blocking) for m, x in self.patches.items()},
            text=self.text
            and replace(self.text, features_MY=self.text.features_MY.to(device, non_blocking=non_blocking)),
            labels_S=None if self.labels_S is None else self.labels_S.to(device, non_blocking=non_blocking),
            share=self.share
            and replace(
                self.share,
                attended=self.share.attended.to(device, non_blocking),
                cu_seqlens=self.share.cu_seqlens.to(device, non_blocking=non_blocking),
            ),
        )


def concat(batches: Sequence[PackedBatch]) -> PackedBatch:
    """Joins packs on one device into one; their samples keep their order."""
    first = batches[0]
    assert all((b.text is None, b.labels_S is None) == (first.text is None, first.labels_S is None) for b in batches)
    layouts = [b.layout for b in batches]
    tokens = list(accumulate((len(x.segment_ids) for x in layouts), initial=0))[:-1]
    samples = list(accumulate((len(x.seqlens) for x in layouts), initial=0))[:-1]
    modalities = list(dict.fromkeys(m for x in layouts for m in x.patch_index))

    def join(tensors: Sequence[Tensor], shifts: Sequence[int] | None = None) -> Tensor:
        return torch.cat([x + s for x, s in zip(tensors, shifts, strict=True)] if shifts else list(tensors))

    def join_by_modality(dicts: Sequence[dict[str, Tensor]], shifts: Sequence[int] | None = None) -> dict[str, Tensor]:
        joined = {}
        for m in modalities:
            having = [i for i, d in enumerate(dicts) if m in d]
            if having:
                joined[m] = join([dicts[i][m] for i in having], shifts and [shifts[i] for i in having])
        return joined

    layout = replace(
        first.layout,
        cu_seqlens=torch.cat(
            [first.layout.cu_seqlens[:1], *[x.cu_seqlens[1:] + o for x, o in zip(layouts, tokens, strict=True)]]
        ),
        segment_ids=join([x.segment_ids for x in layouts], samples),
        raster_T=join([x.raster_T for x in layouts]),
        axes_TA=join([x.axes_TA for x in layouts]),
        patch_index=join_by_modality([x.patch_index for x in layouts], tokens),
        patch_segment=join_by_modality([x.patch_segment for x in layouts], samples),
        nextline_index=join([x.nextline_index for x in layouts], tokens),
        nextframe_index=join([x.nextframe_index for x in layouts], tokens),
        seqlens=tuple(n for x in layouts for n in x.seqlens),
    )
    texts = [b.text for b in batches if b.text is not None]
    labels = [b.labels_S for b in batches if b.labels_S is not None]
    return PackedBatch(
        segments=tuple(s for b in batches for s in b.segments),
        layout=layout,
        patches=join_by_modality([b.patches for b in batches]),
        text=PackedText(torch.cat([x.features_MY for x in texts]), tuple(n for x in texts for n in x.seqlens))
        if texts
        else None,
        labels_S=torch.cat(labels) if labels else None,
    )
