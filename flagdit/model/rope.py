"""Rotary position embedding (arXiv 2104.09864) for one, two or three axes, and its scaling to unseen sizes.

Shape legend
    T, S  tokens and samples of the pack
    H, D  heads, channels of a head
    R     pairs of neighbouring channels that rotate together: D/2
    A     position axes of the rotation

Pair j belongs to axis j mod A and turns by position·theta^(−2A·⌊j/A⌋/D). So A = 1 over the raster index is Flag-DiT,
A = 2 (row, column) is Next-DiT, and A = 3 adds the frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flagdit.batch import PackLayout, Segment
from flagdit.config.schema import ModelConfig
from flagdit.model.tokens import grid

SCALINGS = ("linear", "ntk", "time_aware", "time_switch")


@dataclass(frozen=True)
class RopeScaling:
    """How positions beyond those seen in training are read, on every axis by its own factor s.

    The frequency of a pair with exponent e (frequency theta^−e) is divided by s^p:

    - linear: p = 1, position interpolation (arXiv 2306.15595): layout as trained, details coarser.
    - ntk: p = e, that is theta·s: details as trained, and far positions as near as they were.
    - time_aware: p = min(1, e·d/d_t) with d_t = 1 + (d−1)·t and d channels of an axis (Next-DiT, arXiv 2406.18583,
      section 2.3): from linear at noise, where the layout forms, to ntk at data, where details do.
    - time_switch: linear below `watershed`, ntk from it on, as the official code.

    Attributes:
        method: one of SCALINGS.
        factor: s of all samples and axes.
        trained: s is instead the sample's length on the axis over this one, at least 1: tokens of the sample for raster
            RoPE; patches along (row, column) or (frame, row, column) for axial RoPE.
        watershed: of time_switch.
    """

    method: str
    factor: float = 1.0
    trained: tuple[int, ...] | None = None
    watershed: float = 0.3

    def factors(self, extents_SA: Tensor) -> Tensor:
        """(S, A) factors of samples of these lengths."""
        if self.trained is None:
            return torch.full_like(extents_SA, self.factor)
        return (extents_SA / extents_SA.new_tensor(self.trained)).clamp(min=1)

    def powers(self, t_S: Tensor, exponent_R: Tensor, axis_dim: float) -> Tensor:
        """(S, R) powers p of the factors.

        Args:
            t_S: (S,) times.
            exponent_R: (R,) exponents e of the pairs, from 0 to below 1.
            axis_dim: channels that turn with one axis.
        """
        t_S1, exponent_SR = t_S.float()[:, None], exponent_R.expand(len(t_S), -1)
        if self.method == "linear":
            return torch.ones_like(exponent_SR)
        if self.method == "ntk":
            return exponent_SR
        if self.method == "time_switch":
            return torch.where(t_S1 < self.watershed, 1.0, exponent_SR)
        assert self.method == "time_aware", f"no such scaling: {self.method}"
        return (exponent_SR * axis_dim / (1 + (axis_dim - 1) * t_S1)).clamp(max=1)


@dataclass(frozen=True)
class Rotation:
    """The angles of one pack, as cosines and sines, fp32.

    Attributes:
        cos_TR, sin_TR: (T, R) for every token and pair.
        cis_TR: cos + i·sin, complex: the rotation of a pair as one complex product.
    """

    cos_TR: Tensor
    sin_TR: Tensor
    cis_TR: Tensor

    @classmethod
    def from_angles(cls, angle_TR: Tensor) -> Rotation:
        cos_TR, sin_TR = angle_TR.cos(), angle_TR.sin()
        return cls(cos_TR, sin_TR, torch.complex(cos_TR, sin_TR))

    def __call__(self, x_THD: Tensor) -> Tensor:
        """Rotates the pairs of every head in fp32; returns the dtype of x."""
        pairs_THR = torch.view_as_complex(x_THD.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs_THR * self.cis_TR[:, None]).flatten(-2).to(x_THD.dtype)


def positions(cfg: ModelConfig, layout: PackLayout) -> Tensor:
    """(T, A) positions that the model's RoPE reads."""
    if cfg.rope == "raster":
        return layout.raster_T[:, None]
    return layout.axes_TA[:, -cfg.rope_axes :]


def extents(cfg: ModelConfig, segments: Sequence[Segment], seqlens: Sequence[int], device: torch.device) -> Tensor:
    """(S, A) length of every sample on each axis that the model's RoPE reads, fp32."""
    if cfg.rope == "raster":
        return torch.tensor(seqlens, dtype=torch.float32, device=device)[:, None]
    grids = [grid(s.shape, s.modality, cfg.patch_size)[-cfg.rope_axes :] for s in segments]
    return torch.tensor(grids, dtype=torch.float32, device=device)


def build_rotation(
    cfg: ModelConfig,
    layout: PackLayout,
    t_S: Tensor,
    scaling: RopeScaling | None = None,
    extents_SA: Tensor | None = None,
) -> Rotation:
    """The rotation of every token, computed once per forward.

    Args:
        cfg: head size, axes and theta.
        layout: positions of the tokens.
        t_S: (S,) times, read by time-aware scaling.
        scaling: for sizes beyond the trained ones; None: as trained.
        extents_SA: lengths of the samples; wanted with scaling.
    """
    position_TA = positions(cfg, layout).float()
    head_dim, axes = cfg.dim // cfg.num_heads, position_TA.shape[1]
    pair_R = torch.arange(head_dim // 2, device=position_TA.device)
    exponent_R = (pair_R // axes) * (2 * axes / head_dim)
    position_TR = position_TA[:, pair_R % axes]
    if scaling is None:
        return Rotation.from_angles(position_TR * cfg.rope_theta**-exponent_R)
    assert extents_SA is not None
    factor_SR = scaling.factors(extents_SA)[:, pair_R % axes]
    divisor_SR = factor_SR ** scaling.powers(t_S, exponent_R, head_dim / axes)
    frequency_SR = cfg.rope_theta**-exponent_R / divisor_SR
    return Rotation.from_angles(position_TR * frequency_SR[layout.segment_ids])
