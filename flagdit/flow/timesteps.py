"""When to train and where to step: laws of t, and the shift that gives large samples more noise.

t = 0 is noise, t = 1 is data.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flagdit.batch import PackedBatch
from flagdit.config.schema import FlowConfig
from flagdit.flow.noise import TIMESTEP_STREAM, draw_uniform


def shift_time(t: Tensor, shift: Tensor | float) -> Tensor:
    """t ← t / (t + s − s·t): s > 1 moves times towards noise, s = 1 changes nothing, 0 and 1 stay (arXiv 2403.03206,
    equation 23, with time reversed)."""
    return t / (t + shift - shift * t)


def shift_of(num_tokens: int, cfg: FlowConfig) -> float:
    """The shift for a sample of that many tokens.

    More tokens mean more redundancy, so the same t hides less of the picture: the shift grows with √tokens
    (arXiv 2403.03206, section 5.3.2).
    """
    if not cfg.shift_tokens:
        return cfg.shift
    return cfg.shift * math.sqrt(num_tokens / cfg.shift_tokens)


def draw_timesteps(batch: PackedBatch, cfg: FlowConfig, seed: int) -> Tensor:
    """(S,) fp32 times in (0, 1) on the layout's device, each a function of (seed, epoch, sample id).

    uniform, or logit-normal: logit(t) ~ N(logit_mean, logit_std²); then shifted by the size of the sample.
    """
    u_S = draw_uniform(batch, seed, TIMESTEP_STREAM)
    if cfg.timesteps == "logit_normal":
        u_S = torch.sigmoid(cfg.logit_mean + cfg.logit_std * torch.special.ndtri(u_S))
    shift_S = torch.tensor([shift_of(n, cfg) for n in batch.layout.seqlens], dtype=u_S.dtype)
    return shift_time(u_S, shift_S).float().to(batch.layout.cu_seqlens.device)


def time_grid(steps: int, shift: float) -> list[float]:
    """`steps`+1 times from 0 to 1 for a solver: evenly spaced, then shifted."""
    grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return shift_time(grid, shift).tolist()
