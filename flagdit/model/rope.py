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

from dataclasses import dataclass

import torch
from torch import Tensor

from flagdit.batch import PackLayout
from flagdit.config.schema import ModelConfig


@dataclass(frozen=True)
class RopeScaling:
    """How positions beyond those seen in training are read.

    Attributes:
        linear: positions are divided by this (position interpolation, arXiv 2306.15595).
        ntk: theta is multiplied by this (NTK-aware scaling), which keeps high frequencies as they are.
        watershed: None: both factors hold at every t. Otherwise time-aware (Next-DiT, arXiv 2406.18583, section 2.3):
            below this t, where the layout forms, only `linear` holds; from it on, where details form, only `ntk`.
    """

    linear: float = 1.0
    ntk: float = 1.0
    watershed: float | None = None

    @classmethod
    def time_aware(cls, factor: float, watershed: float) -> RopeScaling:
        """The same factor on both sides of the watershed, as the official code."""
        return cls(linear=factor, ntk=factor, watershed=watershed)

    def factors(self, t_S: Tensor) -> tuple[Tensor, Tensor]:
        """(S,) fp32 linear and NTK factors of every sample at its t."""
        linear_S = torch.full_like(t_S, self.linear, dtype=torch.float32)
        ntk_S = torch.full_like(linear_S, self.ntk)
        if self.watershed is None:
            return linear_S, ntk_S
        early_S = t_S < self.watershed
        return torch.where(early_S, linear_S, 1.0), torch.where(early_S, 1.0, ntk_S)


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


def build_rotation(cfg: ModelConfig, layout: PackLayout, t_S: Tensor, scaling: RopeScaling | None = None) -> Rotation:
    """The rotation of every token, computed once per forward.

    Args:
        cfg: head size, axes and theta.
        layout: positions of the tokens.
        t_S: (S,) times, read by time-aware scaling.
        scaling: for sizes beyond the trained ones; None: as trained.
    """
    position_TA = positions(cfg, layout).float()
    head_dim, axes = cfg.dim // cfg.num_heads, position_TA.shape[1]
    pair_R = torch.arange(head_dim // 2, device=position_TA.device)
    exponent_R = (pair_R // axes) * (2 * axes / head_dim)
    position_TR = position_TA[:, pair_R % axes]
    if scaling is None:
        return Rotation.from_angles(position_TR * cfg.rope_theta**-exponent_R)
    linear_S, ntk_S = scaling.factors(t_S)
    frequency_SR = (cfg.rope_theta * ntk_S[:, None]) ** -exponent_R / linear_S[:, None]
    return Rotation.from_angles(position_TR * frequency_SR[layout.segment_ids])
