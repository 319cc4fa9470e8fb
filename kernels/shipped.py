"""Every kernel in every configuration that the named model sizes launch: what the ahead-of-time gate compiles and what
the traffic count adds up. The operations run on the meta device, and their launches are recorded.

Shape legend: T tokens, S samples, D channels of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flagdit.kernels import (
    flow_noise,
    gated_residual_norm,
    layer_norm_rope,
    qk_norm_rope,
    rms_norm_modulate,
    rope,
    swiglu,
)
from flagdit.kernels.language import Launch, record_launches
from flagdit.kernels.segments import Segments

EPS = 1e-5
SAMPLES = 4


@dataclass(frozen=True)
class Shape:
    """What of a model size the kernels see; `block` is flag or next."""

    block: str
    dim: int
    num_heads: int
    num_kv_heads: int
    ffn_dim: int


# The published sizes of model/sizes.py (3b has the shape of 5b); a test compares them.
SHAPES: dict[str, Shape] = {
    "600m": Shape("flag", 1536, 32, 32, 4096),
    "5b": Shape("flag", 3072, 32, 32, 8192),
    "7b": Shape("flag", 4096, 32, 32, 11008),
    "next_2b": Shape("next", 2304, 32, 32, 6144),
    "next_2b_gqa": Shape("next", 2304, 32, 8, 6144),
}


@dataclass(frozen=True)
class Pass:
    """One direction of one operation in one configuration.

    Attributes:
        operation: as the documentation calls it.
        direction: forward or backward.
        launches: its kernels, in order.
    """

    operation: str
    direction: str
    launches: tuple[Launch, ...]


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _recorded(operation: str, direction: str, run: Callable[[], object]) -> Pass:
    with record_launches() as launches:
        run()
    return Pass(operation, direction, tuple(launches))


def modulated_norms(shape: Shape, tokens: int, dtype: torch.dtype) -> Iterator[Pass]:
    """The norm that opens a branch and the gated additions that close it, as the block of this shape calls them."""
    segments = Segments.build([tokens // SAMPLES] * SAMPLES, "cpu")
    chunks, offsets = segments.chunks_C3, segments.offsets_S
    flag = shape.block == "flag"
    vectors = meta(SAMPLES, (6 if flag else 4) * shape.dim, dtype=dtype)
    shift = vectors[:, : shape.dim] if flag else None
    scale = vectors[:, shape.dim : 2 * shape.dim]
    gate = scale if flag else meta(SAMPLES, shape.dim, dtype=torch.float32)
    weight = meta(shape.dim, dtype=dtype)
    f_weight = None if flag else weight
    x = meta(tokens, shape.dim, dtype=dtype)
    rstd = meta(tokens, dtype=torch.float32)
    # The passes differ in their arguments and results; only their launches matter here.
    norm: Any = rms_norm_modulate
    gated: Any = gated_residual_norm
    tensors: tuple[Any, ...]
    forward = partial(norm.run_forward, x, weight, shift, scale, chunks, EPS)
    yield _recorded("rms_norm_modulate", "forward", forward)
    for name, residual in (("rms_norm_modulate", None), ("rms_norm_modulate_residual", x)):
        backward = partial(norm.run_backward, x, residual, x, weight, scale, rstd, chunks, offsets, flag)
        yield _recorded(name, "backward", backward)
    forward = partial(gated.run_forward, x, x, gate, f_weight, True, weight, shift, scale, chunks, EPS)
    yield _recorded("gated_residual_norm", "forward", forward)
    tensors = (x, gate, f_weight, weight, scale, rstd, rstd, chunks, offsets, flag)
    yield _recorded("gated_residual_norm", "backward", partial(gated.run_backward, x, x, x, *tensors))
    forward = partial(gated.run_forward, x, x, gate, f_weight, False, None, None, None, chunks, EPS)
    yield _recorded("gated_residual", "forward", forward)
    tensors = (x, gate, f_weight, None, None, rstd, rstd, chunks, offsets, False)
    yield _recorded("gated_residual", "backward", partial(gated.run_backward, x, None, None, *tensors))


def rotations(shape: Shape, tokens: int, dtype: torch.dtype, computed: bool = False, split: int = 1) -> Iterator[Pass]:
    """Queries and keys: normed head by head, normed all heads together, and rotated alone.

    Args:
        computed: angles from positions; else from a table.
        split: tensor-parallel ranks that share the heads. Several reduce the statistics of a norm over all heads, which
            is no kernel then.
    """
    head_dim = shape.dim // shape.num_heads
    q, k = (meta(tokens, heads // split, head_dim, dtype=dtype) for heads in (shape.num_heads, shape.num_kv_heads))
    weight = meta(head_dim, dtype=dtype)
    table = meta(tokens, head_dim // 2, dtype=torch.float32)
    position = meta(tokens, 3, dtype=torch.int64)[:, 1:]
    frequency = meta(head_dim // 2, dtype=torch.float32)
    angles: Any = (None, None, position, frequency) if computed else (table, table, None, None)
    # The passes differ in their arguments and results; only their launches matter here.
    normed: Any = qk_norm_rope
    plain: Any = rope
    together: Any = layer_norm_rope
    forward = partial(normed.run_forward, q, k, weight, weight, *angles, EPS)
    yield _recorded("qk_norm_rope", "forward", forward)
    backward = partial(normed.run_backward, q, k, q, k, weight, weight, *angles, EPS)
    yield _recorded("qk_norm_rope", "backward", backward)
    for x in (q,) if shape.num_heads == shape.num_kv_heads else (k,):
        yield _recorded("rope", "forward", partial(plain.run, x, x, *angles, 1))
        if split > 1:
            continue
        row = x.view(tokens, -1)
        wide, both = meta(row.shape[1], dtype=dtype), meta(tokens, 2, dtype=torch.float32)
        forward = partial(together.run_forward, row, wide, wide, *angles, head_dim, EPS)
        yield _recorded("layer_norm_rope", "forward", forward)
        backward = partial(together.run_backward, row, row, wide, *angles, both, head_dim)
        yield _recorded("layer_norm_rope", "backward", backward)


def activations(shape: Shape, tokens: int, dtype: torch.dtype, split: int = 1) -> Iterator[Pass]:
    """The hidden layer of the feed-forward: two projections, or the halves of one, on one of `split` ranks."""
    hidden = shape.ffn_dim // split
    a, packed = meta(tokens, hidden, dtype=dtype), meta(tokens, 2 * hidden, dtype=dtype)
    for name, (left, right) in (("swiglu", (a, a)), ("swiglu of halves", packed.chunk(2, dim=1))):
        yield _recorded(name, "forward", partial(swiglu.run_forward, left, right))
        yield _recorded(name, "backward", partial(swiglu.run_backward, a, left, right))


def noises(tokens: int, patch_dim: int, dtype: torch.dtype) -> Iterator[Pass]:
    """Noise of a pack's patches, and the noised patches with their target."""
    lengths = [tokens // SAMPLES * patch_dim] * SAMPLES
    table, unit = flow_noise.spans(0, 0, torch.arange(SAMPLES), lengths, [0] * SAMPLES)
    data, t = meta(tokens * patch_dim, dtype=dtype), meta(SAMPLES, dtype=torch.float32)
    grad = meta(tokens * patch_dim, dtype=torch.float32)
    yield _recorded("normal", "forward", partial(flow_noise.run_normal, table.to("meta"), unit, len(data)))
    yield _recorded("flow_noise", "forward", partial(flow_noise.run_forward, data, t, table.to("meta"), unit))
    backward = partial(flow_noise.run_backward, grad, grad, data, t, table.to("meta"), unit)
    yield _recorded("flow_noise", "backward", backward)


def all_passes(tokens: int = 131072) -> Iterator[tuple[str, Pass]]:
    """Every pass that ships, with a name for its configuration: all sizes in bf16, the largest in fp32 too, and what a
    rank of eight runs of it under tensor parallelism."""
    for name, shape in SHAPES.items():
        for dtype in (torch.bfloat16, torch.float32) if name == "7b" else (torch.bfloat16,):
            label = f"{name} {'bf16' if dtype == torch.bfloat16 else 'fp32'}"
            yield from ((label, one) for one in modulated_norms(shape, tokens, dtype))
            yield from ((label, one) for one in rotations(shape, tokens, dtype))
            yield from ((label, one) for one in activations(shape, tokens, dtype))
    yield from (("7b/8 bf16", one) for one in rotations(SHAPES["7b"], tokens, torch.bfloat16, split=8))
    yield from (("7b/8 bf16", one) for one in activations(SHAPES["7b"], tokens, torch.bfloat16, split=8))
    yield from (("7b bf16 computed", one) for one in rotations(SHAPES["7b"], tokens, torch.bfloat16, computed=True))
    for dtype in (torch.float32, torch.bfloat16):
        label = f"patches {'bf16' if dtype == torch.bfloat16 else 'fp32'}"
        yield from ((label, one) for one in noises(tokens, 16, dtype))
