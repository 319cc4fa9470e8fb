"""Norm of queries and keys, head by head, and their rotation, both tensors in one pass.

    y = rotate(x/rms(x)·weight)     for every head of q and of k (QK-norm: arXiv 2302.05442; RoPE: arXiv 2104.09864)

Shape legend
    T        tokens
    H, K, D  query heads, key heads (K divides H), channels of a head
    R, A     pairs of a head, position axes (see `rope.py`)
    P        programs of backward

Passes over q and over k: forward 2 each (read, write), backward 3 each (read the gradient and the input, write the
gradient). Backward recomputes 1/rms: a head is in registers, and storing it would cost more. A program holds all heads
of a token, so its angles are read once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flagdit.kernels import language, rope
from flagdit.kernels.dispatch import use_triton
from flagdit.kernels.language import jit, launch, tl
from flagdit.kernels.rope import (
    Angles,
    angle_args,
    head_places,
    heads_of,
    load_angles,
    tile_mask,
    tile_shape,
    tile_warps,
    turn_pairs,
)

PROGRAMS = 1024


def reference(x_THD: Tensor, weight_D: Tensor, angles: Angles, eps: float) -> Tensor:
    """One of the two in torch; fp32 inside, or fp64 for fp64 inputs."""
    wide = torch.promote_types(x_THD.dtype, torch.float32)
    x = x_THD.to(wide)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight_D.to(wide)
    return rope.reference(x, angles).to(x_THD.dtype)


@jit
def _normed_turned(
    x, weight, y, tokens64, within, cosine, sine, x_stride, eps, HEAD_STRIDE: tl.constexpr, HEADS: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_HEADS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    mask = tile_mask(within, HEADS, D, BLOCK_HEADS, BLOCK)
    places = tokens64 * x_stride + head_places(HEAD_STRIDE, BLOCK_HEADS, BLOCK)
    value = tl.load(x + places, mask=mask, other=0.0).to(tl.float32)
    gain = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, 2) / D + eps)
    value = value * inverse[:, :, None] * gain[None, None, :]
    result = turn_pairs(value, cosine, sine, TOKENS, BLOCK_HEADS, BLOCK)
    places = tokens64 * (HEADS * D) + head_places(D, BLOCK_HEADS, BLOCK)
    tl.store(y + places, result.to(y.dtype.element_ty), mask=mask)


@jit
def _qk_norm_rope_kernel(
    q, k, q_weight, k_weight, cos, sin, position, frequency, q_out, k_out,
    num_tokens, q_stride, k_stride, position_stride, eps,
    Q_HEAD_STRIDE: tl.constexpr, K_HEAD_STRIDE: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
    D: tl.constexpr, AXES: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    within = tokens < num_tokens
    tokens64 = tokens.to(tl.int64)[:, None, None]
    cosine, sine = load_angles(cos, sin, position, frequency, tokens, within, position_stride, D // 2, AXES, BLOCK)
    _normed_turned(
        q, q_weight, q_out, tokens64, within, cosine, sine, q_stride, eps,
        Q_HEAD_STRIDE, Q_HEADS, D, BLOCK, BLOCK_Q, TOKENS,
    )  # fmt: skip
    _normed_turned(
        k, k_weight, k_out, tokens64, within, cosine, sine, k_stride, eps,
        K_HEAD_STRIDE, K_HEADS, D, BLOCK, BLOCK_K, TOKENS,
    )  # fmt: skip


@jit
def _backward_loop(
    dy, x, weight, cos, sin, position, frequency, dx, part, num_tokens, dy_stride, x_stride, position_stride, eps,
    DY_HEAD_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    AXES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_HEADS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    gain = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)[None, None, :]
    total = tl.zeros((TOKENS, BLOCK_HEADS, BLOCK), tl.float32)
    step = tl.num_programs(0) * TOKENS
    for start in tl.range(tl.program_id(0) * TOKENS, num_tokens, step, num_stages=STAGES):
        tokens = start + tl.arange(0, TOKENS)
        tokens64 = tokens.to(tl.int64)[:, None, None]
        within = tokens < num_tokens
        mask = tile_mask(within, HEADS, D, BLOCK_HEADS, BLOCK)
        places = tokens64 * dy_stride + head_places(DY_HEAD_STRIDE, BLOCK_HEADS, BLOCK)
        grad = tl.load(dy + places, mask=mask, other=0.0).to(tl.float32)
        places = tokens64 * x_stride + head_places(HEAD_STRIDE, BLOCK_HEADS, BLOCK)
        normed = tl.load(x + places, mask=mask, other=0.0).to(tl.float32)
        cosine, sine = load_angles(cos, sin, position, frequency, tokens, within, position_stride, D // 2, AXES, BLOCK)
        grad = turn_pairs(grad, cosine, -sine, TOKENS, BLOCK_HEADS, BLOCK)
        inverse = tl.rsqrt(tl.sum(normed * normed, 2) / D + eps)[:, :, None]
        normed *= inverse
        total += grad * normed
        grad *= gain
        mean = tl.sum(grad * normed, 2)[:, :, None] / D
        result = (grad - normed * mean) * inverse
        places = tokens64 * (HEADS * D) + head_places(D, BLOCK_HEADS, BLOCK)
        tl.store(dx + places, result.to(dx.dtype.element_ty), mask=mask)
    tl.store(part + columns, tl.sum(tl.sum(total, 0), 0), mask=columns < D)


@jit
def _qk_norm_rope_backward_kernel(
    dq_out, dk_out, q, k, q_weight, k_weight, cos, sin, position, frequency, dq, dk, parts,
    num_tokens, dq_out_stride, dk_out_stride, q_stride, k_stride, position_stride, eps,
    DQ_HEAD_STRIDE: tl.constexpr, DK_HEAD_STRIDE: tl.constexpr, Q_HEAD_STRIDE: tl.constexpr,
    K_HEAD_STRIDE: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, D: tl.constexpr, AXES: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    part = parts + tl.program_id(0) * 2 * D
    _backward_loop(
        dq_out, q, q_weight, cos, sin, position, frequency, dq, part,
        num_tokens, dq_out_stride, q_stride, position_stride, eps,
        DQ_HEAD_STRIDE, Q_HEAD_STRIDE, Q_HEADS, D, AXES, BLOCK, BLOCK_Q, TOKENS, STAGES,
    )  # fmt: skip
    _backward_loop(
        dk_out, k, k_weight, cos, sin, position, frequency, dk, part + D,
        num_tokens, dk_out_stride, k_stride, position_stride, eps,
        DK_HEAD_STRIDE, K_HEAD_STRIDE, K_HEADS, D, AXES, BLOCK, BLOCK_K, TOKENS, STAGES,
    )  # fmt: skip


def _shapes(q: Tensor, k: Tensor) -> tuple[dict[str, int], int]:
    """Tile of queries and of keys, and the warps for it."""
    shape = tile_shape(q.shape[1], q.shape[2])
    block_k = language.next_power_of_2(k.shape[1])
    names = {"BLOCK": shape["BLOCK"], "BLOCK_Q": shape["BLOCK_HEADS"], "BLOCK_K": block_k, "TOKENS": shape["TOKENS"]}
    return names, tile_warps(shape)


def run_forward(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    position: Tensor | None,
    frequency: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Allocates and launches."""
    q, k = heads_of(q), heads_of(k)
    q_out, k_out = (language.empty(x.shape, x.dtype, x.device) for x in (q, k))
    shape, warps = _shapes(q, k)
    args = {
        "q": q, "k": k, "q_weight": q_weight, "k_weight": k_weight, "q_out": q_out, "k_out": k_out,
        **angle_args(cos, sin, position, frequency), "num_tokens": q.shape[0],
        "q_stride": q.stride(0), "k_stride": k.stride(0), "eps": eps,
        "Q_HEAD_STRIDE": q.stride(1), "K_HEAD_STRIDE": k.stride(1),
        "Q_HEADS": q.shape[1], "K_HEADS": k.shape[1], "D": q.shape[2], **shape,
    }  # fmt: skip
    launch(_qk_norm_rope_kernel, -(-q.shape[0] // shape["TOKENS"]), args, num_warps=warps)
    return q_out, k_out


def run_backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    position: Tensor | None,
    frequency: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocates and launches: dq, dk, and the gradients of both weights (2, D) fp32."""
    dq_out, dk_out, q, k = heads_of(dq_out), heads_of(dk_out), heads_of(q), heads_of(k)
    dq, dk = (language.empty(x.shape, x.dtype, x.device) for x in (q, k))
    shape, warps = _shapes(q, k)
    programs = min(-(-q.shape[0] // shape["TOKENS"]), PROGRAMS)
    parts = language.empty((programs, 2, q.shape[2]), torch.float32, q.device)
    args = {
        "dq_out": dq_out, "dk_out": dk_out, "q": q, "k": k, "q_weight": q_weight, "k_weight": k_weight,
        **angle_args(cos, sin, position, frequency), "dq": dq, "dk": dk, "parts": parts, "num_tokens": q.shape[0],
        "dq_out_stride": dq_out.stride(0), "dk_out_stride": dk_out.stride(0), "q_stride": q.stride(0),
        "k_stride": k.stride(0), "eps": eps, "DQ_HEAD_STRIDE": dq_out.stride(1), "DK_HEAD_STRIDE": dk_out.stride(1),
        "Q_HEAD_STRIDE": q.stride(1), "K_HEAD_STRIDE": k.stride(1),
        "Q_HEADS": q.shape[1], "K_HEADS": k.shape[1], "D": q.shape[2], **shape, "STAGES": 3,
    }  # fmt: skip
    launch(_qk_norm_rope_backward_kernel, programs, args, num_warps=warps)
    return dq, dk, parts.sum(0)


@torch.library.custom_op("flagdit::qk_norm_rope", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    position: Tensor | None,
    frequency: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return run_forward(q, k, q_weight, k_weight, cos, sin, position, frequency, eps)


@_forward.register_fake
def _(q, k, q_weight, k_weight, cos, sin, position, frequency, eps):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.custom_op("flagdit::qk_norm_rope_backward", mutates_args=())
def _backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    position: Tensor | None,
    frequency: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return run_backward(dq_out, dk_out, q, k, q_weight, k_weight, cos, sin, position, frequency, eps)


@_backward.register_fake
def _(dq_out, dk_out, q, k, q_weight, k_weight, cos, sin, position, frequency, eps):
    return q.new_empty(q.shape), k.new_empty(k.shape), q.new_empty((2, q.shape[2]), dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.eps = inputs[8]


def _gradients(ctx, dq_out: Tensor, dk_out: Tensor) -> tuple[Tensor | None, ...]:
    # Activation checkpointing lets saved tensors be taken once.
    q, k, q_weight, k_weight, *angles = ctx.saved_tensors
    dq, dk, dweights = _backward(dq_out, dk_out, q, k, q_weight, k_weight, *angles, ctx.eps)
    return dq, dk, dweights[0].to(q_weight.dtype), dweights[1].to(k_weight.dtype), None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)


def qk_norm_rope(
    q_THD: Tensor,
    k_TKD: Tensor,
    q_weight_D: Tensor,
    k_weight_D: Tensor,
    angles: Angles,
    eps: float,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Normed and rotated queries and keys.

    Args:
        q_THD, k_TKD: fp32, bf16 or fp16; tokens and heads at any stride, as in one packed projection. D is even.
        q_weight_D, k_weight_D: of the norms, shared by all heads.
        angles: one row per token.
        eps: added to the mean squares.
        backend: see `dispatch.use_triton`.

    Returns:
        (T, H, D) and (T, K, D), contiguous, in the dtype of q and k.

    Raises:
        ValueError: Triton is asked for and cannot serve.
    """
    row = q_THD.shape[1] * q_THD.shape[2]
    if not use_triton("qk_norm_rope", backend, q_THD.device.type, q_THD.dtype, row):
        return reference(q_THD, q_weight_D, angles, eps), reference(k_TKD, k_weight_D, angles, eps)
    return _forward(q_THD, k_TKD, q_weight_D, k_weight_D, *angles.tensors(), eps)
