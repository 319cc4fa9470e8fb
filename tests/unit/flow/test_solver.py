"""Solvers on flows with known solutions, and guidance."""

import math

import pytest
import torch

from flagdit.batch import PackedText, Segment
from flagdit.errors import RecipeError
from flagdit.flow.guidance import guided_velocity
from flagdit.flow.solver import integrate
from flagdit.flow.timesteps import time_grid
from flagdit.model.tokens import TokenSpec, pack

MEAN, STD = 0.7, 0.3


def gaussian_velocity(x, t):
    """The exact velocity of the linear path from N(0, 1) to N(MEAN, STD²)."""
    variance = (t * STD) ** 2 + (1 - t) ** 2
    slope = (t * STD**2 - (1 - t)) / variance
    return {m: MEAN + slope * (v - t * MEAN) for m, v in x.items()}


NOISE = {"image": torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]}
EXACT = MEAN + STD * NOISE["image"]


def curved_velocity(x, t):
    """The exact velocity of x_t = sin(πt/2)·x1 + cos(πt/2)·x0 between the same two Gaussians.

    The linear path's errors of even order cancel between its ends; this one's do not, so it shows the order.
    """
    a, b = math.sin(math.pi * t / 2), math.cos(math.pi * t / 2)
    slope = math.pi / 2 * a * b * (STD**2 - 1) / ((a * STD) ** 2 + b**2)
    return {m: math.pi / 2 * b * MEAN + slope * (v - a * MEAN) for m, v in x.items()}


def error(solver, steps, shift=1.0, velocity=gaussian_velocity, **grid):
    return (integrate(velocity, NOISE, solver=solver, steps=steps, shift=shift, **grid).x["image"] - EXACT).abs().max()


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_order_of_convergence(solver, order):
    coarse, fine = (error(solver, steps, velocity=curved_velocity) for steps in (32, 64))
    assert abs(math.log2(coarse / fine) - order) < 0.25


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_order_of_convergence_on_the_sigmoid_schedule(solver, order):
    coarse, fine = (error(solver, steps, velocity=curved_velocity, schedule="sigmoid") for steps in (32, 64))
    assert abs(math.log2(coarse / fine) - order) < 0.25


def test_the_sigmoid_schedule_has_small_steps_at_both_ends():
    times = torch.tensor(time_grid(10, 1.0, "sigmoid"))
    steps = times.diff()
    assert times[0] == 0 and abs(times[-1] - 1) < 1e-12 and (steps > 0).all()
    torch.testing.assert_close(steps, steps.flip(0))
    assert (steps[1:5] > steps[:4]).all() and 2.5 < steps[4] / steps[0] < 4


def test_a_later_start_follows_the_same_grid_from_there():
    assert time_grid(4, 1.0, start=0.5) == [0.5, 0.75, 1.0]
    assert time_grid(4, 1.0, start=0.4) == [0.4, 0.5, 0.75, 1.0]
    assert time_grid(4, 1.0, start=0.9) == [0.9, 1.0]
    whole = time_grid(10, 3.0, "sigmoid")
    assert time_grid(10, 3.0, "sigmoid", start=whole[6]) == whole[6:]


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_starting_between_noise_and_data(solver):
    """x_t of the Gaussian flow is t·MEAN + √variance·x0: from it the end is the same as from noise."""
    t = 0.35
    on_the_way = {"image": t * MEAN + math.sqrt((t * STD) ** 2 + (1 - t) ** 2) * NOISE["image"]}
    solution = integrate(gaussian_velocity, on_the_way, solver=solver, steps=100, start=t)
    assert (solution.x["image"] - EXACT).abs().max() < 1e-4
    assert solver == "dopri5" or solution.nfe == 65 * 4, "steps before the start are left out"


@pytest.mark.parametrize("solver", ["midpoint", "heun", "rk4"])
def test_shifted_grid_reaches_the_same_end(solver):
    assert error(solver, 200, shift=3.0) < 1e-3


@pytest.mark.parametrize(("solver", "each"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_evaluations_are_counted(solver, each):
    calls = []

    def counting(x, t):
        calls.append(t)
        return gaussian_velocity(x, t)

    steps = []
    solution = integrate(counting, NOISE, solver=solver, steps=7, on_step=steps.append)
    assert solution.nfe == len(calls) == 7 * each
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    assert min(calls) == 0
    assert max(calls) <= 1


def test_dopri5_meets_its_tolerance():
    calls = []

    def counting(x, t):
        calls.append(t)
        return gaussian_velocity(x, t)

    solution = integrate(counting, NOISE, solver="dopri5", steps=1, rtol=1e-6, atol=1e-6)
    assert (solution.x["image"] - EXACT).abs().max() < 1e-4
    assert solution.nfe == len(calls)


def test_unknown_solver_names_the_known_ones():
    with pytest.raises(RecipeError, match="euler, midpoint"):
        integrate(gaussian_velocity, NOISE, solver="magic", steps=2)
    with pytest.raises(RecipeError, match="linear, sigmoid"):
        integrate(gaussian_velocity, NOISE, solver="euler", steps=2, schedule="magic")


SPEC = TokenSpec(2, True, False)


def make_batch(**conditions):
    return pack([Segment(i, "image", (4, 1, 4, 4)) for i in range(2)], None, SPEC, **conditions)


def text_model(x, t_S, batch, inference):
    """Velocity = first text feature of each sample, everywhere; checks that the pack is whole."""
    assert inference == "settings"
    assert len(t_S) == len(batch.segments)
    level_S = torch.stack([f[0, 0] for f in batch.text.unpack()])
    return {"image": level_S[batch.layout.patch_segment["image"]][:, None].expand_as(x["image"])}


def test_guidance_extrapolates_from_the_null_caption():
    text = PackedText.pack([torch.full((2, 3), 5.0), torch.full((1, 3), 7.0)])
    null = torch.full((1, 3), 1.0)
    x = {"image": torch.zeros(8, 16)}
    common = {"null_text_LY": null, "inference": "settings"}
    v = guided_velocity(text_model, make_batch(text=text), scale=3.0, **common)(x, 0.5)["image"]
    assert v[:4].unique().tolist() == [1 + 3 * (5 - 1)]
    assert v[4:].unique().tolist() == [1 + 3 * (7 - 1)]
    some = guided_velocity(text_model, make_batch(text=text), scale=3.0, channels=3, **common)(x, 0.5)["image"]
    assert some[0, :12].unique().tolist() == [13]
    assert some[0, 12:].unique().tolist() == [5]
    off = guided_velocity(text_model, make_batch(text=text), scale=1.0, **common)(x, 0.5)["image"]
    assert off[:4].unique().tolist() == [5]


def test_guidance_of_classes_uses_the_null_label():
    seen = []

    def model(x, t_S, batch, inference):
        seen.append(batch.labels_S.tolist())
        return x

    x = {"image": torch.zeros(8, 16)}
    guided_velocity(model, make_batch(labels=[3, 4]), scale=2.0, null_label=10)(x, 0.1)
    assert seen == [[3, 4, 10, 10]]
