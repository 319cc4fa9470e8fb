"""LayerNorm over all heads together and the rotation of every head: the QK-norm of the official checkpoints.

    y = rotate((x − mean)/√(var + eps)·weight + bias)     mean and variance over the whole row of heads

Shape legend
    T     tokens
    W     width of a row: all heads together
    D, R  channels of a head, its pairs
    P     programs of backward

Passes over the (T, W) tensor: forward 2, backward 3. Under tensor parallelism a row is spread over ranks and its
statistics must be reduced between them: there the norm is a module of its own, followed by `rope.rope`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flagdit.kernels import language, rope
from flagdit.kernels.dispatch import use_triton
from flagdit.kernels.language import jit, launch, rows_of, tl
from flagdit.kernels.rope import (
    Angles,
    angle_args,
    head_places,
    load_angles,
    tile_mask,
    tile_shape,
    tile_warps,
    turn_pairs,
)

# Programs go through the tokens in strides, so that weight and bias are read once by each and not once a token.
FORWARD_PROGRAMS = 1024
BACKWARD_PROGRAMS = 512


def reference(x_TW: Tensor, weight_W: Tensor, bias_W: Tensor, angles: Angles, head_dim: int, eps: float) -> Tensor:
    """The same in torch: (T, W) → (T, W/D, D); fp32 inside, or fp64 for fp64 inputs."""
    wide = torch.promote_types(x_TW.dtype, torch.float32)
    x = F.layer_norm(x_TW.to(wide), weight_W.shape, weight_W.to(wide), bias_W.to(wide), eps)
    return rope.reference(x.unflatten(-1, (-1, head_dim)), angles).to(x_TW.dtype)


@jit
def _layer_norm_rope_kernel(
    x, weight, bias, cos, sin, position, frequency, y, statistics, num_tokens, x_stride, position_stride, eps,
    HEADS: tl.constexpr, D: tl.constexpr, AXES: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_HEADS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    place = head_places(D, BLOCK_HEADS, BLOCK)
    inside = tile_mask(tl.full((1,), 1, tl.int1), HEADS, D, BLOCK_HEADS, BLOCK)
    gain = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    addend = tl.load(bias + place, mask=inside, other=0.0).to(tl.float32)
    step = tl.num_programs(0) * TOKENS
    for start in tl.range(tl.program_id(0) * TOKENS, num_tokens, step, num_stages=STAGES):
        tokens = start + tl.arange(0, TOKENS)
        tokens64 = tokens.to(tl.int64)[:, None, None]
        within = tokens < num_tokens
        mask = tile_mask(within, HEADS, D, BLOCK_HEADS, BLOCK)
        value = tl.load(x + tokens64 * x_stride + place, mask=mask, other=0.0).to(tl.float32)
        cosine, sine = load_angles(cos, sin, position, frequency, tokens, within, position_stride, D // 2, AXES, BLOCK)
        mean = tl.sum(tl.sum(value, 2), 1) / (HEADS * D)
        value = tl.where(inside, value - mean[:, None, None], 0.0)
        inverse = tl.rsqrt(tl.sum(tl.sum(value * value, 2), 1) / (HEADS * D) + eps)
        tl.store(statistics + 2 * tokens, mean, mask=within)
        tl.store(statistics + 2 * tokens + 1, inverse, mask=within)
        result = value * inverse[:, None, None] * gain + addend
        result = turn_pairs(result, cosine, sine, TOKENS, BLOCK_HEADS, BLOCK)
        tl.store(y + tokens64 * (HEADS * D) + place, result.to(y.dtype.element_ty), mask=mask)


@jit
def _layer_norm_rope_backward_kernel(
    dy, x, weight, cos, sin, position, frequency, statistics, dx, parts,
    num_tokens, dy_stride, x_stride, position_stride,
    HEADS: tl.constexpr, D: tl.constexpr, AXES: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_HEADS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    place = head_places(D, BLOCK_HEADS, BLOCK)
    inside = tile_mask(tl.full((1,), 1, tl.int1), HEADS, D, BLOCK_HEADS, BLOCK)
    gain = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    sum_scaled = tl.zeros((TOKENS, BLOCK_HEADS, BLOCK), tl.float32)
    sum_plain = tl.zeros((TOKENS, BLOCK_HEADS, BLOCK), tl.float32)
    step = tl.num_programs(0) * TOKENS
    for start in tl.range(tl.program_id(0) * TOKENS, num_tokens, step, num_stages=STAGES):
        tokens = start + tl.arange(0, TOKENS)
        tokens64 = tokens.to(tl.int64)[:, None, None]
        within = tokens < num_tokens
        mask = tile_mask(within, HEADS, D, BLOCK_HEADS, BLOCK)
        grad = tl.load(dy + tokens64 * dy_stride + place, mask=mask, other=0.0).to(tl.float32)
        normed = tl.load(x + tokens64 * x_stride + place, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(statistics + 2 * tokens, mask=within, other=0.0)[:, None, None]
        inverse = tl.load(statistics + 2 * tokens + 1, mask=within, other=0.0)[:, None, None]
        cosine, sine = load_angles(cos, sin, position, frequency, tokens, within, position_stride, D // 2, AXES, BLOCK)
        grad = turn_pairs(grad, cosine, -sine, TOKENS, BLOCK_HEADS, BLOCK)
        normed = tl.where(inside, (normed - mean) * inverse, 0.0)
        sum_scaled += grad * normed
        sum_plain += grad
        grad *= gain
        scaled_mean = tl.sum(tl.sum(grad * normed, 2), 1)[:, None, None] / (HEADS * D)
        plain_mean = tl.sum(tl.sum(grad, 2), 1)[:, None, None] / (HEADS * D)
        result = (grad - plain_mean - normed * scaled_mean) * inverse
        tl.store(dx + tokens64 * (HEADS * D) + place, result.to(dx.dtype.element_ty), mask=mask)
    part = parts + tl.program_id(0).to(tl.int64) * (2 * HEADS * D)
    tl.store(part + place, tl.sum(sum_scaled, 0)[None], mask=inside)
    tl.store(part + HEADS * D + place, tl.sum(sum_plain, 0)[None], mask=inside)


def run_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    position: Tensor | None,
    frequency: Tensor | None,
    head_dim: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Allocates and launches: y (T, W), and mean and 1/deviation (T, 2) fp32."""
    x = rows_of(x)
    num_rows, width = x.shape
    y = language.empty((num_rows, width), x.dtype, x.device)
    statistics = language.empty((num_rows, 2), torch.float32, x.device)
    shape = tile_shape(width // head_dim, head_dim)
    args = {
        "x": x, "weight": weight, "bias": bias, **angle_args(cos, sin, position, frequency), "y": y,
        "statistics": statistics, "num_tokens": num_rows, "x_stride": x.stride(0), "eps": eps,
        "HEADS": width // head_dim, "D": head_dim, **shape, "STAGES": 3,
    }  # fmt: skip
    programs = min(-(-num_rows // shape["TOKENS"]), FORWARD_PROGRAMS)
    launch(_layer_norm_rope_kernel, programs, args, num_warps=tile_warps(shape))
    return y, statistics


def run_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    position: Tensor | None,
    frequency: Tensor | None,
    statistics: Tensor,
    head_dim: int,
) -> tuple[Tensor, Tensor]:
    """Allocates and launches: dx (T, W), and the gradients of weight and bias (2, W) fp32."""
    dy, x = rows_of(dy), rows_of(x)
    num_rows, width = x.shape
    dx = language.empty((num_rows, width), x.dtype, x.device)
    shape = tile_shape(width // head_dim, head_dim)
    programs = min(-(-num_rows // shape["TOKENS"]), BACKWARD_PROGRAMS)
    parts = language.empty((programs, 2, width), torch.float32, x.device)
    args = {
        "dy": dy, "x": x, "weight": weight, **angle_args(cos, sin, position, frequency),
        "statistics": statistics, "dx": dx, "parts": parts, "num_tokens": num_rows, "dy_stride": dy.stride(0),
        "x_stride": x.stride(0), "HEADS": width // head_dim, "D": head_dim, **shape, "STAGES": 3,
    }  # fmt: skip
    launch(_layer_norm_rope_backward_kernel, programs, args, num_warps=tile_warps(shape, 8))
    return dx, parts.sum(0)


@torch.library.custom_op("flagdit::layer_norm_rope", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    position: Tensor | None,
    frequency: Tensor | None,
    head_dim: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return run_forward(x, weight, bias, cos, sin, position, frequency, head_dim, eps)


@_forward.register_fake
def _(x, weight, bias, cos, sin, position, frequency, head_dim, eps):
    return x.new_empty(x.shape), x.new_empty((x.shape[0], 2), dtype=torch.float32)


@torch.library.custom_op("flagdit::layer_norm_rope_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    position: Tensor | None,
    frequency: Tensor | None,
    statistics: Tensor,
    head_dim: int,
) -> tuple[Tensor, Tensor]:
    return run_backward(dy, x, weight, cos, sin, position, frequency, statistics, head_dim)


@_backward.register_fake
def _(dy, x, weight, cos, sin, position, frequency, statistics, head_dim):
    return x.new_empty(x.shape), x.new_empty((2, x.shape[1]), dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    x, weight, bias, *angles, head_dim, _ = inputs
    ctx.save_for_backward(x, weight, bias, *angles, output[1])
    ctx.head_dim = head_dim


def _gradients(ctx, dy: Tensor, _dstatistics: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, *angles, statistics = ctx.saved_tensors
    dx, (dweight, dbias) = _backward(dy, x, weight, *angles, statistics, ctx.head_dim)
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), None, None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)


def layer_norm_rope(
    x_TW: Tensor,
    weight_W: Tensor,
    bias_W: Tensor,
    angles: Angles,
    head_dim: int,
    eps: float,
    backend: str = "auto",
) -> Tensor:
    """Normed and rotated queries or keys.

    Args:
        x_TW: fp32, bf16 or fp16; all heads in a row, rows at any stride.
        weight_W, bias_W: of the norm.
        angles: one row per token.
        head_dim: channels of a head, even.
        eps: added to the variance.
        backend: see `dispatch.use_triton`.

    Returns:
        (T, W/D, D), contiguous, in the dtype of x.

    Raises:
        ValueError: Triton is asked for and cannot serve.
    """
    if not use_triton("layer_norm_rope", backend, x_TW.device.type, x_TW.dtype, x_TW.shape[1]):
        return reference(x_TW, weight_W, bias_W, angles, head_dim, eps)
    return _forward(x_TW, weight_W, bias_W, *angles.tensors(), head_dim, eps)[0].unflatten(-1, (-1, head_dim))
