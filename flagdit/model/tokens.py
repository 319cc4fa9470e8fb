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
from collections.abc import Callable, Sequence, Sized
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

ROWS_AT_ONCE = 1 << 16  # of an index of millions: what is worked on stays in the cache


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
    """Token places inside one sample, counted from its first token."""

    num_tokens: int
    patch: Tensor
    nextline: Tensor
    nextframe: Tensor
    axes_TA: Tensor


@lru_cache(maxsize=4096)
def _geometry(frames: int, rows: int, columns: int, nextline: bool, nextframe: bool) -> _Geometry:
    line = columns + nextline
    frame = rows * line + nextframe
    num_tokens = frames * frame
    at_F = torch.arange(frames) * frame
    at_FH = at_F[:, None] + torch.arange(rows) * line
    at_FHW = at_FH[..., None] + torch.arange(columns)
    patch = at_FHW.flatten()
    nextline_index = (at_FH + columns).flatten() if nextline else torch.empty(0, dtype=torch.long)
    nextframe_index = at_F + rows * line if nextframe else torch.empty(0, dtype=torch.long)
    # A [nextline] stands one column past its row, a [nextframe] one row and column past its frame: no two tokens of
    # a sample share a position.
    axes_TA = torch.empty(num_tokens, 3, dtype=torch.long)
    axes_TA[patch] = torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(columns))
    if nextline:
        ends = torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.tensor([columns]))
        axes_TA[nextline_index] = ends
    if nextframe:
        axes_TA[nextframe_index] = torch.tensor([0, rows, columns]).repeat(frames, 1)
        axes_TA[nextframe_index, 0] = torch.arange(frames)
    return _Geometry(num_tokens, patch, nextline_index, nextframe_index, axes_TA)


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


def build_layout(segments: Sequence[Segment], spec: TokenSpec) -> PackLayout:
    """Places of all tokens of a pack, on the CPU.

    Raises:
        DataError: no segments, an unknown modality, or a size that is not a multiple of the patch.
    """
    if not segments:
        raise DataError("a pack needs at least one sample")
    parts = [_geometry_of(s.shape, s.modality, spec) for s in segments]
    seqlens = tuple(part.num_tokens for part in parts)
    offsets = list(accumulate(seqlens, initial=0))
    starts = offsets[:-1]
    patch_index, patch_segment = {}, {}
    for modality in dict.fromkeys(s.modality for s in segments):
        own = [i for i, s in enumerate(segments) if s.modality == modality]
        patches = [parts[i].patch for i in own]
        patch_index[modality] = torch.cat(patches) + _repeated([starts[i] for i in own], patches)
        patch_segment[modality] = _repeated(own, patches)
    lines, frames = [part.nextline for part in parts], [part.nextframe for part in parts]
    axes = [part.axes_TA for part in parts]
    return PackLayout(
        cu_seqlens=torch.tensor(offsets, dtype=torch.int32),
        segment_ids=_repeated(range(len(parts)), axes),
        raster_T=torch.arange(offsets[-1]) - _repeated(starts, axes),
        axes_TA=torch.cat(axes),
        patch_index=patch_index,
        patch_segment=patch_segment,
        nextline_index=torch.cat(lines) + _repeated(starts, lines),
        nextframe_index=torch.cat(frames) + _repeated(starts, frames),
        seqlens=seqlens,
    )


def _repeated(values: Sequence[int], parts: Sequence[Tensor]) -> Tensor:
    """Each value as many times as its part is long: (Σ len(part),) int64."""
    return torch.from_numpy(np.repeat(np.array(values, np.int64), [len(part) for part in parts]))


def patchify(latent_CFHW: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """(C, F, H, W) → (N, P), patches in raster order, features ordered (C, pf, ph, pw).

    Raises:
        DataError: a size is not a multiple of the patch.
    """
    c = latent_CFHW.shape[0]
    f, h, w = _patches_along(latent_CFHW, patch)
    pf, ph, pw = patch
    return latent_CFHW.reshape(c, f, pf, h, ph, w, pw).permute(1, 3, 5, 0, 2, 4, 6).reshape(f * h * w, c * pf * ph * pw)


def patchify_all(
    latents: Sequence[Tensor], patch: tuple[int, int, int], empty: Callable[..., Tensor] = torch.empty
) -> Tensor:
    """`patchify` of several latents of equally many channels, one below the other.

    Args:
        empty: makes the tensor for the result, as `torch.empty` does.

    Raises:
        DataError: a size is not a multiple of the patch.
    """
    pf, ph, pw = patch
    if pw % 2 or any(x.dtype != torch.float32 or x.requires_grad for x in latents):
        return torch.cat([patchify(x, patch) for x in latents])
    grids = [_patches_along(x, patch) for x in latents]
    counts = [math.prod(grid) for grid in grids]
    channels = latents[0].shape[0]
    patches_NP = empty(sum(counts), channels * pf * ph * pw, device=latents[0].device)
    # Two columns travel as one number of eight bytes, which takes a quarter of the time.
    parts = patches_NP.view(torch.int64).split(counts)
    for part, latent, (f, h, w) in zip(parts, latents, grids, strict=True):
        pairs = latent.contiguous().view(torch.int64).view(channels, f, pf, h, ph, w, pw // 2)
        part.view(f, h, w, channels, pf, ph, pw // 2).copy_(pairs.permute(1, 3, 5, 0, 2, 4, 6))
    return patches_NP


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
    empty: Callable[..., Tensor] = torch.empty,
) -> PackedBatch:
    """Samples to one pack.

    Args:
        segments: identity and geometry of the samples.
        latents: one (C, F, H, W) tensor per sample, or None to sample from noise (the batch then has no patches).
        spec: how the model cuts latents.
        text: packed captions, one entry per sample.
        labels: class ids, one per sample.
        empty: makes the tensors of patches, as `torch.empty` does.

    Raises:
        DataError: counts or shapes disagree, or a size is not a multiple of the patch.
    """
    count = len(segments)
    given: dict[str, Sized | None] = {"captions": text.seqlens if text else None, "labels": labels, "latents": latents}
    for name, values in given.items():
        if values is not None and len(values) != count:
            raise DataError(f"{len(values)} {name} for {count} samples")
    layout = build_layout(segments, spec)
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
