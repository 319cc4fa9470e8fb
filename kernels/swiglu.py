"""The activation of SwiGLU (arXiv 2002.05202): y = silu(a)·b = a·σ(a)·b.

Shape legend: T tokens, F hidden width.

Passes over the (T, F) tensor: forward 3 (read a and b, write y), backward 5 (read dy, a and b, write da and db).
Backward computes σ(a) again, so nothing is kept but the inputs. Contiguous tensors are one long row; halves of one
(T, 2F) projection are read at their stride. Offsets are 64 bits wide: T·F passes 2³¹ at 200,000 tokens of a 7B model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flagdit.kernels import language
from flagdit.kernels.dispatch import use_triton
from flagdit.kernels.language import jit, launch, rows_of, tl

BLOCK = 2048
WARPS = 8


def reference(a_TF: Tensor, b_TF: Tensor) -> Tensor:
    """The same in torch; fp32 inside, or fp64 for fp64 inputs."""
    wide = torch.promote_types(a_TF.dtype, torch.float32)
    return (F.silu(a_TF.to(wide)) * b_TF.to(wide)).to(a_TF.dtype)


@jit
def _swiglu_kernel(a, b, y, width, blocks, a_stride, b_stride, y_stride, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gate = tl.load(a + row * a_stride + columns, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(b + row * b_stride + columns, mask=mask, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * value
    tl.store(y + row * y_stride + columns, result.to(y.dtype.element_ty), mask=mask)


@jit
def _swiglu_backward_kernel(
    dy, a, b, da, db, width, blocks, dy_stride, a_stride, b_stride, out_stride, BLOCK: tl.constexpr
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    grad = tl.load(dy + row * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(a + row * a_stride + columns, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(b + row * b_stride + columns, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    to_gate = grad * value * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(da + row * out_stride + columns, to_gate.to(da.dtype.element_ty), mask=mask)
    tl.store(db + row * out_stride + columns, (grad * silu).to(db.dtype.element_ty), mask=mask)


def _rows(*tensors: Tensor) -> tuple[list[Tensor], int, dict[str, int]]:
    """Tensors as rows for the kernels, one long row if all are contiguous; programs, and sizes that they read."""
    rows = [rows_of(x) for x in tensors]
    num_rows, width = rows[0].shape
    if all(x.is_contiguous() for x in rows):
        rows = [x.view(1, -1) for x in rows]
        num_rows, width = 1, num_rows * width
    blocks = -(-width // BLOCK)
    return rows, num_rows * blocks, {"width": width, "blocks": blocks, "BLOCK": BLOCK}


def run_forward(a: Tensor, b: Tensor) -> Tensor:
    """Allocates and launches."""
    y = language.empty(a.shape, a.dtype, a.device)
    (a, b, flat), programs, sizes = _rows(a, b, y)
    args = {"a": a, "b": b, "y": flat, "a_stride": a.stride(0), "b_stride": b.stride(0), "y_stride": flat.stride(0)}
    launch(_swiglu_kernel, programs, {**args, **sizes}, num_warps=WARPS)
    return y


def run_backward(dy: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Allocates and launches: da, db."""
    da, db = (language.empty(a.shape, a.dtype, a.device) for _ in range(2))
    (dy, a, b, flat_a, flat_b), programs, sizes = _rows(dy, a, b, da, db)
    args = {
        "dy": dy, "a": a, "b": b, "da": flat_a, "db": flat_b, "dy_stride": dy.stride(0),
        "a_stride": a.stride(0), "b_stride": b.stride(0), "out_stride": flat_a.stride(0), **sizes,
    }  # fmt: skip
    launch(_swiglu_backward_kernel, programs, args, num_warps=WARPS)
    return da, db


@torch.library.custom_op("flagdit::swiglu", mutates_args=())
def _forward(a: Tensor, b: Tensor) -> Tensor:
    return run_forward(a, b)


@_forward.register_fake
def _(a, b):
    return a.new_empty(a.shape)


@torch.library.custom_op("flagdit::swiglu_backward", mutates_args=())
def _backward(dy: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return run_backward(dy, a, b)


@_backward.register_fake
def _(dy, a, b):
    return a.new_empty(a.shape), a.new_empty(a.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
    return _backward(dy, *ctx.saved_tensors)


_forward.register_autograd(_gradients, setup_context=_save)


def swiglu(a_TF: Tensor, b_TF: Tensor, backend: str = "auto") -> Tensor:
    """silu(a)·b.

    Args:
        a_TF, b_TF: one shape and dtype: fp32, bf16 or fp16; rows at any stride.
        backend: see `dispatch.use_triton`.

    Returns:
        (T, F) in the dtype of a.

    Raises:
        ValueError: Triton is asked for and cannot serve.
    """
    if not use_triton("swiglu", backend, a_TF.device.type, a_TF.dtype):
        return reference(a_TF, b_TF)
    return _forward(a_TF, b_TF)
