"""Gated residual addition and the norm after it, in one pass over packed samples.

    x' = x + gate·f                       Flag-DiT, or
    x' = x + tanh(gate)·f/rms(f)·w_f      Next-DiT's sandwich
    y  = x'/rms(x')·w·(1 + scale) + shift

Shape legend
    T, S  rows (tokens) and samples of the pack
    D     channels
    C     chunks of rows inside one sample (see `segments.py`)

Passes over the (T, D) tensor: forward 4 (read x and f, write x' and y), backward 6 (read dx', dy, x' and f, write dx
and df). Without the norm: 3 and 3, since dx is dx'. All arithmetic is fp32, with one rounding at each write; the norm
reads x' as rounded, because that is what backward has. The tanh is taken of S rows, beside the kernels: it costs
nothing there, and Triton has none that is exact for small arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flagdit.kernels import language
from flagdit.kernels import rms_norm_modulate as norm
from flagdit.kernels.dispatch import use_triton
from flagdit.kernels.language import jit, launch, optional_rows, rows_of, stride, tl
from flagdit.kernels.rms_norm_modulate import factor, row_shape, row_warps, split_factor
from flagdit.kernels.segments import Segments, segment_sums


def reference(
    x_TD: Tensor, f_TD: Tensor, gate_SD: Tensor, f_weight_D: Tensor | None, segments: Segments, eps: float
) -> Tensor:
    """x' in torch; fp32 inside, or fp64 for fp64 inputs."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    f = f_TD.to(wide)
    if f_weight_D is not None:
        f = f * torch.rsqrt(f.square().mean(-1, keepdim=True) + eps) * f_weight_D.to(wide)
    return (x_TD.to(wide) + gate_SD.to(wide)[segments.ids_T] * f).to(x_TD.dtype)


