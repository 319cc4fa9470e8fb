"""The memory-bound operations of a block, each written by several hands.

    fused     the kernels
    torch     the model's plain path: torch's fused rms_norm, then modulation
    eager     the kernels' references, fp32 inside
    compiled  torch.compile of the plain path, or of the reference where the compiler can do more with it
    liger     Liger-Kernel, where it is installed and has the operation

Shape legend: T tokens, S samples, E width of the residual stream, F hidden width, H heads, D channels of a head.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flagdit.kernels import gated_residual_norm as gated
from flagdit.kernels import qk_norm_rope as qk
from flagdit.kernels import rms_norm_modulate as norm
from flagdit.kernels import swiglu
from flagdit.kernels.rope import Angles, frequencies
from flagdit.kernels.segments import Segments
from flagdit.model.ops import FusedOps, PlainOps
from flagdit.model.rope import Rotation
from flagdit.model.segments import Samples, modulate, runs_of

Function = Callable[..., Any]
EPS = 1e-5


@dataclass(frozen=True)
class Sizes:
    """Of the residual stream, the feed-forward and the heads."""

    tokens: int
    width: int
    hidden: int
    head_dim: int

    @property
    def large(self) -> int:
        """Elements of the residual stream."""
        return self.tokens * self.width


REAL, TINY = Sizes(131072, 4096, 11008, 128), Sizes(40, 48, 56, 16)


@dataclass(frozen=True)
class Operation:
    """One operation and its contestants.

    Attributes:
        name: as the documentation calls it.
        shapes: of its inputs.
        contestants: name → function of the inputs.
        reference: the same in torch, fp32 inside.
        passes: over the large tensor, forward and backward, that cannot be avoided.
        large: elements of that tensor.
    """

    name: str
    shapes: list[tuple[int, ...]]
    contestants: dict[str, Function]
    reference: Function
    passes: tuple[int, int]
    large: int


class Pack:
    """A pack of four uneven samples, and every operation on it."""

    def __init__(self, sizes: Sizes, device: torch.device, compiler: str):
        self.sizes, self.compiler = sizes, compiler
        n = sizes.tokens
        seqlens = (n // 2, n // 4, n // 8, n - n // 2 - n // 4 - n // 8)
        self.segments = Segments.build(seqlens, device)
        self.samples = Samples(runs_of(seqlens), self.segments.ids_T)
        position = torch.arange(n, device=device)[:, None]
        self.rotation = Rotation.from_angles(position * frequencies(sizes.head_dim, 1, 1e4, device))
        self.angles = Angles(self.rotation.cos_TR, self.rotation.sin_TR)
        self.plain, self.fused = PlainOps(self.samples, self.rotation), FusedOps(self.segments, self.angles, EPS)
        self.rows, self.vectors, self.vector = (n, sizes.width), (len(seqlens), sizes.width), (sizes.width,)

    def operations(self) -> list[Operation]:
        return [self.norm(), self.sum_and_norm(), self.sum(), self.turn(), self.swiglu()]

    def contest(self, fused: Function, plain: Function, eager: Function, compiled: Function) -> dict[str, Function]:
        return {
            "fused": fused,
            "torch": plain,
            "eager": eager,
            "compiled": torch.compile(compiled, backend=self.compiler),
        }

    def norm(self) -> Operation:
        segments, samples = self.segments, self.samples

        def fused(x, weight, shift, scale):
            return norm.rms_norm_modulate(x, weight, shift, scale, segments, EPS, "triton")

        def plain(x, weight, shift, scale):
            return modulate(F.rms_norm(x, weight.shape, weight, EPS), shift, scale, samples)

        def reference(x, weight, shift, scale):
            return norm.reference(x, weight, shift, scale, segments, EPS)

        contestants = self.contest(fused, plain, reference, plain)
        if liger_installed():
            from liger_kernel.ops.rms_norm import LigerRMSNormFunction

            def liger(x, weight, shift, scale):
                normed = LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)
                return modulate(normed, shift, scale, samples)

            contestants["liger"] = liger
        shapes = [self.rows, self.vector, self.vectors, self.vectors]
        return Operation("rms_norm_modulate", shapes, contestants, reference, (2, 3), self.sizes.large)

    def sum_and_norm(self) -> Operation:
        segments, samples = self.segments, self.samples

        def fused(x, f, gate, weight, shift, scale):
            return gated.gated_residual_norm(x, f, gate, weight, shift, scale, segments, EPS, backend="triton")

        def plain(x, f, gate, weight, shift, scale):
            x = self.plain.add(x, f, gate)
            return x, modulate(F.rms_norm(x, weight.shape, weight, EPS), shift, scale, samples)

        def reference(x, f, gate, weight, shift, scale):
            x = gated.reference(x, f, gate, None, segments, EPS)
            return x, norm.reference(x, weight, shift, scale, segments, EPS)

        contestants = self.contest(fused, plain, reference, plain)
        shapes = [self.rows, self.rows, self.vectors, self.vector, self.vectors, self.vectors]
        return Operation("gated_residual_norm", shapes, contestants, reference, (4, 6), self.sizes.large)

    def sum(self) -> Operation:
        def reference(x, f, gate):
            return gated.reference(x, f, gate, None, self.segments, EPS)

        contestants = self.contest(self.fused.add, self.plain.add, reference, self.plain.add)
        shapes = [self.rows, self.rows, self.vectors]
        return Operation("gated_residual", shapes, contestants, reference, (3, 3), self.sizes.large)

    def turn(self) -> Operation:
        head_dim, angles = self.sizes.head_dim, self.angles

        def heads(*rows: Tensor) -> tuple[Tensor, ...]:
            return tuple(x.unflatten(-1, (-1, head_dim)) for x in rows)

        def fused(q, k, q_weight, k_weight):
            return qk.qk_norm_rope(*heads(q, k), q_weight, k_weight, angles, EPS, "triton")

        def plain(q, k, *weights):
            normed = (F.rms_norm(x, w.shape, w, EPS) for x, w in zip(heads(q, k), weights, strict=True))
            return tuple(self.rotation(x) for x in normed)

        def reference(q, k, *weights):
            return tuple(qk.reference(x, w, angles, EPS) for x, w in zip(heads(q, k), weights, strict=True))

        # The plain rotation is a complex product, which the compiler leaves alone; the reference has none.
        contestants = self.contest(fused, plain, reference, reference)
        shapes = [self.rows, self.rows, (head_dim,), (head_dim,)]
        return Operation("qk_norm_rope", shapes, contestants, reference, (4, 6), self.sizes.large)

    def swiglu(self) -> Operation:
        contestants = self.contest(self.fused.swiglu, self.plain.swiglu, swiglu.reference, self.plain.swiglu)
        if liger_installed():
            from liger_kernel.ops.swiglu import LigerSiLUMulFunction

            contestants["liger"] = LigerSiLUMulFunction.apply
        hidden = (self.sizes.tokens, self.sizes.hidden)
        return Operation("swiglu", [hidden, hidden], contestants, swiglu.reference, (3, 5), hidden[0] * hidden[1])


def liger_installed() -> bool:
    """Its kernels run on GPUs only."""
    return importlib.util.find_spec("liger_kernel") is not None and torch.cuda.is_available()
