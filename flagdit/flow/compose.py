"""Velocities made of velocities: parts that stay as they are, and a canvas that many views draw together.

Shape legend
    N, P  patch tokens of one modality, features of a patch
    M     patch tokens of all views of a canvas
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flagdit.batch import Patches
from flagdit.flow.solver import Velocity


def hold(velocity: Velocity, data: Patches, noise: Patches, keep: Patches) -> Velocity:
    """The flow in which the kept elements go straight to the data.

    Their velocity is x1 − x0, constant in t, so every solver that starts from x_t on their path brings them to the data
    exactly, and the model sees them on their way at the noise level of the rest: inpainting.

    Args:
        velocity: of the elements that are free.
        data, noise: x1 and x0 by modality, (N, P).
        keep: bool (N, P): True where the data stay.
    """
    straight = {m: data[m] - noise[m] for m in data}

    def held(x: Patches, t: float) -> Patches:
        return {m: torch.where(keep[m], straight[m], v) for m, v in velocity(x, t).items()}

    return held


@dataclass(frozen=True)
class Views:
    """Some views of a canvas, in one pack.

    Attributes:
        velocity: of the pack.
        index: modality → (M,) the canvas' patch token of every token of the pack.
        weight: modality → (M, 1) how much it counts there, above 0.
    """

    velocity: Velocity
    index: dict[str, Tensor]
    weight: dict[str, Tensor]


def blend(parts: Sequence[Views]) -> Velocity:
    """The velocity of a canvas as the weighted mean of what its views see (MultiDiffusion, arXiv 2302.08113).

    Views may overlap, differ in condition and size, and together cover the canvas.
    """

    def blended(x: Patches, t: float) -> Patches:
        total = {m: torch.zeros_like(v) for m, v in x.items()}
        weight = {m: v.new_zeros(len(v), 1) for m, v in x.items()}
        for part in parts:
            seen = part.velocity({m: x[m][index] for m, index in part.index.items()}, t)
            for m, index in part.index.items():
                own = part.weight[m].to(x[m])
                total[m] = total[m].index_add(0, index, own * seen[m].to(x[m]))
                weight[m] = weight[m].index_add(0, index, own)
        return {m: total[m] / weight[m] for m in x}

    return blended
