"""Counter-based random numbers for flow matching: every number is a function of (seed, epoch, sample, element).

Philox4x32-10 (Salmon et al., SC 2011) maps a 128-bit counter under a 64-bit key to four 32-bit words, with no state in
between. So any rank can draw exactly the elements that it holds, and every device draws the same.

    key      seed, low and high word
    counter  (element // 4, sample id low word, sample id bits 32–47 | stream << 16, epoch)

Word `element % 4` belongs to the element. Normals are Box–Muller pairs in fp32: words 0 and 1 give elements 0 and 1,
words 2 and 3 give elements 2 and 3. Words and normals are the same bits on every device (see `exact.py`).

Shape legend
    S  samples
    E  elements of all samples, one sample after the other
    B  counter blocks of four elements
    C  spans: pieces of samples, one for each program of a kernel
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flagdit.kernels import language
from flagdit.kernels.dispatch import use_triton
from flagdit.kernels.exact import box_muller, box_muller_tile
from flagdit.kernels.language import jit, launch, tl

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

NORMAL_STREAM = 0
BLOCK = 1024


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10.

    Args:
        counter: four int64 tensors of one shape (or broadcastable), each holding 32-bit words.
        seed: the 64-bit key.

    Returns:
        Four int64 tensors of random 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & MASK, seed >> 32 & MASK
    for _ in range(ROUNDS):
        # int64 products wrap modulo 2^64, which keeps all 64 bits; the mask undoes the sign of the shift.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = (p1 >> 32) & MASK ^ c1 ^ k0, p1 & MASK
        c2, c3 = (p0 >> 32) & MASK ^ c3 ^ k1, p0 & MASK
        k0, k1 = k0 + KEY_STEPS[0] & MASK, k1 + KEY_STEPS[1] & MASK
    return c0, c1, c2, c3


def _counter(
    block_B: Tensor, sample_id_B: Tensor, epoch_B: Tensor, stream: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return block_B, sample_id_B & MASK, (sample_id_B >> 32) & 0xFFFF | stream << 16, epoch_B & MASK


def _normal_reference(
    seed: int, epoch_S: Tensor, sample_ids_S: Tensor, lengths_S: Sequence[int], starts_S: Sequence[int], device
) -> Tensor:
    firsts_S = [start // 4 for start in starts_S]
    blocks_S = [-(-(start + n) // 4) - first for start, n, first in zip(starts_S, lengths_S, firsts_S, strict=True)]
    counts_S = torch.tensor(blocks_S, dtype=torch.int64, device=device)
    ids_B, epoch_B = (torch.repeat_interleave(value_S.to(device), counts_S) for value_S in (sample_ids_S, epoch_S))
    shift_S = torch.tensor(firsts_S, dtype=torch.int64, device=device) - counts_S.cumsum(0) + counts_S
    block_B = torch.arange(len(ids_B), device=device) + torch.repeat_interleave(shift_S, counts_S)
    words = torch.stack(philox(_counter(block_B, ids_B, epoch_B, NORMAL_STREAM), seed))
    z_B4 = torch.stack(box_muller(words[0::2], words[1::2]), dim=1).flatten(0, 1).T
    if all(n % 4 == 0 for n in (*lengths_S, *starts_S)):
        return z_B4.reshape(-1)
    parts = z_B4.reshape(-1).split([4 * n for n in blocks_S])
    places = zip(parts, starts_S, lengths_S, strict=True)
    return torch.cat([part[start % 4 : start % 4 + n] for part, start, n in places])


def uniform(seed: int, epoch: int | Tensor, sample_ids_S: Tensor, stream: int) -> Tensor:
    """One uniform number in (0, 1) per sample.

    Args:
        seed: of the run.
        epoch: pass over the data, one for all samples or (S,) int64.
        sample_ids_S: (S,) int64, below 2^48.
        stream: 1 to 65535; streams are independent of one another and of the noise.

    Returns:
        (S,) fp64 with 52 random bits, on the ids' device.
    """
    assert NORMAL_STREAM < stream < 1 << 16
    counter = _counter(torch.zeros_like(sample_ids_S), sample_ids_S, torch.as_tensor(epoch), stream)
    first, second, _, _ = philox(counter, seed)
    return ((first << 20 | second >> 12).double() + 0.5) * 2.0**-52


def spans(
    seed: int, epoch: int | Tensor, sample_ids_S: Tensor, lengths_S: Sequence[int], starts_S: Sequence[int]
) -> tuple[Tensor, int]:
    """What every program of a kernel does, (C, 8) int64, and the unit in which its first four columns count.

    Columns: first element of the program's block, first and last+1 element of its part, place of an element in the
    output less the element; sample id, place of the sample in the pack, seed, epoch. A block starts at a multiple of
    four elements, so that it draws whole counter blocks.
    """
    lengths, starts = torch.tensor(list(lengths_S)).long(), torch.tensor(list(starts_S)).long()
    ends, outputs = starts + lengths, lengths.cumsum(0) - lengths
    unit = next(u for u in (16, 8, 4, 1) if not ((lengths % u).any() or (starts % u).any()))
    aligned = starts // max(4, unit) * max(4, unit)
    counts = torch.where(lengths > 0, (ends - aligned + BLOCK - 1) // BLOCK, 0)
    sample_C = torch.repeat_interleave(torch.arange(len(lengths)), counts)
    within_C = torch.arange(len(sample_C)) - (counts.cumsum(0) - counts)[sample_C]
    block_C = aligned[sample_C] + within_C * BLOCK
    first_C = torch.maximum(block_C, starts[sample_C])
    end_C = torch.minimum(block_C + BLOCK, ends[sample_C])
    signed_seed = (seed & (1 << 64) - 1) - (1 << 64 if seed >> 63 & 1 else 0)
    rows = [
        *(column // unit for column in (block_C, first_C, end_C, (outputs - starts)[sample_C])),
        sample_ids_S.cpu().long()[sample_C], sample_C, torch.full_like(sample_C, signed_seed),
        torch.as_tensor(epoch).expand(len(lengths))[sample_C],
    ]  # fmt: skip
    return torch.stack(rows, dim=1), unit


@jit
def _span(table, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """A program's elements, their places in the output, and which of them are its own."""
    row = table + tl.program_id(0).to(tl.int64) * 8
    elements = tl.load(row) * UNIT + tl.arange(0, BLOCK)
    mask = (elements >= tl.load(row + 1) * UNIT) & (elements < tl.load(row + 2) * UNIT)
    return row, elements + tl.load(row + 3) * UNIT, mask