@jit
def _gated_residual_norm_kernel(
    x, f, gate, f_weight, weight, shift, scale, chunks, x_out, y, f_rstd, rstd,
    x_stride, f_stride, gate_stride, shift_stride, scale_stride, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    first = tl.load(chunks + 3 * chunk)
    end = tl.load(chunks + 3 * chunk + 1)
    segment = tl.load(chunks + 3 * chunk + 2)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    gain = tl.load(gate + segment.to(tl.int64) * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if f_weight is not None:
        gain *= tl.load(f_weight + columns, mask=inside, other=0.0).to(tl.float32)
    if y is not None:
        product = factor(weight, scale, segment, scale_stride, columns, inside, BLOCK)
    if shift is not None:
        row = shift + segment.to(tl.int64) * shift_stride
        addend = tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)
    for start in tl.range(first, end, ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < end)[:, None] & inside[None, :]
        rows64 = rows.to(tl.int64)[:, None]
        branch = tl.load(f + rows64 * f_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        value = tl.load(x + rows64 * x_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        if f_weight is not None:
            inverse = tl.rsqrt(tl.sum(branch * branch, 1) / D + eps)
            tl.store(f_rstd + rows, inverse, mask=rows < end)
            branch *= inverse[:, None]
        rounded = (value + branch * gain[None, :]).to(x_out.dtype.element_ty)
        tl.store(x_out + rows64 * D + columns[None, :], rounded, mask=mask)
        if y is not None:
            value = rounded.to(tl.float32)
            inverse = tl.rsqrt(tl.sum(value * value, 1) / D + eps)
            tl.store(rstd + rows, inverse, mask=rows < end)
            result = value * inverse[:, None] * product[None, :]
            if shift is not None:
                result += addend[None, :]
            tl.store(y + rows64 * D + columns[None, :], result.to(y.dtype.element_ty), mask=mask)


@jit
def _gated_residual_norm_backward_kernel(
    dx_out, dy, x_out, f, gate, f_weight, weight, scale, f_rstd, rstd, chunks, dx, df, parts,
    dx_out_stride, dy_stride, f_stride, gate_stride, scale_stride,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, SUMS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    first = tl.load(chunks + 3 * chunk)
    end = tl.load(chunks + 3 * chunk + 1)
    segment = tl.load(chunks + 3 * chunk + 2)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    gain = tl.load(gate + segment.to(tl.int64) * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if f_weight is not None:
        gain *= tl.load(f_weight + columns, mask=inside, other=0.0).to(tl.float32)
    sum_gate = tl.zeros((ROWS, BLOCK), tl.float32)
    if dy is not None:
        product = factor(weight, scale, segment, scale_stride, columns, inside, BLOCK)
        sum_scaled = tl.zeros((ROWS, BLOCK), tl.float32)
        sum_plain = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(first, end, ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < end)[:, None] & inside[None, :]
        rows64 = rows.to(tl.int64)[:, None]
        total = tl.load(dx_out + rows64 * dx_out_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        branch = tl.load(f + rows64 * f_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        if dy is not None:
            grad = tl.load(dy + rows64 * dy_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            normed = tl.load(x_out + rows64 * D + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            inverse = tl.load(rstd + rows, mask=rows < end, other=0.0)[:, None]
            normed *= inverse
            sum_scaled += grad * normed
            if SUMS == 3:
                sum_plain += grad
            grad *= product[None, :]
            mean = tl.sum(grad * normed, 1) / D
            total += (grad - normed * mean[:, None]) * inverse
            tl.store(dx + rows64 * D + columns[None, :], total.to(dx.dtype.element_ty), mask=mask)
        if f_weight is not None:
            inverse = tl.load(f_rstd + rows, mask=rows < end, other=0.0)[:, None]
            branch *= inverse
        sum_gate += total * branch
        total *= gain[None, :]
        if f_weight is not None:
            mean = tl.sum(total * branch, 1) / D
            total = (total - branch * mean[:, None]) * inverse
        tl.store(df + rows64 * D + columns[None, :], total.to(df.dtype.element_ty), mask=mask)
    row = parts + chunk.to(tl.int64) * (SUMS * D)
    tl.store(row + columns, tl.sum(sum_gate, 0), mask=inside)
    if dy is not None:
        tl.store(row + D + columns, tl.sum(sum_scaled, 0), mask=inside)
        if SUMS == 3:
            tl.store(row + 2 * D + columns, tl.sum(sum_plain, 0), mask=inside)


def run_forward(
    x: Tensor,
    f: Tensor,
    gate: Tensor,
    f_weight: Tensor | None,
    normed: bool,
    weight: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    chunks: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocates and launches: x', y, 1/rms(f), 1/rms(x'); without norm or sandwich, theirs are empty."""
    num_rows, width = x.shape
    x, f, gate, shift, scale = rows_of(x), rows_of(f), rows_of(gate), optional_rows(shift), optional_rows(scale)
    x_out = language.empty((num_rows, width), x.dtype, x.device)
    y = language.empty((num_rows if normed else 0, width), x.dtype, x.device)
    f_rstd = language.empty((0 if f_weight is None else num_rows,), torch.float32, x.device)
    rstd = language.empty((num_rows if normed else 0,), torch.float32, x.device)
    args = {
        "x": x, "f": f, "gate": gate, "f_weight": f_weight, "weight": weight, "shift": shift, "scale": scale,
        "chunks": chunks, "x_out": x_out, "y": y if normed else None,
        "f_rstd": None if f_weight is None else f_rstd, "rstd": rstd if normed else None,
        "x_stride": x.stride(0), "f_stride": f.stride(0), "gate_stride": gate.stride(0),
        "shift_stride": stride(shift), "scale_stride": stride(scale), "eps": eps,
        "D": width, **row_shape(width), "STAGES": 3,
    }  # fmt: skip
    launch(_gated_residual_norm_kernel, len(chunks), args, num_warps=row_warps(width, 8))
    return x_out, y, f_rstd, rstd


def run_backward(
    dx_out: Tensor,
    dy: Tensor | None,
    x_out: Tensor | None,
    f: Tensor,
    gate: Tensor,
    f_weight: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    f_rstd: Tensor,
    rstd: Tensor,
    chunks: Tensor,
    offsets: Tensor,
    shifted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocates and launches: dx (empty without norm, where it is dx'), df, and the sums over each sample of
    dx·f/rms(f) (or dx·f) and, with norm, of dy·x'/rms(x') and, if shifted, of dy."""
    num_rows, width = f.shape
    dx_out, dy, f, gate, scale = rows_of(dx_out), optional_rows(dy), rows_of(f), rows_of(gate), optional_rows(scale)
    normed = dy is not None
    dx = language.empty((num_rows if normed else 0, width), f.dtype, f.device)
    df = language.empty((num_rows, width), f.dtype, f.device)
    sums = 1 + normed + (normed and shifted)
    parts = language.empty((len(chunks), sums, width), torch.float32, f.device)
    args = {
        "dx_out": dx_out, "dy": dy, "x_out": x_out, "f": f, "gate": gate, "f_weight": f_weight,
        "weight": weight, "scale": scale, "f_rstd": None if f_weight is None else f_rstd,
        "rstd": rstd if normed else None, "chunks": chunks, "dx": dx if normed else None, "df": df, "parts": parts,
        "dx_out_stride": dx_out.stride(0), "dy_stride": stride(dy), "f_stride": f.stride(0),
        "gate_stride": gate.stride(0), "scale_stride": stride(scale),
        "D": width, **row_shape(width), "SUMS": sums, "STAGES": 3,
    }  # fmt: skip
    launch(_gated_residual_norm_backward_kernel, len(chunks), args, num_warps=row_warps(width, 8))
    return dx, df, segment_sums(parts, offsets)


@torch.library.custom_op("flagdit::gated_residual_norm", mutates_args=())
def _forward(
    x: Tensor,
    f: Tensor,
    gate: Tensor,
    f_weight: Tensor | None,
    normed: bool,
    weight: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    chunks: Tensor,
    offsets: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return run_forward(x, f, gate, f_weight, normed, weight, shift, scale, chunks, eps)


@_forward.register_fake
def _(x, f, gate, f_weight, normed, weight, shift, scale, chunks, offsets, eps):
    rows, width = x.shape
    y_rows, f_rows = rows if normed else 0, 0 if f_weight is None else rows
    f_rstd, rstd = (x.new_empty((n,), dtype=torch.float32) for n in (f_rows, y_rows))
    return x.new_empty((rows, width)), x.new_empty((y_rows, width)), f_rstd, rstd


@torch.library.custom_op("flagdit::gated_residual_norm_backward", mutates_args=())
def _backward(
    dx_out: Tensor,
    dy: Tensor | None,
    x_out: Tensor | None,
    f: Tensor,
    gate: Tensor,
    f_weight: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    f_rstd: Tensor,
    rstd: Tensor,
    chunks: Tensor,
    offsets: Tensor,
    shifted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return run_backward(dx_out, dy, x_out, f, gate, f_weight, weight, scale, f_rstd, rstd, chunks, offsets, shifted)


@_backward.register_fake
def _(dx_out, dy, x_out, f, gate, f_weight, weight, scale, f_rstd, rstd, chunks, offsets, shifted):
    normed = dy is not None
    sums = 1 + normed + (normed and shifted)
    dx = f.new_empty((f.shape[0] if normed else 0, f.shape[1]))
    return dx, f.new_empty(f.shape), f.new_empty((offsets.shape[0] - 1, sums, f.shape[1]), dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    _, f, gate, f_weight, normed, weight, shift, scale, chunks, offsets, _ = inputs
    x_out, _, f_rstd, rstd = output
    ctx.normed = normed
    ctx.save_for_backward(
        x_out if normed else None, f, gate, f_weight, weight, shift, scale, chunks, offsets, f_rstd, rstd
    )


def _gradients(ctx, dx_out: Tensor, dy: Tensor, _df_rstd: Tensor, _drstd: Tensor) -> tuple[Tensor | None, ...]:
    x_out, f, gate, f_weight, weight, shift, scale, chunks, offsets, f_rstd, rstd = ctx.saved_tensors
    dx, df, sums_SKD = _backward(
        dx_out, dy if ctx.normed else None, x_out, f, gate, f_weight, weight, scale,
        f_rstd, rstd, chunks, offsets, shift is not None,
    )  # fmt: skip
    sum_SD = sums_SKD[:, 0]
    dgate = (sum_SD if f_weight is None else sum_SD * f_weight.float()).to(gate.dtype)
    df_weight = None if f_weight is None else (sum_SD * gate.float()).sum(0).to(f_weight.dtype)
    dweight = dshift = dscale = None
    if ctx.normed:
        dweight, dscale = split_factor(sums_SKD[:, 1], weight, scale)
        dshift = None if shift is None else sums_SKD[:, 2].to(shift.dtype)
    return dx if ctx.normed else dx_out, df, dgate, df_weight, None, dweight, dshift, dscale, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)


def _opened(gate_SD: Tensor, tanh: bool) -> Tensor:
    """The gate's factor; a tanh is kept in full precision."""
    return gate_SD.to(torch.promote_types(gate_SD.dtype, torch.float32)).tanh() if tanh else gate_SD


def gated_residual_norm(
    x_TD: Tensor,
    f_TD: Tensor,
    gate_SD: Tensor,
    weight_D: Tensor | None,
    shift_SD: Tensor | None,
    scale_SD: Tensor | None,
    segments: Segments,
    eps: float,
    *,
    f_weight_D: Tensor | None = None,
    tanh: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The residual stream after a branch, and its norm for the next branch.

    Args:
        x_TD, f_TD: residual stream and the branch's output; one dtype: fp32, bf16 or fp16; rows at any stride.
        gate_SD: one row per sample.
        weight_D, shift_SD, scale_SD: of the norm, as in `rms_norm_modulate`; None: 1, 0 and 0.
        segments: the samples of the rows.
        eps: added to the mean squares.
        f_weight_D: norm the branch with this weight before the gate (sandwich); None: take it as it is.
        tanh: gate with tanh(gate).
        backend: see `dispatch.use_triton`.

    Returns:
        x' and y, (T, D) in the dtype of x.

    Raises:
        ValueError: Triton is asked for and cannot serve.
    """
    gate_SD = _opened(gate_SD, tanh)
    if not use_triton("gated_residual_norm", backend, x_TD.device.type, x_TD.dtype, x_TD.shape[1]):
        x_TD = reference(x_TD, f_TD, gate_SD, f_weight_D, segments, eps)
        return x_TD, norm.reference(x_TD, weight_D, shift_SD, scale_SD, segments, eps)
    tables = segments.chunks_C3, segments.offsets_S
    return _forward(x_TD, f_TD, gate_SD, f_weight_D, True, weight_D, shift_SD, scale_SD, *tables, eps)[:2]


def gated_residual(
    x_TD: Tensor,
    f_TD: Tensor,
    gate_SD: Tensor,
    segments: Segments,
    eps: float,
    *,
    f_weight_D: Tensor | None = None,
    tanh: bool = False,
    backend: str = "auto",
) -> Tensor:
    """x' alone, where no norm follows; arguments and errors as for `gated_residual_norm`."""
    gate_SD = _opened(gate_SD, tanh)
    if not use_triton("gated_residual", backend, x_TD.device.type, x_TD.dtype, x_TD.shape[1]):
        return reference(x_TD, f_TD, gate_SD, f_weight_D, segments, eps)
    tables = segments.chunks_C3, segments.offsets_S
    return _forward(x_TD, f_TD, gate_SD, f_weight_D, False, None, None, None, *tables, eps)[0]
