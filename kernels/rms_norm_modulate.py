"""RMSNorm with every sample's own shift and scale: y = x/rms(x)·weight·(1 + scale) + shift (arXiv 1910.07467,
2212.09748), over packed samples of any length.

Shape legend
    T, S  rows (tokens) and samples of the pack
    D     channels
    C     chunks of rows inside one sample (see `segments.py`)

Passes over the (T, D) tensor: forward 2 (read x, write y), backward 3 (read dy and x, write dx), one more where the
gradient of a residual branch is added on the way. All arithmetic is fp32, with one rounding at each write.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flagdit.kernels import language
from flagdit.kernels.dispatch import use_triton
from flagdit.kernels.language import jit, launch, optional_rows, rows_of, stride, tl
from flagdit.kernels.segments import Segments, segment_sums


def reference(
    x_TD: Tensor,
    weight_D: Tensor | None,
    shift_SD: Tensor | None,
    scale_SD: Tensor | None,
    segments: Segments,
    eps: float,
) -> Tensor:
    """The same in torch; fp32 inside, or fp64 for fp64 inputs."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    x = x_TD.to(wide)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if weight_D is not None:
        y = y * weight_D.to(wide)
    if scale_SD is not None:
        y = y * (1 + scale_SD.to(wide))[segments.ids_T]
    if shift_SD is not None:
        y = y + shift_SD.to(wide)[segments.ids_T]
    return y.to(x_TD.dtype)


@jit
def factor(weight, scale, segment, scale_stride, columns, inside, BLOCK: tl.constexpr):
    """weight·(1 + scale) of one sample, fp32; absent ones count as 1 and 0."""
    product = tl.full((BLOCK,), 1.0, tl.float32)
    if weight is not None:
        product = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if scale is not None:
        row = scale + segment.to(tl.int64) * scale_stride
        product *= 1.0 + tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)
    return product


@jit
def _rms_norm_modulate_kernel(
    x, weight, shift, scale, chunks, y, rstd,
    x_stride, shift_stride, scale_stride, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    first = tl.load(chunks + 3 * chunk)
    end = tl.load(chunks + 3 * chunk + 1)
    segment = tl.load(chunks + 3 * chunk + 2)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    product = factor(weight, scale, segment, scale_stride, columns, inside, BLOCK)
    if shift is not None:
        row = shift + segment.to(tl.int64) * shift_stride
        addend = tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)
    for start in tl.range(first, end, ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < end)[:, None] & inside[None, :]
        rows64 = rows.to(tl.int64)[:, None]
        value = tl.load(x + rows64 * x_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(value * value, 1) / D + eps)
        tl.store(rstd + rows, inverse, mask=rows < end)
        result = value * inverse[:, None] * product[None, :]
        if shift is not None:
            result += addend[None, :]
        tl.store(y + rows64 * D + columns[None, :], result.to(y.dtype.element_ty), mask=mask)


