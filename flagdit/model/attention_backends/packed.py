"""Kernels that take packed tokens with cu_seqlens, as one torch operator.

Shape legend
    T, U  query tokens and key tokens of the pack
    H, K  query heads, key/value heads (K divides H)
    D     channels of a head
    S     samples

All kernels of flash.py are called through the operators below. So there is one thing that torch.compile,
FakeTensor, autograd and selective checkpointing must know, however a package registers its own functions.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from flagdit.model.attention_backends.base import LiveBackend
from flagdit.model.attention_backends.pairs import Pairs

KERNELS: dict[str, PackedBackend] = {}
"""By name, which is how the operators below know them."""


class Packing(NamedTuple):
    """Samples as kernels want them: (S+1,) int32 offsets, the longest sample, and the factor on q·kᵀ."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    scale: float


class Saved(NamedTuple):
    """What backward is given of forward."""

    q_THD: Tensor
    k_UKD: Tensor
    v_UKD: Tensor
    out_THD: Tensor
    lse_HT: Tensor


class PackedBackend(LiveBackend):
    """Base of kernels that take cu_seqlens: a subclass says what it needs and calls its package twice."""

    def __init__(self) -> None:
        KERNELS[self.name] = self

    @abstractmethod
    def kernel_forward(self, q_THD: Tensor, k_UKD: Tensor, v_UKD: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        """(out_THD, lse_HT in fp32). Each sample has at least one query and one key."""

    @abstractmethod
    def kernel_backward(
        self, grad_THD: Tensor, saved: Saved, packing: Packing, deterministic: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv)."""

    def _attend(self, q_THD: Tensor, k_UKD: Tensor, v_UKD: Tensor, pairs: Pairs) -> Tensor:
        return packed_attention(q_THD, k_UKD, v_UKD, *_lengths(pairs), self.name)[0]

    def _forward(self, q_THD: Tensor, k_UKD: Tensor, v_UKD: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
        out_THD, lse_HT = packed_attention(q_THD, k_UKD, v_UKD, *_lengths(pairs), self.name)
        return out_THD, lse_HT.T.contiguous()

    def _backward(
        self,
        grad_THD: Tensor,
        q_THD: Tensor,
        k_UKD: Tensor,
        v_UKD: Tensor,
        out_THD: Tensor,
        lse_TH: Tensor,
        pairs: Pairs,
    ) -> tuple[Tensor, Tensor, Tensor]:
        lse_HT = lse_TH.T.contiguous()
        return packed_attention_backward(grad_THD, q_THD, k_UKD, v_UKD, out_THD, lse_HT, *_lengths(pairs), self.name)


def _lengths(pairs: Pairs) -> tuple[Tensor, Tensor, int, int]:
    # For one query a sample and grouped heads, flash-attn 2 and torch's copy of it take a path of inference that lays
    # the log-sum-exp out in another way. The longest length is only an upper bound to them; 2 keeps them from it.
    return pairs.cu_seqlens_q, pairs.cu_seqlens_k, max(pairs.longest_q, 2), pairs.longest_k


def _packing(cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, q: Tensor) -> Packing:
    return Packing(cu_q, cu_k, max_q, max_k, 1 / math.sqrt(q.shape[2]))


def _dense(x: Tensor) -> Tensor:
    """Kernels read rows at any stride, but a row must be contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("flagdit::packed_attention", mutates_args=())
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, kernel: str
) -> tuple[Tensor, Tensor]:
    """(out_THD, lse_HT); differentiable in q, k and v through `out` alone."""
    packing = _packing(cu_q, cu_k, max_q, max_k, q)
    out, lse = KERNELS[kernel].kernel_forward(_dense(q), _dense(k), _dense(v), packing)
    return out.contiguous(), lse.contiguous()


@packed_attention.register_fake
def _(q, k, v, cu_q, cu_k, max_q, max_k, kernel):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("flagdit::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    packing = _packing(cu_q, cu_k, max_q, max_k, q)
    deterministic = torch.are_deterministic_algorithms_enabled()
    saved = Saved(_dense(q), _dense(k), _dense(v), _dense(out), lse)
    dq, dk, dv = KERNELS[kernel].kernel_backward(_dense(grad), saved, packing, deterministic)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@packed_attention_backward.register_fake
def _(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, kernel):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    q, k, v, cu_q, cu_k, ctx.max_q, ctx.max_k, ctx.kernel = inputs
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k)


def _gradients(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    return *packed_attention_backward(grad, *saved, ctx.max_q, ctx.max_k, ctx.kernel), *[None] * 5


packed_attention.register_autograd(_gradients, setup_context=_save)
