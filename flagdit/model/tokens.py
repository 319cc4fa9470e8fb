"""Latents to packed tokens and back: patches, special tokens and the position of every token.

Shape legend
    C, F, H, W  channels, frames or views, rows, columns of a latent
    N, P        patch tokens of one modality in the pack; features of one patch, ordered (C, pf, ph, pw)
    T, S        tokens and samples of the pack
    A           position axes: 3, as (frame, row, column)

A sample's tokens run in raster order, frame by frame. Every row of patches ends with a [nextline] token and every
frame of a modality that has frames with a [nextframe] token (arXiv 2405.05945, section 2.2.1), where the model uses
them. Everything here is a pure function of shapes, exact for every shape, and its inverse loses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from flagdit.batch import PackedBatch, PackedText, PackLayout, Patches, Segment
from flagdit.config.schema import ModelConfig
from flagdit.errors import DataError
from flagdit.model.modality import MODALITIES, Modality

Shape = tuple[int, int, int, int]
Empty = Callable[..., Tensor]
"""Makes a tensor as `torch.empty` does; a loader process has it made in shared memory."""

ROWS_AT_ONCE = 1 << 16  # of an index of millions: what is worked on stays in the cache
ORDERED_AT_ONCE = 1 << 17  # pairs of latent columns, whose order takes as much memory as they


@dataclass(frozen=True)
class TokenSpec:
    """How a model cuts latents into tokens.

    Attributes:
        patch_size: rows and columns of latent per token.
        nextline: a [nextline] token ends every row.
        nextframe: a [nextframe] token ends every frame of modalities that have frames.
    """

    patch_size: int
    nextline: bool
    nextframe: bool

    @classmethod
    def from_model(cls, cfg: ModelConfig) -> TokenSpec:
        return cls(cfg.patch_size, cfg.nextline, cfg.nextframe)


def modality_of(name: str) -> Modality:
    """The row of that name.

    Raises:
        DataError: no such modality.
    """
    if name not in MODALITIES:
        raise DataError(f"there is no modality {name!r}", fix=f"Known ones: {', '.join(MODALITIES)}.")
    return MODALITIES[name]


def grid(shape: Shape, modality: str, patch_size: int) -> tuple[int, int, int]:
    """Patches along frames, rows and columns.

    Raises:
        DataError: the size is not a multiple of the patch; the message names the nearest sizes that are.
    """
    patch = modality_of(modality).patch(patch_size)
    for axis, size, step in zip(("frames", "rows", "columns"), shape[1:], patch, strict=True):
        if size < 1 or size % step:
            near = [n for n in (size // step * step, (size // step + 1) * step) if n > 0]
            raise DataError(
                f"{size} latent {axis} of {'×'.join(map(str, shape))} cannot be cut into patches of {step}",
                fix=f"Use {' or '.join(map(str, near))} {axis} (in latent units), or another model.patch_size.",
            )
    return (shape[1] // patch[0], shape[2] // patch[1], shape[3] // patch[2])


@dataclass(frozen=True)
class _Geometry:
    """Token places inside one sample, counted from its first token; int64."""

    raster: np.ndarray
    axes_TA: np.ndarray
    patch: np.ndarray
    nextline: np.ndarray
    nextframe: np.ndarray


@lru_cache(maxsize=4096)
def _geometry(frames: int, rows: int, columns: int, nextline: bool, nextframe: bool) -> _Geometry:
    line = columns + nextline
    frame = rows * line + nextframe
    num_tokens = frames * frame
    at_F = np.arange(frames) * frame
    at_FH = at_F[:, None] + np.arange(rows) * line
    patch = (at_FH[..., None] + np.arange(columns)).reshape(-1)
    nextline_index = (at_FH + columns).reshape(-1) if nextline else np.empty(0, np.int64)
    nextframe_index = at_F + rows * line if nextframe else np.empty(0, np.int64)
    # A [nextline] stands one column past its row, a [nextframe] one row and column past its frame: no two tokens of
    # a sample share a position.
    axes_TA = np.empty((num_tokens, 3), np.int64)
    axes_TA[patch] = np.indices((frames, rows, columns)).reshape(3, -1).T
    if nextline:
        axes_TA[nextline_index] = np.indices((frames, rows, 1)).reshape(3, -1).T + np.array([0, 0, columns])
    if nextframe:
        axes_TA[nextframe_index] = np.indices((frames, 1, 1)).reshape(3, -1).T + np.array([0, rows, columns])
    return _Geometry(np.arange(num_tokens), axes_TA, patch, nextline_index, nextframe_index)


def _geometry_of(shape: Shape, modality: str, spec: TokenSpec) -> _Geometry:
    nextframe = spec.nextframe and modality_of(modality).has_frames
    return _geometry(*grid(shape, modality, spec.patch_size), spec.nextline, nextframe)


def num_tokens(shape: Shape, modality: str, spec: TokenSpec) -> int:
    """Tokens of one sample, special tokens included.

    Raises:
        DataError: unknown modality, or a size that is not a multiple of the patch.
    """
    frames, rows, columns = grid(shape, modality, spec.patch_size)
    nextframe = spec.nextframe and modality_of(modality).has_frames
    return frames * (rows * (columns + spec.nextline) + nextframe)


def num_tokens_of_all(shapes_N4: np.ndarray, modality: str, spec: TokenSpec) -> np.ndarray:
    """`num_tokens` of many latents of one modality at once: (N,) int32 from (N, 4) shapes that suit the patch."""
    _, step_h, step_w = modality_of(modality).patch(spec.patch_size)
    nextframe = np.int32(spec.nextframe and modality_of(modality).has_frames)
    found = np.empty(len(shapes_N4), np.int32)
    for start in range(0, len(found), ROWS_AT_ONCE):
        _, frames, rows, columns = np.ascontiguousarray(shapes_N4[start : start + ROWS_AT_ONCE].T)
        line = columns // step_w + np.int32(spec.nextline)
        found[start : start + ROWS_AT_ONCE] = frames * (rows // step_h * line + nextframe)
    return found


def build_layout(segments: Sequence[Segment], spec: TokenSpec, empty: Empty = torch.empty) -> PackLayout:
    """Places of all tokens of a pack, on the CPU.

    Args:
        empty: makes its tensors, as `torch.empty` does.

    Raises:
        DataError: no segments, an unknown modality, or a size that is not a multiple of the patch.
    """
    if not segments:
        raise DataError("a pack needs at least one sample")
    parts = [_geometry_of(s.shape, s.modality, spec) for s in segments]
    seqlens = tuple(len(part.raster) for part in parts)
    offsets = list(accumulate(seqlens, initial=0))
    everyone = range(len(parts))

    def joined(places: Sequence[np.ndarray], shifts: Sequence[int] | None = None) -> Tensor:
        """Places of samples, one after the other, each shifted to where it begins in the pack."""
        whole = empty(sum(map(len, places)), *places[0].shape[1:], dtype=torch.int64, device="cpu")
        for own, to, shift in zip(places, _slices(whole, places), shifts or [0] * len(places), strict=True):
            np.add(own, shift, out=to)
        return whole

    def owners(own: Sequence[int], places: Sequence[np.ndarray]) -> Tensor:
        """The number of each sample, as often as it has places."""
        whole = empty(sum(map(len, places)), dtype=torch.int64, device="cpu")
        for i, to in zip(own, _slices(whole, places), strict=True):
            to[:] = i
        return whole

    rasters = [part.raster for part in parts]
    patch_index, patch_segment = {}, {}
    for modality in dict.fromkeys(s.modality for s in segments):
        own = [i for i in everyone if segments[i].modality == modality]
        patches = [parts[i].patch for i in own]
        patch_index[modality] = joined(patches, [offsets[i] for i in own])
        patch_segment[modality] = owners(own, patches)
    return PackLayout(
        cu_seqlens=torch.tensor(offsets, dtype=torch.int32, device="cpu"),
        segment_ids=owners(everyone, rasters),
        raster_T=joined(rasters),
        axes_TA=joined([part.axes_TA for part in parts]),
        patch_index=patch_index,
        patch_segment=patch_segment,
        nextline_index=joined([part.nextline for part in parts], offsets[:-1]),
        nextframe_index=joined([part.nextframe for part in parts], offsets[:-1]),
        seqlens=seqlens,
    )


def _slices(whole: Tensor, parts: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """The memory of a tensor, cut into as many rows as the parts have."""
    rows, start = whole.numpy(), 0
    for part in parts:
        yield rows[start : (start := start + len(part))]


def patchify(latent_CFHW: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """(C, F, H, W) → (N, P), patches in raster order, features ordered (C, pf, ph, pw).

    Raises:
        DataError: a size is not a multiple of the patch.
    """
    c = latent_CFHW.shape[0]
    f, h, w = _patches_along(latent_CFHW, patch)
    pf, ph, pw = patch
    return latent_CFHW.reshape(c, f, pf, h, ph, w, pw).permute(1, 3, 5, 0, 2, 4, 6).reshape(f * h * w, c * pf * ph * pw)


def patchify_all(latents: Sequence[Tensor], patch: tuple[int, int, int], empty: Empty = torch.empty) -> Tensor:
    """`patchify` of several latents of equally many channels, one below the other.

    Args:
        empty: makes the tensor for the result, as `torch.empty` does.

    Raises:
        DataError: a size is not a multiple of the patch.
    """
    quick = all(x.dtype == torch.float32 and x.device.type == "cpu" and not x.requires_grad for x in latents)
    if patch[2] % 2 or not quick:
        return torch.cat([patchify(x, patch) for x in latents])
    counts = [math.prod(_patches_along(x, patch)) for x in latents]
    patches_NP = empty(sum(counts), latents[0].shape[0] * math.prod(patch), dtype=torch.float32, device="cpu")
    parts = np.split(patches_NP.numpy().view(np.int64), list(accumulate(counts))[:-1])
    for part, latent in zip(parts, latents, strict=True):
        pairs = latent.contiguous().numpy().view(np.int64)
        if pairs.size > ORDERED_AT_ONCE:
            part[:] = _cut(pairs, patch)
        else:
            np.take(pairs.reshape(-1), _pair_order(pairs.shape, patch), out=part.reshape(-1), mode="clip")
    return patches_NP


@lru_cache(maxsize=64)
def _pair_order(shape: tuple[int, ...], patch: tuple[int, int, int]) -> np.ndarray:
    """Places in a latent of the pairs of its patches, one patch after the other.

    Two columns travel as one number of eight bytes, which by such a list takes a sixth of the time of single ones.
    """
    return _cut(np.arange(math.prod(shape)).reshape(shape), patch).reshape(-1)


def _cut(pairs_CFHW: np.ndarray, patch: tuple[int, int, int]) -> np.ndarray:
    """`patchify` of pairs of columns."""
    c, *sizes = pairs_CFHW.shape
    pf, ph, pw = patch[0], patch[1], patch[2] // 2
    f, h, w = (size // step for size, step in zip(sizes, (pf, ph, pw), strict=True))
    return (
        pairs_CFHW.reshape(c, f, pf, h, ph, w, pw).transpose(1, 3, 5, 0, 2, 4, 6).reshape(f * h * w, c * pf * ph * pw)
    )


def _patches_along(latent_CFHW: Tensor, patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """Frames, rows and columns of patches.

    Raises:
        DataError: a size is not a multiple of the patch.
    """
    sizes = latent_CFHW.shape[1:]
    if any(size % step for size, step in zip(sizes, patch, strict=True)):
        raise DataError(f"a latent of {tuple(latent_CFHW.shape)} cannot be cut into patches of {patch}")
    f, h, w = (size // step for size, step in zip(sizes, patch, strict=True))
    return f, h, w


def unpatchify(x_NP: Tensor, shape: Shape, patch: tuple[int, int, int]) -> Tensor:
    """(N, P) → (C, F, H, W): the inverse of `patchify`."""
    c, *sizes = shape
    f, h, w = (size // step for size, step in zip(sizes, patch, strict=True))
    pf, ph, pw = patch
    return x_NP.reshape(f, h, w, c, pf, ph, pw).permute(3, 0, 4, 1, 5, 2, 6).reshape(shape)


def pack(
    segments: Sequence[Segment],
    latents: Sequence[Tensor] | None,
    spec: TokenSpec,
    *,
    text: PackedText | None = None,
    labels: Sequence[int] | Tensor | None = None,
    empty: Empty = torch.empty,
) -> PackedBatch:
    """Samples to one pack.

    Args:
        segments: identity and geometry of the samples.
        latents: one (C, F, H, W) tensor per sample, or None to sample from noise (the batch then has no patches).
        spec: how the model cuts latents.
        text: packed captions, one entry per sample.
        labels: class ids, one per sample.
        empty: makes the tensors of layout and patches, as `torch.empty` does.

    Raises:
        DataError: counts or shapes disagree, or a size is not a multiple of the patch.
    """
    count = len(segments)
    given: dict[str, Sized | None] = {"captions": text.seqlens if text else None, "labels": labels, "latents": latents}
    for name, values in given.items():
        if values is not None and len(values) != count:
            raise DataError(f"{len(values)} {name} for {count} samples")
    layout = build_layout(segments, spec, empty)
    grouped: dict[str, list[Tensor]] = {}
    for segment, latent in zip(segments, latents or (), strict=False):
        if tuple(latent.shape) != tuple(segment.shape):
            raise DataError(
                f"a latent of {tuple(latent.shape)} for a sample of {segment.shape}",
                where=segment.key or f"sample {segment.sample_id}",
            )
        grouped.setdefault(segment.modality, []).append(latent)
    patches = {
        modality: patchify_all(own, modality_of(modality).patch(spec.patch_size), empty)
        for modality, own in grouped.items()
    }
    labels_S = None if labels is None else torch.as_tensor(labels, dtype=torch.long)
    return PackedBatch(tuple(segments), layout, patches, text, labels_S)


def unpack(patches: Patches, segments: Sequence[Segment], spec: TokenSpec) -> list[Tensor]:
    """Patch features of a pack → one (C, F, H, W) latent per sample, in the order of the segments."""
    used = dict.fromkeys(patches, 0)
    latents = []
    for segment in segments:
        frames, rows, columns = grid(segment.shape, segment.modality, spec.patch_size)
        start, count = used[segment.modality], frames * rows * columns
        used[segment.modality] += count
        patch = modality_of(segment.modality).patch(spec.patch_size)
        latents.append(unpatchify(patches[segment.modality][start : start + count], segment.shape, patch))
    return latents
