"""The contract of an attention backend, and what holds for all of them.

Shape legend
    T, U  query tokens and key tokens of the pack
    H, K  query heads, key/value heads (K divides H)
    D     channels of a head
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from flagdit.model.attention_backends.pairs import Pairs, put, take


class AttentionBackend(Protocol):
    """One way to compute attention.

    Queries of a sample without keys get 0, a log-sum-exp of −inf and no gradient.
    """

    name: str

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int, *, lse: bool = False) -> str | None:
        """Why this backend cannot serve such tensors, as a clause; None: it can. `lse`: `forward` and `backward` are
        needed too."""

    def __call__(self, q_THD: Tensor, k_UKD: Tensor, v_UKD: Tensor, pairs: Pairs) -> Tensor:
        """softmax(q·kᵀ/√D)·v inside each sample: (T, H, D), differentiable."""

    def forward(self, q_THD: Tensor, k_UKD: Tensor, v_UKD: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """The same without a graph, and lse_TH, the log-sum-exp of q·kᵀ/√D over the keys.

        Returns:
            out_THD in the dtype of q, and lse_TH in fp32 (fp64 for fp64).
        """

    def backward(
        self,
        grad_THD: Tensor,
        q_THD: Tensor,
        k_UKD: Tensor,
        v_UKD: Tensor,
        out_THD: Tensor,
        lse_TH: Tensor,
        pairs: Pairs,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) that these keys contribute.

        `out_THD` and `lse_TH` are those of the whole softmax, which may span more keys than are given here: the
        probabilities are exp(q·kᵀ/√D − lse). So a ring calls it once per chunk of keys and adds up dq (arXiv
        2310.01889).
        """


class LiveBackend(ABC):
    """Base of the backends: leaves samples without queries or without keys out before a kernel sees them.

    Kernels disagree on such samples (flash-attn 2 reports +inf where −inf is meant), and a context-parallel rank has
    them all the time: it holds parts of samples.
    """

    name: str

    def __call__(self, q_THD: Tensor, k_UKD: Tensor, v_UKD: Tensor, pairs: Pairs) -> Tensor:
        if pairs.all_live:
            return self._attend(q_THD, k_UKD, v_UKD, pairs)
        live = pairs.live
        # An exact zero that hangs on all three: whoever was left out has a gradient of zeros, not none.
        out_THD = torch.zeros_like(q_THD) + (q_THD[:0].sum() + k_UKD[:0].sum() + v_UKD[:0].sum())
        if not live.queries:
            return out_THD
        k_NKD, v_NKD = take(k_UKD, live.keys), take(v_UKD, live.keys)
        part_NHD = self._attend(take(q_THD, live.queries), k_NKD, v_NKD, live.pairs)
        return out_THD + put(part_NHD, live.queries, len(q_THD))

    @torch.no_grad()
    def forward(self, q_THD: Tensor, k_UKD: Tensor, v_UKD: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
        if pairs.all_live:
            return self._forward(q_THD, k_UKD, v_UKD, pairs)
        live = pairs.live
        if not live.queries:
            return torch.zeros_like(q_THD), q_THD.new_full(q_THD.shape[:2], -torch.inf, dtype=lse_dtype(q_THD))
        k_NKD, v_NKD = take(k_UKD, live.keys), take(v_UKD, live.keys)
        out_NHD, lse_NH = self._forward(take(q_THD, live.queries), k_NKD, v_NKD, live.pairs)
        return put(out_NHD, live.queries, len(q_THD)), put(lse_NH, live.queries, len(q_THD), -torch.inf)

    @torch.no_grad()
    def backward(
        self,
        grad_THD: Tensor,
        q_THD: Tensor,
        k_UKD: Tensor,
        v_UKD: Tensor,
        out_THD: Tensor,
        lse_TH: Tensor,
        pairs: Pairs,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if pairs.all_live:
            return self._backward(grad_THD, q_THD, k_UKD, v_UKD, out_THD, lse_TH, pairs)
        live = pairs.live
        if not live.queries:
            return torch.zeros_like(q_THD), torch.zeros_like(k_UKD), torch.zeros_like(v_UKD)
        grad_NHD, q_NHD, out_NHD, lse_NH = (take(x, live.queries) for x in (grad_THD, q_THD, out_THD, lse_TH))
        k_NKD, v_NKD = take(k_UKD, live.keys), take(v_UKD, live.keys)
        dq_NHD, dk_NKD, dv_NKD = self._backward(grad_NHD, q_NHD, k_NKD, v_NKD, out_NHD, lse_NH, live.pairs)
        dk_UKD, dv_UKD = (put(x, live.keys, len(k_UKD)) for x in (dk_NKD, dv_NKD))
        return put(dq_NHD, live.queries, len(q_THD)), dk_UKD, dv_UKD

    @abstractmethod
    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int, *, lse: bool = False) -> str | None:
        """As AttentionBackend.refusal."""

    @abstractmethod
    def nondeterminism(self, device: torch.device, *, gqa: bool) -> str | None:
        """Why the backward pass on this device cannot give the same bits twice, as a clause; None: it can, once torch
        is asked for deterministic algorithms. `gqa`: there are fewer key than query heads."""

    @abstractmethod
    def _attend(self, q_THD: Tensor, k_UKD: Tensor, v_UKD: Tensor, pairs: Pairs) -> Tensor: ...

    @abstractmethod
    def _forward(self, q_THD: Tensor, k_UKD: Tensor, v_UKD: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _backward(
        self,
        grad_THD: Tensor,
        q_THD: Tensor,
        k_UKD: Tensor,
        v_UKD: Tensor,
        out_THD: Tensor,
        lse_TH: Tensor,
        pairs: Pairs,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def lse_dtype(x: Tensor) -> torch.dtype:
    """Of log-sum-exps: fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)
