"""Rotary position embedding of neighbouring pairs (arXiv 2104.09864), from a table or from positions.

Shape legend
    T     tokens
    H, D  heads, channels of a head
    R     pairs that rotate together: D/2
    A     position axes

Pair j of every head turns by the angle position[j mod A]·frequency[j], frequency[j] = theta^(−2A·⌊j/A⌋/D): A = 1 is the
1D rotation of Flag-DiT, A = 2 or 3 are axial. The gradient is the rotation by the opposite angle, so nothing is saved
but the angles.

Passes over the (T, H, D) tensor: 2 forward, 2 backward, or 2 in place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flagdit.kernels import language
from flagdit.kernels.dispatch import use_triton
from flagdit.kernels.language import jit, launch, optional_rows, stride, tl


@dataclass(frozen=True)
class Angles:
    """The angles of all tokens: cosines and sines, or positions and frequencies to compute them from.

    Attributes:
        cos_TR, sin_TR: fp32 table; None when computed.
        position_TA: positions, of any dtype that fp32 holds exactly; None with a table.
        frequency_R: fp32; None with a table.
    """

    cos_TR: Tensor | None = None
    sin_TR: Tensor | None = None
    position_TA: Tensor | None = None
    frequency_R: Tensor | None = None

    def __post_init__(self) -> None:
        given = [x is not None for x in (self.cos_TR, self.sin_TR, self.position_TA, self.frequency_R)]
        assert given in ([True, True, False, False], [False, False, True, True]), "a table, or positions: one of them"

    @property
    def num_pairs(self) -> int:
        """R."""
        table_R = self.frequency_R if self.cos_TR is None else self.cos_TR
        assert table_R is not None
        return table_R.shape[-1]

    def table(self) -> tuple[Tensor, Tensor]:
        """(T, R) cosines and sines."""
        if self.cos_TR is not None and self.sin_TR is not None:
            return self.cos_TR, self.sin_TR
        assert self.position_TA is not None and self.frequency_R is not None
        pairs = torch.arange(len(self.frequency_R), device=self.frequency_R.device)
        angle_TR = self.position_TA.to(self.frequency_R.dtype)[:, pairs % self.position_TA.shape[1]] * self.frequency_R
        return angle_TR.cos(), angle_TR.sin()

    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        return self.cos_TR, self.sin_TR, self.position_TA, self.frequency_R


def frequencies(head_dim: int, axes: int, theta: float, device: torch.device | str) -> Tensor:
    """(R,) fp32: radians per position of every pair."""
    exponent_R = torch.arange(head_dim // 2, device=device) // axes * (2 * axes / head_dim)
    return theta**-exponent_R


def reference(x_THD: Tensor, angles: Angles) -> Tensor:
    """The rotation in torch; fp32 inside, or fp64 for fp64 inputs."""
    wide = torch.promote_types(x_THD.dtype, torch.float32)
    cos_T1R, sin_T1R = (table.to(wide)[:, None] for table in angles.table())
    even, odd = x_THD.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos_T1R - odd * sin_T1R, even * sin_T1R + odd * cos_T1R], dim=-1)
    return turned.flatten(-2).to(x_THD.dtype)


@jit
def sin_cos(angle):
    """Sine and cosine of fp32 angles up to 2e5, to 2e-7.

    The hardware's own are wrong for large angles. Here whole quarter turns are taken off first: π/2 is a sum of parts
    so short that their multiples are exact, with or without fused multiply-adds.
    """
    quarters = tl.floor(angle * 0.6366197723675814 + 0.5)
    rest = angle - quarters * 1.5625
    rest -= quarters * 0.0081787109375
    rest -= quarters * 0.00011730194091796875
    rest -= quarters * 3.1391647326017846e-07
    square = rest * rest
    s = rest + rest * square * (-0.16666665 + square * (0.00833275 - square * 0.00019588))
    c = 1.0 - 0.5 * square + square * square * (0.0416666647 + square * (-0.00138883025 + square * 2.45477884e-05))
    turn = quarters.to(tl.int32)
    odd = (turn & 1) != 0
    sine = tl.where(odd, c, s)
    cosine = tl.where(odd, s, c)
    sine = tl.where((turn & 2) != 0, -sine, sine)
    cosine = tl.where(((turn + 1) & 2) != 0, -cosine, cosine)
    return sine, cosine


@jit
def load_angles(
    cos, sin, position, frequency, tokens, within, position_stride, PAIRS: tl.constexpr, AXES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Cosines and sines [tokens, 1, pairs] of a tile, for all its heads; tokens that are not `within` do not turn."""
    pairs = tl.arange(0, BLOCK // 2)
    mask = within[:, None] & (pairs < PAIRS)[None, :]
    tokens64 = tokens.to(tl.int64)[:, None]
    if cos is not None:
        cosine = tl.load(cos + tokens64 * PAIRS + pairs[None, :], mask=mask, other=1.0).to(tl.float32)
        sine = tl.load(sin + tokens64 * PAIRS + pairs[None, :], mask=mask, other=0.0).to(tl.float32)
    else:
        place = tl.load(position + tokens64 * position_stride + pairs[None, :] % AXES, mask=mask, other=0)
        turn = tl.load(frequency + pairs, mask=pairs < PAIRS, other=0.0)
        sine, cosine = sin_cos(place.to(tl.float32) * turn[None, :])
    return cosine[:, None, :], sine[:, None, :]


@jit
def turn_pairs(x, cosine, sine, TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Rotates neighbouring channels of x [TOKENS, HEADS, BLOCK]."""
    even, odd = tl.split(tl.reshape(x, (TOKENS, HEADS, BLOCK // 2, 2)))
    turned = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
    return tl.reshape(turned, (TOKENS, HEADS, BLOCK))


@jit
def head_places(HEAD_STRIDE: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Places [1, heads, channels] in a token's row."""
    return (tl.arange(0, BLOCK_HEADS) * HEAD_STRIDE)[None, :, None] + tl.arange(0, BLOCK)[None, None, :]


@jit
def tile_mask(within, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Which places of a tile [tokens, heads, channels] there are."""
    heads = (tl.arange(0, BLOCK_HEADS) < HEADS)[None, :, None] & (tl.arange(0, BLOCK) < D)[None, None, :]
    return within[:, None, None] & heads


@jit
def _rope_kernel(
    x, y, cos, sin, position, frequency, num_tokens, x_stride, y_stride, position_stride, sign,
    HEAD_STRIDE: tl.constexpr, OUT_HEAD_STRIDE: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    AXES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_HEADS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    within = tokens < num_tokens
    tokens64 = tokens.to(tl.int64)[:, None, None]
    cosine, sine = load_angles(cos, sin, position, frequency, tokens, within, position_stride, D // 2, AXES, BLOCK)
    mask = tile_mask(within, HEADS, D, BLOCK_HEADS, BLOCK)
    places = tokens64 * x_stride + head_places(HEAD_STRIDE, BLOCK_HEADS, BLOCK)
    value = tl.load(x + places, mask=mask, other=0.0).to(tl.float32)
    result = turn_pairs(value, cosine, sine * sign, TOKENS, BLOCK_HEADS, BLOCK)
    places = tokens64 * y_stride + head_places(OUT_HEAD_STRIDE, BLOCK_HEADS, BLOCK)
    tl.store(y + places, result.to(y.dtype.element_ty), mask=mask)


def tile_shape(heads: int, width: int, elements: int = 4096) -> dict[str, int]:
    """A tile of all heads of TOKENS tokens: about so many elements, in powers of two."""
    block, block_heads = language.next_power_of_2(width), language.next_power_of_2(heads)
    return {"BLOCK": block, "BLOCK_HEADS": block_heads, "TOKENS": max(1, elements // (block * block_heads))}


def tile_warps(shape: dict[str, int], per_thread: int = 16) -> int:
    """Warps for a tile, with that many elements for each thread."""
    return max(1, min(16, shape["BLOCK"] * shape["BLOCK_HEADS"] * shape["TOKENS"] // (32 * per_thread)))


def heads_of(x_THD: Tensor) -> Tensor:
    """x itself if its last axis is contiguous, as the kernels read it, else a copy."""
    return x_THD if x_THD.stride(-1) == 1 else x_THD.contiguous()


def angle_args(
    cos: Tensor | None, sin: Tensor | None, position: Tensor | None, frequency: Tensor | None
) -> dict[str, Tensor | int | None]:
    """The arguments of `load_angles`."""
    cos, sin = (None if table is None else table.contiguous() for table in (cos, sin))
    position = optional_rows(position)
    return {
        "cos": cos, "sin": sin, "position": position, "frequency": frequency,
        "position_stride": stride(position), "AXES": 1 if position is None else position.shape[1],
    }  # fmt: skip


def run(
    x: Tensor,
    y: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    position: Tensor | None,
    frequency: Tensor | None,
    sign: float,
) -> None:
    """Launches: y (T, H, D), which may be x, becomes x turned by the angles times `sign`."""
    num_tokens, heads, width = x.shape
    shape = tile_shape(heads, width)
    args = {
        "x": x, "y": y, "num_tokens": num_tokens, "x_stride": x.stride(0), "y_stride": y.stride(0),
        "HEAD_STRIDE": x.stride(1), "OUT_HEAD_STRIDE": y.stride(1), "sign": float(sign), "HEADS": heads, "D": width,
        **angle_args(cos, sin, position, frequency), **shape,
    }  # fmt: skip
    launch(_rope_kernel, -(-num_tokens // shape["TOKENS"]), args, num_warps=tile_warps(shape))


@torch.library.custom_op("flagdit::rope", mutates_args=())
def _forward(
    x: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    position: Tensor | None,
    frequency: Tensor | None,
    sign: int,
) -> Tensor:
    y = language.empty(x.shape, x.dtype, x.device)
    run(heads_of(x), y, cos, sin, position, frequency, sign)
    return y


@_forward.register_fake
def _(x, cos, sin, position, frequency, sign):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:5])
    ctx.sign = inputs[5]


def _gradients(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    return _forward(dy, *ctx.saved_tensors, -ctx.sign), None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("flagdit::rope_", mutates_args=("x",))
def _in_place(
    x: Tensor, cos: Tensor | None, sin: Tensor | None, position: Tensor | None, frequency: Tensor | None
) -> None:
    run(x, x, cos, sin, position, frequency, 1)


@_in_place.register_fake
def _(x, cos, sin, position, frequency):
    return None


def rope(x_THD: Tensor, angles: Angles, *, in_place: bool = False, backend: str = "auto") -> Tensor:
    """Rotates the pairs of every head.

    Args:
        x_THD: fp32, bf16 or fp16; tokens and heads at any stride. D is even.
        angles: one row per token; they get no gradient.
        in_place: write the result over x, which the caller must not need any more. Refused where autograd would.
        backend: see `dispatch.use_triton`.

    Returns:
        (T, H, D) in the dtype of x: x itself if in place.

    Raises:
        ValueError: in place where a gradient is wanted or where elements of x share memory; or Triton is asked for
            and cannot serve.
    """
    triton = use_triton("rope", backend, x_THD.device.type, x_THD.dtype, x_THD.shape[2])
    if not in_place:
        return _forward(x_THD, *angles.tensors(), 1) if triton else reference(x_THD, angles)
    if torch.is_grad_enabled() and x_THD.requires_grad:
        raise ValueError("rope: in_place=True would overwrite what a gradient is wanted for")
    if any(n > 1 and s == 0 for n, s in zip(x_THD.shape, x_THD.stride(), strict=True)) or x_THD.stride(-1) != 1:
        raise ValueError("rope: in_place=True needs memory of its own for every element, contiguous in a head")
    if triton:
        _in_place(x_THD, *angles.tensors())
        return x_THD
    return x_THD.copy_(reference(x_THD, angles))
