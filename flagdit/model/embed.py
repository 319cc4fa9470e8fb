"""What conditions every block: time, pooled text and class.

Shape legend: S samples, M text tokens of all samples, Y width of the text features, C width of the conditioning vector.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flagdit.model.segments import Runs

TIME_FEATURES = 256
LONGEST_PERIOD = 1e4


def sinusoid(t_S: Tensor) -> Tensor:
    """(S,) → (S, 256) fp32: cosines, then sines, at periods from 2π to 2π·1e4."""
    half = TIME_FEATURES // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t_S.device) / half
    angle = t_S.float()[:, None] * torch.exp(-math.log(LONGEST_PERIOD) * exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimeEmbedder(nn.Module):
    """t → (S, C). `time_scale` spreads t in [0, 1] over the periods of the sinusoid."""

    def __init__(self, cond_dim: int, time_scale: float):
        super().__init__()
        self.time_scale = time_scale
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, t_S: Tensor) -> Tensor:
        return self.mlp(sinusoid(t_S * self.time_scale).to(self.dtype))


class TextPooler(nn.Module):
    """Mean of a sample's text features → LayerNorm → Linear: (M, Y) → (S, C)."""

    def __init__(self, text_dim: int, cond_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(text_dim)
        self.proj = nn.Linear(text_dim, cond_dim)

    def forward(self, text_MY: Tensor, runs: Runs) -> Tensor:
        parts = text_MY.split([run.num_tokens for run in runs])
        means = [part.view(run.count, run.length, -1).mean(dim=1) for part, run in zip(parts, runs, strict=True)]
        return self.proj(self.norm(torch.cat(means)))


class LabelEmbedder(nn.Module):
    """Class id → (S, C). The last row of the table, id `num_classes`, means "no class" (guidance)."""

    def __init__(self, num_classes: int, cond_dim: int):
        super().__init__()
        self.table = nn.Embedding(num_classes + 1, cond_dim)

    def forward(self, labels_S: Tensor) -> Tensor:
        return self.table(labels_S)
