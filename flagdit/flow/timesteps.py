"""When to train and where to step: laws of t, and the shift that gives large samples more noise.

t = 0 is noise, t = 1 is data.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flagdit.batch import PackedBatch
from flagdit.config.schema import FlowConfig, SampleConfig
from flagdit.errors import RecipeError
from flagdit.flow.noise import TIMESTEP_STREAM, draw_uniform

SCHEDULES = ("linear", "sigmoid")
SIGMOID_REACH = 2.5
"""The sigmoid schedule follows the logistic curve from −2.5 to 2.5: its first step is a third of the middle one."""


def shift_time(t: Tensor, shift: Tensor | float) -> Tensor:
    """t ← t / (t + s − s·t): s > 1 moves times towards noise, s = 1 changes nothing, 0 and 1 stay (arXiv 2403.03206,
    equation 23, with time reversed)."""
    return t / (t + shift - shift * t)


def shift_of(num_tokens: int, cfg: FlowConfig | SampleConfig) -> float:
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


def time_grid(steps: int, shift: float, schedule: str = "linear", start: float = 0.0) -> list[float]:
    """Times from `start` to 1 for a solver.

    Args:
        steps: intervals between 0 and 1; those that end before `start` are left out.
        shift: applied to the schedule; see `shift_time`.
        schedule: linear: evenly spaced. sigmoid: small steps near noise and near data, where the velocity of few-step
            sampling errs most, and large ones between (Next-DiT, arXiv 2406.18583, section 3.1).
        start: the first time, from 0 to below 1.

    Raises:
        RecipeError: unknown schedule.
    """
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    if schedule == "sigmoid":
        edge = torch.sigmoid(torch.tensor(-SIGMOID_REACH, dtype=torch.float64))
        u = (torch.sigmoid(SIGMOID_REACH * (2 * u - 1)) - edge) / (1 - 2 * edge)
    elif schedule != "linear":
        raise RecipeError(f"unknown schedule {schedule!r}", fix=f"Use one of {', '.join(SCHEDULES)}.")
    # Rounding may leave a step of no length beside the start.
    return [start, *(t for t in shift_time(u, shift).tolist() if t > start + 1e-9)]