@jit
def _normals(row, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """The normal numbers of a program's block."""
    group = ((tl.load(row) * UNIT) // 4).to(tl.uint32) + tl.arange(0, BLOCK // 4).to(tl.uint32)
    sample = tl.load(row + 4)
    low = group * 0 + (sample & 0xFFFFFFFF).to(tl.uint32)
    high = group * 0 + ((sample >> 32) & 0xFFFF).to(tl.uint32)
    epoch = group * 0 + (tl.load(row + 7) & 0xFFFFFFFF).to(tl.uint32)
    word0, word1, word2, word3 = tl.philox(tl.load(row + 6), group, low, high, epoch)
    z0, z1 = box_muller_tile(word0, word1)
    z2, z3 = box_muller_tile(word2, word3)
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (BLOCK,))


@jit
def _normal_kernel(table, z, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    row, places, mask = _span(table, UNIT, BLOCK)
    tl.store(z + places, _normals(row, UNIT, BLOCK), mask=mask)


@jit
def _flow_noise_kernel(table, data, t, mixed, target, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    row, places, mask = _span(table, UNIT, BLOCK)
    noise = _normals(row, UNIT, BLOCK)
    clean = tl.load(data + places, mask=mask, other=0.0).to(tl.float32)
    time = tl.load(t + tl.load(row + 5))
    tl.store(mixed + places, time * clean + (1.0 - time) * noise, mask=mask)
    tl.store(target + places, clean - noise, mask=mask)


@jit
def _flow_noise_backward_kernel(table, dmixed, dtarget, t, ddata, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    row, places, mask = _span(table, UNIT, BLOCK)
    time = tl.load(t + tl.load(row + 5))
    grad = time * tl.load(dmixed + places, mask=mask, other=0.0) + tl.load(dtarget + places, mask=mask, other=0.0)
    tl.store(ddata + places, grad.to(ddata.dtype.element_ty), mask=mask)


# Fused multiply-adds round once where torch rounds twice; without them the bits agree.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def run_normal(table: Tensor, unit: int, total: int) -> Tensor:
    """Allocates and launches."""
    z = language.empty((total,), torch.float32, table.device)
    launch(_normal_kernel, len(table), {"table": table, "z": z, "UNIT": unit, "BLOCK": BLOCK}, **OPTIONS)
    return z


@torch.library.custom_op("flagdit::normal", mutates_args=())
def _normal(table: Tensor, unit: int, total: int) -> Tensor:
    return run_normal(table, unit, total)


@_normal.register_fake
def _(table, unit, total):
    return table.new_empty((total,), dtype=torch.float32)


def run_forward(data: Tensor, t: Tensor, table: Tensor, unit: int) -> tuple[Tensor, Tensor]:
    """Allocates and launches: x_t and target, fp32."""
    mixed, target = (language.empty(data.shape, torch.float32, data.device) for _ in range(2))
    args = {"table": table, "data": data.contiguous(), "t": t.float(), "mixed": mixed, "target": target}
    launch(_flow_noise_kernel, len(table), {**args, "UNIT": unit, "BLOCK": BLOCK}, **OPTIONS)
    return mixed, target


def run_backward(dmixed: Tensor, dtarget: Tensor, data: Tensor, t: Tensor, table: Tensor, unit: int) -> Tensor:
    """Allocates and launches: the gradient of the data."""
    ddata = language.empty(data.shape, data.dtype, data.device)
    grads = {"dmixed": dmixed.contiguous(), "dtarget": dtarget.contiguous()}
    args = {"table": table, **grads, "t": t.float(), "ddata": ddata, "UNIT": unit, "BLOCK": BLOCK}
    launch(_flow_noise_backward_kernel, len(table), args, **OPTIONS)
    return ddata


@torch.library.custom_op("flagdit::flow_noise", mutates_args=())
def _forward(data: Tensor, t: Tensor, table: Tensor, unit: int) -> tuple[Tensor, Tensor]:
    return run_forward(data, t, table, unit)


@_forward.register_fake
def _(data, t, table, unit):
    return data.new_empty(data.shape, dtype=torch.float32), data.new_empty(data.shape, dtype=torch.float32)


@torch.library.custom_op("flagdit::flow_noise_backward", mutates_args=())
def _backward(dmixed: Tensor, dtarget: Tensor, data: Tensor, t: Tensor, table: Tensor, unit: int) -> Tensor:
    return run_backward(dmixed, dtarget, data, t, table, unit)


@_backward.register_fake
def _(dmixed, dtarget, data, t, table, unit):
    return data.new_empty(data.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.unit = inputs[3]


def _gradients(ctx, dmixed: Tensor, dtarget: Tensor) -> tuple[Tensor | None, ...]:
    return _backward(dmixed, dtarget, *ctx.saved_tensors, ctx.unit), None, None, None


_forward.register_autograd(_gradients, setup_context=_save)


def normal(
    seed: int,
    epoch: int | Tensor,
    sample_ids_S: Tensor,
    lengths_S: Sequence[int],
    device: torch.device | str,
    starts_S: Sequence[int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Standard normal noise of several samples, or of parts of them, one after the other.

    Args:
        seed: of the run, 64 bits.
        epoch: pass over the data, one for all samples or (S,) int64.
        sample_ids_S: (S,) int64, below 2^48.
        lengths_S: elements of each sample, below 2^34.
        device: where the noise is made.
        starts_S: first element of each sample, for a rank that holds a part of it; None: 0.
        backend: see `dispatch.use_triton`.

    Returns:
        (E,) fp32, the same bits on every device and backend.

    Raises:
        ValueError: Triton is asked for and cannot serve.
    """
    starts_S = [0] * len(lengths_S) if starts_S is None else starts_S
    if not use_triton("normal", backend, torch.device(device).type, torch.float32):
        epoch_S = torch.as_tensor(epoch).expand(len(sample_ids_S))
        return _normal_reference(seed, epoch_S, sample_ids_S, lengths_S, starts_S, device)
    table, unit = spans(seed, epoch, sample_ids_S, lengths_S, starts_S)
    return _normal(table.to(device, non_blocking=True), unit, sum(lengths_S))


def flow_noise(
    data_E: Tensor,
    t_S: Tensor,
    seed: int,
    epoch: int | Tensor,
    sample_ids_S: Tensor,
    lengths_S: Sequence[int],
    starts_S: Sequence[int] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Noised data and the velocity that leads to it, in one pass: x_t = t·x1 + (1−t)·x0 and x1 − x0, x0 = `normal`.

    Args:
        data_E: clean data x1, (E,) or any shape with the elements in that order; fp32, bf16 or fp16.
        t_S: (S,) times in [0, 1]; they get no gradient.

    Returns:
        x_t and target in the shape of the data, fp32, the same bits on every device and backend.

    Raises:
        ValueError: Triton is asked for and cannot serve.
    """
    if not use_triton("flow_noise", backend, data_E.device.type, data_E.dtype):
        noise = normal(seed, epoch, sample_ids_S, lengths_S, data_E.device, starts_S, "reference").view(data_E.shape)
        counts_S = torch.tensor(list(lengths_S), device=data_E.device)
        t = torch.repeat_interleave(t_S.to(data_E.device, torch.float32), counts_S).view(data_E.shape)
        return t * data_E + (1 - t) * noise, data_E - noise
    starts_S = [0] * len(lengths_S) if starts_S is None else starts_S
    table, unit = spans(seed, epoch, sample_ids_S, lengths_S, starts_S)
    return _forward(data_E, t_S, table.to(data_E.device, non_blocking=True), unit)
