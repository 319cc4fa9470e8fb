"""Per-sample values applied to packed tokens.

Shape legend
    T, S, D  tokens and samples of the pack, channels
    B, L     samples of one run, tokens of each of them

Neighbouring samples of equal length form a run, whose tokens can be seen as (B, L, D) without a copy. Modulation works
run by run: looking a value up for every token would write and read T·D numbers more, and its gradient is slow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor


@dataclass(frozen=True)
class Run:
    """`count` neighbouring samples of `length` tokens each."""

    count: int
    length: int

    @property
    def num_tokens(self) -> int:
        return self.count * self.length


Runs = tuple[Run, ...]


@lru_cache(maxsize=1024)
def runs_of(seqlens: tuple[int, ...]) -> Runs:
    """The runs of a pack, in its order."""
    return tuple(Run(len(list(group)), length) for length, group in groupby(seqlens))


def per_segment(function: Callable[..., Tensor], runs: Runs, x_TD: Tensor, *values_SD: Tensor) -> Tensor:
    """Applies `function(x_BLD, *values_B1D)` to each run; the results are joined to (T, D)."""
    tokens = x_TD.split([run.num_tokens for run in runs])
    values = zip(*(v.split([run.count for run in runs]) for v in values_SD), strict=True)
    outputs = [
        function(x.view(run.count, run.length, -1), *(v[:, None] for v in own)).flatten(0, 1)
        for run, x, own in zip(runs, tokens, values, strict=True)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def modulate(x_TD: Tensor, shift_SD: Tensor | None, scale_SD: Tensor, runs: Runs) -> Tensor:
    """x·(1 + scale) + shift with every sample's own scale and shift (adaLN, arXiv 2212.09748); None: no shift."""
    if shift_SD is None:
        return per_segment(torch.mul, runs, x_TD, 1 + scale_SD)
    return per_segment(lambda x, scale, shift: torch.addcmul(shift, x, scale), runs, x_TD, 1 + scale_SD, shift_SD)


def gated_add(x_TD: Tensor, gate_SD: Tensor, y_TD: Tensor, runs: Runs) -> Tensor:
    """x + gate·y with every sample's own gate."""
    return x_TD + per_segment(torch.mul, runs, y_TD, gate_SD)


class _Rows(torch.autograd.Function):
    """x[index] for unique places. Its gradient copies rows, where that of `index_select` must add them one by one."""

    @staticmethod
    def forward(x_TD: Tensor, index_N: Tensor) -> Tensor:
        return x_TD.index_select(0, index_N)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x_TD, index_N = inputs
        ctx.num_rows = len(x_TD)
        ctx.save_for_backward(index_N)

    @staticmethod
    def backward(ctx, grad_ND: Tensor) -> tuple[Tensor, None]:
        (index_N,) = ctx.saved_tensors
        return grad_ND.new_zeros(ctx.num_rows, grad_ND.shape[1]).index_copy_(0, index_N, grad_ND), None


def take_rows(x_TD: Tensor, index_N: Tensor) -> Tensor:
    """Rows (N, D) of (T, D) at unique, ascending places; all of them: x itself, without a copy."""
    return x_TD if len(index_N) == len(x_TD) else _Rows.apply(x_TD, index_N)