@jit
def _rms_norm_modulate_backward_kernel(
    dy, dresidual, x, weight, scale, rstd, chunks, dx, parts,
    dy_stride, dresidual_stride, x_stride, scale_stride,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, SUMS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    first = tl.load(chunks + 3 * chunk)
    end = tl.load(chunks + 3 * chunk + 1)
    segment = tl.load(chunks + 3 * chunk + 2)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    product = factor(weight, scale, segment, scale_stride, columns, inside, BLOCK)
    sum_scaled = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_plain = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(first, end, ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < end)[:, None] & inside[None, :]
        rows64 = rows.to(tl.int64)[:, None]
        grad = tl.load(dy + rows64 * dy_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        value = tl.load(x + rows64 * x_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        inverse = tl.load(rstd + rows, mask=rows < end, other=0.0)[:, None]
        normed = value * inverse
        sum_scaled += grad * normed
        if SUMS == 2:
            sum_plain += grad
        grad *= product[None, :]
        mean = tl.sum(grad * normed, 1) / D
        result = (grad - normed * mean[:, None]) * inverse
        if dresidual is not None:
            residual = tl.load(dresidual + rows64 * dresidual_stride + columns[None, :], mask=mask, other=0.0)
            result += residual.to(tl.float32)
        tl.store(dx + rows64 * D + columns[None, :], result.to(dx.dtype.element_ty), mask=mask)
    row = parts + chunk.to(tl.int64) * (SUMS * D)
    tl.store(row + columns, tl.sum(sum_scaled, 0), mask=inside)
    if SUMS == 2:
        tl.store(row + D + columns, tl.sum(sum_plain, 0), mask=inside)


def row_shape(width: int) -> dict[str, int]:
    """BLOCK columns and ROWS rows of a program's tile: about 2048 elements, so that narrow rows share a program."""
    block = language.next_power_of_2(width)
    return {"BLOCK": block, "ROWS": max(1, min(16, 2048 // block))}


def row_warps(width: int, per_thread: int = 16) -> int:
    """Warps for a tile, with that many elements for each thread."""
    shape = row_shape(width)
    return max(1, min(16, shape["BLOCK"] * shape["ROWS"] // (32 * per_thread)))


def run_forward(
    x: Tensor,
    weight: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    chunks: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Allocates and launches: y (T, D) and 1/rms (T,) fp32."""
    num_rows, width = x.shape
    x, shift, scale = rows_of(x), optional_rows(shift), optional_rows(scale)
    y = language.empty((num_rows, width), x.dtype, x.device)
    rstd = language.empty((num_rows,), torch.float32, x.device)
    args = {
        "x": x, "weight": weight, "shift": shift, "scale": scale, "chunks": chunks, "y": y, "rstd": rstd,
        "x_stride": x.stride(0), "shift_stride": stride(shift), "scale_stride": stride(scale), "eps": eps,
        "D": width, **row_shape(width), "STAGES": 3,
    }  # fmt: skip
    launch(_rms_norm_modulate_kernel, len(chunks), args, num_warps=row_warps(width))
    return y, rstd


def run_backward(
    dy: Tensor,
    dresidual: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    rstd: Tensor,
    chunks: Tensor,
    offsets: Tensor,
    shifted: bool,
) -> tuple[Tensor, Tensor]:
    """Allocates and launches: dx (T, D), and the sums over each sample of dy·x/rms and, if shifted, of dy."""
    num_rows, width = x.shape
    dy, dresidual, x, scale = rows_of(dy), optional_rows(dresidual), rows_of(x), optional_rows(scale)
    dx = language.empty((num_rows, width), x.dtype, x.device)
    parts = language.empty((len(chunks), 1 + shifted, width), torch.float32, x.device)
    args = {
        "dy": dy, "dresidual": dresidual, "x": x, "weight": weight, "scale": scale, "rstd": rstd,
        "chunks": chunks, "dx": dx, "parts": parts,
        "dy_stride": dy.stride(0), "dresidual_stride": stride(dresidual), "x_stride": x.stride(0),
        "scale_stride": stride(scale), "D": width, **row_shape(width), "SUMS": 1 + shifted, "STAGES": 3,
    }  # fmt: skip
    launch(_rms_norm_modulate_backward_kernel, len(chunks), args, num_warps=row_warps(width, 8))
    return dx, segment_sums(parts, offsets)


@torch.library.custom_op("flagdit::rms_norm_modulate", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    chunks: Tensor,
    offsets: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return run_forward(x, weight, shift, scale, chunks, eps)


@_forward.register_fake
def _(x, weight, shift, scale, chunks, offsets, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape[:1], dtype=torch.float32)


@torch.library.custom_op("flagdit::rms_norm_modulate_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dresidual: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    rstd: Tensor,
    chunks: Tensor,
    offsets: Tensor,
    shifted: bool,
) -> tuple[Tensor, Tensor]:
    return run_backward(dy, dresidual, x, weight, scale, rstd, chunks, offsets, shifted)


@_backward.register_fake
def _(dy, dresidual, x, weight, scale, rstd, chunks, offsets, shifted):
    sums = x.new_empty((offsets.shape[0] - 1, 1 + shifted, x.shape[1]), dtype=torch.float32)
    return x.new_empty(x.shape), sums


def _save(ctx, inputs, output) -> None:
    x, weight, shift, scale, chunks, offsets, _ = inputs
    ctx.save_for_backward(x, weight, shift, scale, chunks, offsets, output[1])


def _gradients(ctx, dy: Tensor, _drstd: Tensor | None, dresidual: Tensor | None = None) -> tuple[Tensor | None, ...]:
    x, weight, shift, scale, chunks, offsets, rstd = ctx.saved_tensors
    dx, sums_SKD = _backward(dy, dresidual, x, weight, scale, rstd, chunks, offsets, shift is not None)
    dweight, dscale = split_factor(sums_SKD[:, 0], weight, scale)
    dshift = None if shift is None else sums_SKD[:, 1].to(shift.dtype)
    return dx, dweight, dshift, dscale, None, None, None


def split_factor(
    sum_SD: Tensor, weight_D: Tensor | None, scale_SD: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and scale from that of their product weight·(1 + scale)."""
    dweight = dscale = None
    if weight_D is not None:
        dweight = (sum_SD if scale_SD is None else sum_SD * (1 + scale_SD.float())).sum(0).to(weight_D.dtype)
    if scale_SD is not None:
        dscale = (sum_SD if weight_D is None else sum_SD * weight_D.float()).to(scale_SD.dtype)
    return dweight, dscale


_forward.register_autograd(_gradients, setup_context=_save)


class _WithResidual(torch.autograd.Function):
    """(x, y), where backward adds the gradient of x to that which comes through y, in one pass instead of three."""

    @staticmethod
    def forward(ctx, *inputs):
        y, rstd = _forward(*inputs)
        _save(ctx, inputs, (y, rstd))
        return inputs[0].view_as(inputs[0]), y

    @staticmethod
    def backward(ctx, dresidual, dy):
        return _gradients(ctx, dy, None, dresidual)


def rms_norm_modulate(
    x_TD: Tensor,
    weight_D: Tensor | None,
    shift_SD: Tensor | None,
    scale_SD: Tensor | None,
    segments: Segments,
    eps: float,
    backend: str = "auto",
) -> Tensor:
    """x/rms(x)·weight·(1 + scale) + shift.

    Args:
        x_TD: fp32, bf16 or fp16, rows at any stride.
        weight_D: of the norm; None: 1.
        shift_SD, scale_SD: one row per sample, at any stride; None: 0.
        segments: the samples of the rows.
        eps: added to the mean square.
        backend: see `dispatch.use_triton`.

    Returns:
        (T, D) in the dtype of x.

    Raises:
        ValueError: Triton is asked for and cannot serve.
    """
    if not use_triton("rms_norm_modulate", backend, x_TD.device.type, x_TD.dtype, x_TD.shape[1]):
        return reference(x_TD, weight_D, shift_SD, scale_SD, segments, eps)
    return _forward(x_TD, weight_D, shift_SD, scale_SD, segments.chunks_C3, segments.offsets_S, eps)[0]


def rms_norm_modulate_residual(
    x_TD: Tensor,
    weight_D: Tensor | None,
    shift_SD: Tensor | None,
    scale_SD: Tensor | None,
    segments: Segments,
    eps: float,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(x, `rms_norm_modulate` of x): use the returned x for the residual branch, and backward is one pass shorter."""
    if not use_triton("rms_norm_modulate", backend, x_TD.device.type, x_TD.dtype, x_TD.shape[1]):
        return x_TD, reference(x_TD, weight_D, shift_SD, scale_SD, segments, eps)
    return _WithResidual.apply(x_TD, weight_D, shift_SD, scale_SD, segments.chunks_C3, segments.offsets_S, eps)
