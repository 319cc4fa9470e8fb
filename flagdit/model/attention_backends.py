"""Attention between the tokens of the same sample, behind one seam.

Shape legend
    T, U  query tokens and key tokens of the pack
    H, K  query heads, key/value heads (K divides H)
    D     channels of a head
    B, L  samples of one run, tokens of each of them

A backend is an object that says what it cannot do (`refusal`) and does the rest. To add one: a class here, a place in
BACKENDS (fastest first) and its name in the tests, which compare every backend with a loop over samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from flagdit.model.segments import runs_of


@dataclass
class Pairs:
    """Which queries see which keys: those of the same sample.

    Attributes:
        seqlens_q, seqlens_k: tokens of each sample, as Python ints.
        cu_seqlens_q, cu_seqlens_k: (S+1,) int32 offsets, on the device of the tokens.
    """

    seqlens_q: tuple[int, ...]
    seqlens_k: tuple[int, ...]
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor

    @cached_property
    def groups(self) -> list[Group]:
        """Runs of neighbouring samples with equally many queries; computed once for all layers."""
        runs = runs_of(self.seqlens_q)
        ends = list(accumulate(run.count for run in runs))
        device = self.cu_seqlens_k.device
        return [
            Group.build(run.length, self.seqlens_k[end - run.count : end], device)
            for run, end in zip(runs, ends, strict=True)
        ]


@dataclass(frozen=True)
class Group:
    """Samples that one call to SDPA serves.

    Attributes:
        len_q: queries of each sample.
        seqlens_k: keys of each sample.
        places: where each key goes in the padded (B·L) keys; None when all samples have equally many keys.
        mask_B11L: True where there is a key; None when all are.
    """

    len_q: int
    seqlens_k: tuple[int, ...]
    places: Tensor | None
    mask_B11L: Tensor | None

    @classmethod
    def build(cls, len_q: int, seqlens_k: tuple[int, ...], device: torch.device) -> Group:
        longest = max(seqlens_k)
        if min(seqlens_k) == longest:
            return cls(len_q, seqlens_k, None, None)
        mask_BL = torch.arange(longest) < torch.tensor(seqlens_k)[:, None]
        places = mask_BL.flatten().nonzero()[:, 0]
        return cls(len_q, seqlens_k, places.to(device), mask_BL[:, None, None].to(device))

    def batch_keys(self, x_UKD: Tensor) -> Tensor:
        """(U, K, D) of this group → (B, K, L, D), padded where samples differ."""
        count, longest = len(self.seqlens_k), max(self.seqlens_k)
        if self.places is not None:
            empty = x_UKD.new_zeros(count * longest, *x_UKD.shape[1:])
            x_UKD = empty.index_copy(0, self.places, x_UKD)
        return x_UKD.unflatten(0, (count, longest)).transpose(1, 2)


class AttentionBackend(Protocol):
    """One way to compute attention."""

    name: str

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why this backend cannot serve such tensors; None: it can."""

    def __call__(self, q_THD: Tensor, k_UKD: Tensor, v_UKD: Tensor, pairs: Pairs) -> Tensor:
        """softmax(q·kᵀ/√D)·v inside each sample: (T, H, D)."""


class Sdpa:
    """torch's scaled_dot_product_attention, one call per run of equally long samples: the reference, runs everywhere.

    Keys that differ in number inside a run (captions) are padded and masked; self-attention never is.
    """

    name = "sdpa"

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        return None if dtype.is_floating_point else f"{dtype} is not a floating-point type"

    def __call__(self, q_THD: Tensor, k_UKD: Tensor, v_UKD: Tensor, pairs: Pairs) -> Tensor:
        groups = pairs.groups
        queries = q_THD.split([g.len_q * len(g.seqlens_k) for g in groups])
        keys = k_UKD.split([sum(g.seqlens_k) for g in groups])
        values = v_UKD.split([sum(g.seqlens_k) for g in groups])
        outputs = []
        for group, q, k, v in zip(groups, queries, keys, values, strict=True):
            if not group.len_q:
                continue
            out_BHLD = F.scaled_dot_product_attention(
                q.unflatten(0, (-1, group.len_q)).transpose(1, 2),
                group.batch_keys(k),
                group.batch_keys(v),
                attn_mask=group.mask_B11L,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            outputs.append(out_BHLD.transpose(1, 2).flatten(0, 1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


BACKENDS: tuple[AttentionBackend, ...] = (Sdpa(),)


def choose_backend(device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionBackend:
    """The first of BACKENDS that does not refuse. Called once per forward, before any block runs."""
    refusals = {}
    for backend in BACKENDS:
        reason = backend.refusal(device, dtype, head_dim)
        if reason is None:
            return backend
        refusals[backend.name] = reason
    raise AssertionError(f"no attention backend serves {device}, {dtype}, head size {head_dim}: {refusals}")
