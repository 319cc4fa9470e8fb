"""From noise to data: solvers of dx/dt = v(x, t), t from 0, or from a later start, to 1.

Fixed-step Runge–Kutta methods walk a time grid; dopri5 chooses its own steps (torchdiffeq).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from flagdit.batch import Patches
from flagdit.errors import RecipeError
from flagdit.flow.timesteps import time_grid

Velocity = Callable[[Patches, float], Patches]
"""x_t and t → velocity, shaped as x_t."""


@dataclass(frozen=True)
class Solution:
    """Where the flow ended.

    Attributes:
        x: patches at t = 1.
        nfe: number of velocity evaluations.
    """

    x: Patches
    nfe: int


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge–Kutta method (Butcher's notation).

    Attributes:
        c: stage times as shares of the step.
        a: for each stage after the first, the weights of the earlier slopes.
        b: weights of the slopes in the step.
    """

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]


TABLEAUS = {
    "euler": Tableau((0,), (), (1,)),
    "midpoint": Tableau((0, 1 / 2), ((1 / 2,),), (0, 1)),
    "heun": Tableau((0, 1), ((1,),), (1 / 2, 1 / 2)),
    "rk4": Tableau((0, 1 / 2, 1 / 2, 1), ((1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}
SOLVERS = (*TABLEAUS, "dopri5")


def integrate(
    velocity: Velocity,
    x0: Patches,
    *,
    solver: str,
    steps: int,
    shift: float = 1.0,
    schedule: str = "linear",
    start: float = 0.0,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    on_step: Callable[[int], None] | None = None,
) -> Solution:
    """Follows the flow from noise to data.

    Args:
        velocity: dx/dt.
        x0: noise; with a later start, x at that time.
        solver: one of SOLVERS. Evaluations a step: euler 1, midpoint and heun 2, rk4 4.
        steps, shift, schedule: of the time grid (`timesteps.time_grid`); dopri5 ignores them.
        start: time of x0, from 0 to below 1.
        rtol, atol: tolerances of dopri5.
        on_step: called with the number of finished steps (evaluations for dopri5).

    Raises:
        RecipeError: unknown solver or schedule.
    """
    if solver not in SOLVERS:
        raise RecipeError(f"unknown solver {solver!r}", fix=f"Use one of {', '.join(SOLVERS)}.")
    if solver == "dopri5":
        return _dopri5(velocity, x0, start, rtol, atol, on_step)
    tableau, times = TABLEAUS[solver], time_grid(steps, shift, schedule, start)
    x = x0
    for done, (t, end) in enumerate(pairwise(times), start=1):
        x = _runge_kutta_step(velocity, x, t, end - t, tableau)
        if on_step:
            on_step(done)
    return Solution(x, nfe=(len(times) - 1) * len(tableau.b))


def _runge_kutta_step(velocity: Velocity, x: Patches, t: float, h: float, tableau: Tableau) -> Patches:
    slopes: list[Patches] = []
    for c, weights in zip(tableau.c, ((), *tableau.a), strict=True):
        slopes.append(velocity(_advance(x, slopes, weights, h), t + c * h))
    return _advance(x, slopes, tableau.b, h)


def _advance(x: Patches, slopes: list[Patches], weights: tuple[float, ...], h: float) -> Patches:
    """x + h·Σ weight·slope."""
    for slope, weight in zip(slopes, weights, strict=True):
        if weight:
            x = {m: x[m] + (h * weight) * slope[m] for m in x}
    return x


def _dopri5(
    velocity: Velocity,
    x0: Patches,
    start: float,
    rtol: float,
    atol: float,
    on_step: Callable[[int], None] | None,
) -> Solution:
    from torchdiffeq import odeint

    modalities = list(x0)
    nfe = 0

    def derivative(t: Tensor, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal nfe
        nfe += 1
        v = velocity(dict(zip(modalities, x, strict=True)), float(t))
        if on_step:
            on_step(nfe)
        return tuple(v[m] for m in modalities)

    state = tuple(x0.values())
    span = torch.tensor([start, 1.0], device=state[0].device)
    ends = odeint(derivative, state, span, method="dopri5", rtol=rtol, atol=atol)
    return Solution({m: path[-1] for m, path in zip(modalities, ends, strict=True)}, nfe)
