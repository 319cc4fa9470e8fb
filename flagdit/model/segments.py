"""Per-sample values applied to packed tokens.

Shape legend
    T, S, D  tokens and samples of the pack, channels
    B, L     samples of one run, tokens of each of them

When all samples are equally long the tokens are seen as (S, L, D) and the values broadcast. Otherwise each token looks
its sample's value up, and the gradient of the values is one product with the (S, T) matrix of who belongs to whom:
adding token after token, as the gradient of `index_select` does, takes ten times as long.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Samples:
    """Which tokens belong to which sample.

    Attributes:
        runs: neighbouring samples of equal length.
        ids_T: (T,) sample of each token.
        uneven: not all samples are equally long.
    """

    runs: Runs
    ids_T: Tensor
    # An attribute, so that compiled blocks depend on one bit instead of on the number of runs.
    uneven: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "uneven", len(self.runs) > 1)


class _Scale(torch.autograd.Function):
    """x·scale[ids], keeping neither the looked-up scale nor its gradient per token."""

    @staticmethod
    def forward(x_TD: Tensor, scale_SD: Tensor, ids_T: Tensor) -> Tensor:
        return x_TD * scale_SD.index_select(0, ids_T)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        x_TD, scale_SD, ids_T = ctx.saved_tensors
        return grad_TD * scale_SD.index_select(0, ids_T), _sum_tokens(grad_TD * x_TD, len(scale_SD), ids_T), None


class _Shift(torch.autograd.Function):
    """x + shift[ids]."""

    @staticmethod
    def forward(x_TD: Tensor, shift_SD: Tensor, ids_T: Tensor) -> Tensor:
        return x_TD + shift_SD.index_select(0, ids_T)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, shift_SD, ids_T = inputs
        ctx.num_samples = len(shift_SD)
        ctx.save_for_backward(ids_T)

    @staticmethod
    def backward(ctx, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        (ids_T,) = ctx.saved_tensors
        return grad_TD, _sum_tokens(grad_TD, ctx.num_samples, ids_T), None


def _sum_tokens(x_TD: Tensor, num_samples: int, ids_T: Tensor) -> Tensor:
    """(T, D) → (S, D): the sum over each sample's tokens."""
    member_ST = torch.arange(num_samples, device=ids_T.device)[:, None] == ids_T
    return member_ST.to(x_TD.dtype) @ x_TD


def scale_tokens(x_TD: Tensor, scale_SD: Tensor, samples: Samples) -> Tensor:
    """x·scale with every sample's own scale."""
    if samples.uneven:
        return _Scale.apply(x_TD, scale_SD, samples.ids_T)
    x_SLD = x_TD.unflatten(0, (len(scale_SD), -1))
    return (x_SLD * scale_SD[:, None]).flatten(0, 1)


def modulate(x_TD: Tensor, shift_SD: Tensor | None, scale_SD: Tensor, samples: Samples) -> Tensor:
    """x·(1 + scale) + shift with every sample's own scale and shift (adaLN, arXiv 2212.09748); None: no shift."""
    if shift_SD is None:
        return scale_tokens(x_TD, 1 + scale_SD, samples)
    if samples.uneven:
        return _Shift.apply(scale_tokens(x_TD, 1 + scale_SD, samples), shift_SD, samples.ids_T)
    x_SLD = x_TD.unflatten(0, (len(scale_SD), -1))
    return torch.addcmul(shift_SD[:, None], x_SLD, 1 + scale_SD[:, None]).flatten(0, 1)


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
