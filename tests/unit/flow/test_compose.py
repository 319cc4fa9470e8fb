"""Held parts arrive at their data under every solver; a canvas is the weighted mean of its views."""

import pytest
import torch

from flagdit.flow.compose import Views, blend, hold
from flagdit.flow.solver import integrate

GENERATOR = torch.Generator().manual_seed(0)
NOISE = {"image": torch.randn(6, 8, generator=GENERATOR, dtype=torch.float64)}
DATA = {"image": torch.randn(6, 8, generator=GENERATOR, dtype=torch.float64)}
KEEP = {"image": torch.rand(6, 8, generator=GENERATOR) < 0.5}


def wild(x, t):
    return {m: 3 * torch.sin(5 * v + t) for m, v in x.items()}


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun", "rk4", "dopri5"])
@pytest.mark.parametrize("start", [0.0, 0.4])
def test_what_is_held_arrives_and_the_rest_flows(solver, start):
    seen = []

    def watching(x, t):
        seen.append((t, x["image"]))
        return wild(x, t)

    x = {"image": start * DATA["image"] + (1 - start) * NOISE["image"]}
    end = integrate(hold(watching, DATA, NOISE, KEEP), x, solver=solver, steps=7, start=start, schedule="sigmoid")
    keep = KEEP["image"]
    torch.testing.assert_close(end.x["image"][keep], DATA["image"][keep])
    assert (end.x["image"] - DATA["image"])[~keep].abs().mean() > 0.5
    for t, x_NP in seen:  # the model sees the held part at the noise level of t
        torch.testing.assert_close(x_NP[keep], (t * DATA["image"] + (1 - t) * NOISE["image"])[keep])


def test_views_are_averaged_by_weight():
    first = Views(
        lambda x, t: {"image": torch.full_like(x["image"], 1.0)},
        {"image": torch.tensor([0, 1, 2, 3])},
        {"image": torch.tensor([1.0, 1, 1, 0.5])[:, None]},
    )
    # two views of one pack that see the same token, and one that sees nothing else
    second = Views(
        lambda x, t: {"image": 2 * torch.ones_like(x["image"])},
        {"image": torch.tensor([3, 4, 4, 5])},
        {"image": torch.tensor([1.5, 1, 1, 1])[:, None]},
    )
    v = blend([first, second])(NOISE, 0.5)["image"]
    assert v.dtype == torch.float64 and v.shape == NOISE["image"].shape
    torch.testing.assert_close(v[:, 0], torch.tensor([1, 1, 1, (0.5 + 3) / 2, 2, 2], dtype=torch.float64))


def test_views_see_their_part_of_the_canvas():
    seen = []
    part = Views(
        lambda x, t: seen.append(x["image"]) or x,
        {"image": torch.tensor([5, 0, 1, 2, 3, 4])},
        {"image": torch.ones(6, 1)},
    )
    v = blend([part])(NOISE, 0.5)["image"]
    assert torch.equal(seen[0], NOISE["image"][[5, 0, 1, 2, 3, 4]]) and torch.equal(v, NOISE["image"])
