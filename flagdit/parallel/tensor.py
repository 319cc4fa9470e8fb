"""Tensor and sequence parallelism (arXiv 1909.08053, 2205.05198), applied to a model from outside by its plan.

Under sequence parallelism every tensor rank holds other tokens of the residual stream. Linears that split their outputs
gather the tokens first, linears that split their inputs scatter the sums back, and everything between works on the
rank's own tokens. A replicated parameter then sees a part of its gradient on every rank, as in data parallelism: all
these parts are summed over the tensor axis (`SumGradient`).

Shape legend
    T, t  tokens that the tensor ranks hold together, tokens of one rank
    E, O  inputs and outputs of a linear
    S     samples
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flagdit.parallel import megatron
from flagdit.parallel.adapters import split_adapter
from flagdit.parallel.mesh import Axis, ParallelContext

KINDS = ("column", "row", "column_gather", "heads", "qk_norm", "feeds_split")


@dataclass(frozen=True)
class Split:
    """How a parameter lies on the tensor axis.

    Attributes:
        dim: the dimension that is cut into equal parts; None: every rank holds the whole.
    """

    dim: int | None = None

    def part(self, whole: Tensor, axis: Axis) -> Tensor:
        """This rank's part of a whole parameter."""
        return whole if self.dim is None or axis.size == 1 else whole.chunk(axis.size, self.dim)[axis.rank]

    def whole_shape(self, part: torch.Size, axis: Axis) -> torch.Size:
        """The shape of the whole parameter."""
        return torch.Size(n * axis.size if i == self.dim else n for i, n in enumerate(part))


@dataclass(frozen=True)
class Layout:
    """How the parameters of a split model lie on the tensor axis.

    Attributes:
        splits: of every parameter, by name.
        partial: whole on every rank, while each rank sees a part of its gradient.
    """

    splits: Mapping[str, Split]
    partial: frozenset[str]


