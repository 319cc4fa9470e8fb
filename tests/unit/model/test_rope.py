"""Rotary embedding: the formula for every number of axes, and its scaling."""

import pytest
import torch

from flagdit.batch import Segment
from flagdit.config.schema import ModelConfig
from flagdit.model.rope import SCALINGS, RopeScaling, build_rotation, extents, positions
from flagdit.model.tokens import TokenSpec, build_layout

SEGMENTS = [Segment(0, "image", (4, 1, 4, 6)), Segment(1, "video", (4, 2, 4, 4))]
LAYOUT = build_layout(SEGMENTS, TokenSpec(2, True, True))
VARIANTS = {"raster": ("raster", 2, 1), "rows and columns": ("axial", 2, 2), "with frames": ("axial", 3, 3)}


def config(rope: str, rope_axes: int) -> ModelConfig:
    return ModelConfig(dim=48, num_heads=4, rope=rope, rope_axes=rope_axes, rope_theta=100.0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_angles_follow_the_formula(variant):
    rope, rope_axes, axes = VARIANTS[variant]
    rotation = build_rotation(config(rope, rope_axes), LAYOUT, torch.zeros(2))
    head_dim = 12
    for token in (0, 5, 11, LAYOUT.num_tokens - 1):
        position = [LAYOUT.raster_T[token]] if rope == "raster" else LAYOUT.axes_TA[token, 3 - axes :]
        for j in range(head_dim // 2):
            angle = position[j % axes] * 100.0 ** (-2 * axes * (j // axes) / head_dim)
            torch.testing.assert_close(rotation.cos_TR[token, j], torch.cos(angle.float()))
            torch.testing.assert_close(rotation.sin_TR[token, j], torch.sin(angle.float()))


def test_neighbouring_channels_rotate_together():
    rotation = build_rotation(config("raster", 2), LAYOUT, torch.zeros(2))
    x = torch.randn(LAYOUT.num_tokens, 4, 12, requires_grad=True)
    y = rotation(x)
    cos, sin = rotation.cos_TR[:, None], rotation.sin_TR[:, None]
    torch.testing.assert_close(y[..., 0::2], x[..., 0::2] * cos - x[..., 1::2] * sin)
    torch.testing.assert_close(y[..., 1::2], x[..., 0::2] * sin + x[..., 1::2] * cos)
    (grad,) = torch.autograd.grad(y, x, y.detach())
    torch.testing.assert_close(grad, x)  # a rotation's transpose undoes it


def test_scores_depend_on_distance_only():
    rotation = build_rotation(config("raster", 2), LAYOUT, torch.zeros(2))
    q, k = torch.randn(2, 1, 1, 12)
    q, k = (rotation(v.expand(LAYOUT.num_tokens, 1, 12))[:, 0] for v in (q, k))
    torch.testing.assert_close(q[1] @ k[3], q[5] @ k[7])


def test_bf16_is_rotated_in_fp32():
    rotation = build_rotation(config("raster", 2), LAYOUT, torch.zeros(2))
    x = torch.randn(LAYOUT.num_tokens, 4, 12).bfloat16()
    assert rotation(x).dtype == torch.bfloat16
    assert torch.equal(rotation(x), rotation(x.float()).bfloat16())


def angles(scaling: RopeScaling | None, t_S: torch.Tensor, theta: float = 100.0, rope="axial", axes=2) -> torch.Tensor:
    cfg = ModelConfig(dim=48, num_heads=4, rope=rope, rope_axes=axes, rope_theta=theta)
    lengths = extents(cfg, SEGMENTS, LAYOUT.seqlens, torch.device("cpu"))
    return build_rotation(cfg, LAYOUT, t_S, scaling, lengths).cis_TR


def test_scaling_by_one_factor():
    t_S = torch.tensor([0.1, 0.8])
    trained = angles(None, t_S)
    for method in SCALINGS:
        torch.testing.assert_close(angles(RopeScaling(method), t_S), trained)
    torch.testing.assert_close(angles(RopeScaling("ntk", 3.0), t_S), angles(None, t_S, theta=300.0))
    # With positions divided by 2, column 2 is where column 1 was: patches 0 1 2 of the first row.
    torch.testing.assert_close(angles(RopeScaling("linear", 2.0), t_S)[2], trained[1])


def test_the_switch_is_at_the_watershed_for_each_sample():
    t_S = torch.tensor([0.1, 0.8])
    found = angles(RopeScaling("time_switch", 2.0, watershed=0.3), t_S)
    first = LAYOUT.segment_ids == 0
    torch.testing.assert_close(found[first], angles(RopeScaling("linear", 2.0), t_S)[first])
    torch.testing.assert_close(found[~first], angles(RopeScaling("ntk", 2.0), t_S)[~first])
    at_the_watershed = angles(RopeScaling("time_switch", 2.0, watershed=0.3), torch.tensor([0.3, 0.3]))
    torch.testing.assert_close(at_the_watershed, angles(RopeScaling("ntk", 2.0), t_S))


def test_time_aware_scaling_goes_smoothly_from_linear_to_ntk():
    exponent_R = torch.tensor([0.0, 1 / 3, 2 / 3])  # pairs of an axis of 6 channels

    def powers(method, t):
        return RopeScaling(method, 2.0).powers(torch.tensor([t]), exponent_R, 6.0)[0]

    torch.testing.assert_close(powers("time_aware", 0.0), torch.tensor([0.0, 1.0, 1.0]))
    torch.testing.assert_close(powers("time_aware", 1.0), exponent_R)
    torch.testing.assert_close(powers("time_aware", 0.4), torch.tensor([0.0, 2 / 3, 1.0]))  # d_t = 3
    times = torch.linspace(0, 1, 101)
    steps = RopeScaling("time_aware", 2.0).powers(times, exponent_R, 6.0).diff(dim=0)
    assert steps.max() <= 0 and steps.abs().max() < 0.06, "without a jump"
    assert RopeScaling("time_switch", 2.0).powers(times, exponent_R, 6.0).diff(dim=0).abs().max() > 0.3


@pytest.mark.parametrize(
    ("rope", "axes", "trained"), [("axial", 2, (2, 1)), ("axial", 3, (1, 2, 1)), ("raster", 2, (4,))]
)
def test_factors_are_those_of_sample_and_axis(rope, axes, trained):
    """The first sample has 1×2×3 patches and 8 tokens, the second 2×2×2 patches and 14 tokens."""
    cfg = ModelConfig(dim=48, num_heads=4, rope=rope, rope_axes=axes)
    lengths = extents(cfg, SEGMENTS, LAYOUT.seqlens, torch.device("cpu"))
    wanted = {("axial", 2): [[1, 3], [1, 2]], ("axial", 3): [[1, 1, 3], [2, 1, 2]], ("raster", 2): [[2], [3.5]]}
    found = RopeScaling("linear", trained=trained).factors(lengths)
    assert found.tolist() == wanted[rope, axes]
    t_S = torch.zeros(2)
    position = (
        positions(cfg, LAYOUT)[:, torch.arange(6) % found.shape[1]]
        / found[LAYOUT.segment_ids][:, torch.arange(6) % found.shape[1]]
    )
    exponent = (torch.arange(6) // found.shape[1]) * (2 * found.shape[1] / 12)
    angle = position * 100.0**-exponent
    torch.testing.assert_close(
        angles(RopeScaling("linear", trained=trained), t_S, rope=rope, axes=axes),
        torch.polar(torch.ones_like(angle), angle),
    )


def test_smaller_samples_than_trained_are_read_as_trained():
    t_S = torch.tensor([0.5, 0.5])
    for method in SCALINGS:
        torch.testing.assert_close(angles(RopeScaling(method, trained=(64, 64)), t_S), angles(None, t_S))
