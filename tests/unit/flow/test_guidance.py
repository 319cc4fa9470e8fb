"""Guidance within an interval, rescaled, and with its unconditional half used again."""

import torch

from flagdit.batch import PackedText, Segment
from flagdit.flow.guidance import guided_velocity
from flagdit.model.tokens import TokenSpec, pack

SPEC = TokenSpec(2, True, False)
SEGMENTS = [Segment(0, "image", (4, 1, 4, 4)), Segment(1, "image", (4, 1, 4, 6))]
X = {"image": torch.randn(10, 16, generator=torch.Generator().manual_seed(0))}
NULL = torch.full((1, 3), 0.5)


class Model:
    """Velocity = level of the caption · x + t; remembers how many samples each call had."""

    def __init__(self):
        self.samples = []

    def __call__(self, x, t_S, batch, inference):
        self.samples.append(len(t_S))
        level_S = torch.stack([f[0, 0] for f in batch.text.unpack()])
        return {"image": level_S[batch.layout.patch_segment["image"]][:, None] * x["image"] + t_S[0]}


def guided(model, **settings):
    text = PackedText.pack([torch.full((2, 3), 3.0), torch.full((1, 3), -1.0)])
    batch = pack(SEGMENTS, None, SPEC, text=text)
    return guided_velocity(model, batch, null_text_LY=NULL, **settings)


def test_outside_the_interval_the_conditional_half_runs_alone():
    model = Model()
    velocity = guided(model, scale=4.0, interval=(0.2, 0.6))
    found = [velocity(X, t)["image"] for t in (0.0, 0.2, 0.4, 0.6, 0.9)]
    assert model.samples == [2, 4, 4, 4, 2]
    for t, v, scale in zip((0.0, 0.2, 0.4, 0.6, 0.9), found, (1, 4, 4, 4, 1), strict=True):
        torch.testing.assert_close(v, guided(Model(), scale=float(scale))(X, t)["image"])


def test_the_null_half_is_used_again():
    model = Model()
    velocity = guided(model, scale=4.0, reuse=3)
    times = (0.0, 0.1, 0.2, 0.3, 0.4)
    found = [velocity({"image": (1 + t) * X["image"]}, t)["image"] for t in times]
    assert model.samples == [4, 2, 2, 4, 2], "ten samples less than the twenty of every evaluation"
    level_N1 = torch.tensor([3.0] * 4 + [-1.0] * 6)[:, None]
    for t, v in zip(times, found, strict=True):
        last = 0.0 if t < 0.3 else 0.3
        conditional = level_N1 * (1 + t) * X["image"] + t
        difference = (level_N1 - 0.5) * (1 + last) * X["image"]
        torch.testing.assert_close(v, conditional + 3 * difference)


def test_every_integration_starts_with_a_whole_evaluation():
    model = Model()
    for _ in range(2):
        guided(model, scale=4.0, reuse=2)(X, 0.5)
    assert model.samples == [4, 4]


def test_rescaling_gives_each_sample_the_deviation_of_its_conditional_velocity():
    plain, alone = (guided(Model(), scale=s)(X, 0.3)["image"] for s in (4.0, 1.0))
    for share in (0.7, 1.0):
        v = guided(Model(), scale=4.0, rescale=share)(X, 0.3)["image"]
        for rows in (slice(0, 4), slice(4, 10)):
            ratio = alone[rows].std(correction=0) / plain[rows].std(correction=0)
            torch.testing.assert_close(v[rows], plain[rows] * (1 + share * (ratio - 1)))
    assert abs(float(v[:4].std() / alone[:4].std()) - 1) < 1e-5 and float(plain[:4].std() / alone[:4].std()) > 2


def test_settings_may_depend_on_time():
    seen = []

    def model(x, t_S, batch, inference):
        seen.append(inference)
        return x

    text = PackedText.pack([torch.ones(1, 3)] * 2)
    velocity = guided_velocity(
        model, pack(SEGMENTS, None, SPEC, text=text), scale=2.0, null_text_LY=NULL, inference=lambda t: round(10 * t)
    )
    for t in (0.1, 0.7):
        velocity(X, t)
    assert seen == [1, 7]