def split_model(model: nn.Module, plan: Mapping[str, str], mesh: ParallelContext) -> Layout:
    """Splits a model over the tensor axis in place. Its parameters have neither values nor hooks then: `materialize`.

    Args:
        model: on the meta device, whole.
        plan: name pattern → kind, see the table beside the model.
        mesh: says over how many ranks.
    """
    axis = mesh.tensor
    if axis.size == 1:
        return Layout({name: Split() for name, _ in model.named_parameters()}, frozenset())
    layers = megatron.layers(axis.group, mesh.sequence)
    linear = {"column": layers.column, "column_gather": layers.column_gather, "row": layers.row}
    splits: dict[str, Split] = {}
    partial: set[str] = set()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    projected = {f"{parent}.{name}" for parent, m in model.named_modules() for name in getattr(m, "projected", ())}
    for name, module in list(model.named_modules()):
        kind = _kind(name, plan)
        if kind in linear:
            assert isinstance(module, nn.Linear)
            split = linear[kind](module)
            _replace(model, name, split)
            splits |= {f"{name}.weight": Split(1 if kind == "row" else 0), f"{name}.bias": Split(0)}
            if hasattr(module, "lora_a"):
                split_adapter(split, module, kind, name in projected, layers)
                splits |= {f"{name}.lora_a.weight": Split(1)} if kind == "row" else {f"{name}.lora_b.weight": Split(0)}
                partial |= {f"{name}.lora_a.weight"} if kind == "column" and name not in projected else set()
        elif kind == "qk_norm" and getattr(module, "kind", None) == "layer":
            _replace(model, name, SplitLayerNorm(module, axis))
            splits |= {f"{name}.weight": Split(0), f"{name}.bias": Split(0)}
        elif kind in ("qk_norm", "feeds_split"):
            partial |= {f"{name}.{inner}" for inner, _ in module.named_parameters()}
        if hasattr(module, "projection"):
            module.projection = Projection(axis, mesh.sequence)
    for name, p in list(model.named_parameters()):
        if _kind(name, plan) == "heads":
            _replace(model, name, nn.Parameter(p.new_empty(p.shape[0] // axis.size)))
            splits[name] = Split(0)
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)
    found = {name: splits.get(name, Split()) for name, _ in model.named_parameters()}
    whole = {name for name, split in found.items() if split.dim is None}
    return Layout(found, frozenset(whole if mesh.sequence else whole & partial))


def materialize(
    model: nn.Module,
    layout: Layout,
    mesh: ParallelContext,
    value: Callable[[str, torch.Size], Tensor],
    dtype: torch.dtype,
) -> None:
    """Gives every parameter of a split model its value, one at a time, so that no rank ever holds the whole model.

    Args:
        value: name and shape of a whole parameter → its fp32 value.
        dtype: of the parameters.
    """
    for name, empty in list(model.named_parameters()):
        split = layout.splits[name]
        whole = value(name, split.whole_shape(empty.shape, mesh.tensor))
        part = split.part(whole, mesh.tensor).to(mesh.device, dtype, copy=True).contiguous()
        p = nn.Parameter(part, requires_grad=empty.requires_grad)
        # megatron-core's mark, read when gradients are counted over the tensor axis.
        p.tensor_model_parallel = split.dim is not None  # type: ignore[attr-defined]
        if name in layout.partial and p.requires_grad:
            p.register_hook(SumGradient(mesh.tensor))
        _replace(model, name, p)


def _kind(name: str, plan: Mapping[str, str]) -> str | None:
    kind = next((kind for pattern, kind in plan.items() if fnmatch(name, pattern)), None)
    assert kind is None or kind in KINDS, f"{name}: unknown kind {kind}"
    return kind


def _replace(model: nn.Module, name: str, new: nn.Module | nn.Parameter) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


class SumGradient:
    """Hook of a parameter that is whole on every tensor rank while each sees a part of its gradient."""

    def __init__(self, axis: Axis):
        self.axis = axis

    def __call__(self, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=self.axis.group)
        return total


class Projection:
    """Applies column-split linears to the tokens that they share: gathered once, their gradient summed once.

    megatron-core's layer would gather, and reduce, for every linear anew.
    """

    def __init__(self, axis: Axis, sequence: bool):
        self.axis, self.sequence = axis, sequence

    def __call__(self, x_tE: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
        """(t, E) → (T, O) for each linear."""
        found = _Projection.apply(x_tE, self.axis, self.sequence, *(linear.weight for linear in linears))
        adapters = [getattr(linear, "adapter", None) for linear in linears]
        return tuple(y if adapter is None else y + adapter(x_tE) for y, adapter in zip(found, adapters, strict=True))


class _Projection(torch.autograd.Function):
    """Keeps the rank's own tokens for backward, not the gathered ones, so that activations shrink with the ranks."""

    @staticmethod
    def forward(ctx: Any, x_tE: Tensor, axis: Axis, sequence: bool, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_tE, *weights)
        ctx.axis, ctx.sequence = axis, sequence
        x_TE = _gather_tokens(x_tE, axis)[0] if sequence else x_tE
        return tuple(x_TE @ weight.T for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_tE, *weights = ctx.saved_tensors
        axis = ctx.axis
        x_TE, arriving = _gather_tokens(x_tE, axis, wait=False) if ctx.sequence else (x_tE, None)
        dx_TE = grads[0] @ weights[0]
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            dx_TE.addmm_(grad, weight)
        if ctx.sequence:
            dx_tE = torch.empty_like(x_tE)
            reducing = dist.reduce_scatter_tensor(dx_tE, dx_TE, group=axis.group, async_op=True)
            assert arriving is not None
            arriving.wait()
        else:
            dx_tE = dx_TE
            reducing = dist.all_reduce(dx_tE, group=axis.group, async_op=True)
        # Weights under adapters take none.
        wanted = ctx.needs_input_grad[3:]
        dweights = [grad.T @ x_TE if want else None for grad, want in zip(grads, wanted, strict=True)]
        reducing.wait()
        return dx_tE, None, None, *dweights


def _gather_tokens(x_tE: Tensor, axis: Axis, wait: bool = True) -> tuple[Tensor, Any]:
    x_TE = x_tE.new_empty(axis.size * len(x_tE), x_tE.shape[1])
    work = dist.all_gather_into_tensor(x_TE, x_tE.contiguous(), group=axis.group, async_op=not wait)
    return x_TE, work


class SplitLayerNorm(nn.Module):
    """LayerNorm over all heads together, whose channels lie on several ranks: (…, heads·D) → (…, heads, D).

    Statistics are those of the whole width, so results do not depend on the number of ranks.

    Args:
        norm: the whole norm, with `weight`, `bias`, `eps` and `head_dim`.
    """

    def __init__(self, norm: Any, axis: Axis):
        super().__init__()
        self.axis, self.eps, self.head_dim = axis, norm.eps, norm.head_dim
        width = norm.weight.shape[0] // axis.size
        self.weight = nn.Parameter(norm.weight.new_empty(width))
        self.bias = nn.Parameter(norm.bias.new_empty(width))

    def forward(self, x: Tensor) -> Tensor:
        y = _SplitLayerNorm.apply(x, self.weight, self.bias, self.eps, self.axis)
        return y.unflatten(-1, (-1, self.head_dim))


class _SplitLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, axis: Axis) -> Tensor:
        part = x.float()
        own = torch.stack([part.mean(-1), part.var(-1, unbiased=False)])
        every = own.new_empty(axis.size, *own.shape)
        dist.all_gather_into_tensor(every.flatten(0, 1), own, group=axis.group)
        means, variances = every.unbind(1)
        # Equal parts: the whole's variance is the mean of the variances and the variance of the means (Chan et al.).
        mean = means.mean(0)
        rstd = torch.rsqrt(variances.mean(0) + (means - mean).square().mean(0) + eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.axis = axis
        normed = (part - mean[..., None]) * rstd[..., None]
        return (normed * weight.float() + bias.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        normed = (x.float() - mean[..., None]) * rstd[..., None]
        dnormed = grad.float() * weight.float()
        sums = torch.stack([dnormed.mean(-1), (dnormed * normed).mean(-1)]) / ctx.axis.size
        dist.all_reduce(sums, group=ctx.axis.group)
        dx = (dnormed - sums[0, ..., None] - normed * sums[1, ..., None]) * rstd[..., None]
        rows = tuple(range(x.ndim - 1))
        dweight, dbias = (grad.float() * normed).sum(rows), grad.float().sum(rows)
        return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype), None, None
