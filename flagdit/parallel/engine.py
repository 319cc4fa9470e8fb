"""The engine: who owns the weights, their gradients and their optimizer state.

The training loop speaks to an `Engine` only. `local.LocalEngine` keeps everything in one process; `zero.ZeroEngine`
spreads it over a mesh.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from flagdit.batch import PackedBatch
from flagdit.config.schema import OptimizerConfig
from flagdit.parallel.mesh import ParallelContext
from flagdit.parallel.shards import Shards

Tensors = dict[str, Tensor]

MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine(Protocol):
    """What the loop needs of whoever owns the weights.

    Attributes:
        mesh: this rank's place among the others.
        model: what a training forward runs through, with the tokens that `share` left; its parameters are in the
            compute dtype.
        num_parameters: of the whole model, over all ranks.
    """

    mesh: ParallelContext
    model: nn.Module
    num_parameters: int

    @property
    def device(self) -> torch.device:
        """Where batches must be."""
        ...

    def share(self, batch: PackedBatch) -> PackedBatch:
        """This rank's tokens of a pack that all its token ranks were given whole, on the CPU."""
        ...

    def total(self, value: Tensor) -> Tensor:
        """A sum over all ranks that hold different tokens or samples."""
        ...

    def total_samples(self, value: Tensor) -> Tensor:
        """A sum over all ranks that hold different samples."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradients of one micro-batch; `last` says that no other follows in this step."""
        ...

    def grad_norm(self) -> Tensor:
        """Norm of all gradients of the step, over all ranks, before clipping. Called once, after the last backward."""
        ...

    def step(self, lr: float) -> None:
        """Clips, updates the weights and forgets the gradients."""
        ...

    def discard(self) -> None:
        """Forgets the gradients; weights and optimizer state stay as they are."""
        ...

    def gradients(self) -> Tensors:
        """This rank's part of the step's gradients, by parameter name; after the last backward."""
        ...

    def weights(self) -> Tensors:
        """This rank's part of the live fp32 weights, by parameter name: what averages follow."""
        ...

    def using(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[nn.Module]:
        """The model with other weights (parts as `weights` gives them), for as long as the context lasts; the training
        weights come back bit by bit."""
        ...

    def whole(self, model: nn.Module) -> nn.Module:
        """The model as a function of whole packs on every rank, for sampling."""
        ...

    def shards(self, parts: Mapping[str, Tensor]) -> Shards:
        """Where parts (as `weights` gives them) lie in whole tensors; also those of which this rank has none."""
        ...

    def state(self) -> dict[str, Shards]:
        """What a checkpoint holds of the engine, by group: `model` (fp32 weights) and `optimizer` (moments and step
        count). Views: they are written in place when a checkpoint is loaded, and `restored` follows."""
        ...

    def restored(self) -> None:
        """Computes with what has been written into the shards of `state`."""
        ...


def adamw(parameters: Mapping[str, nn.Parameter], cfg: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with decay on matrices only.

    Vectors (norm weights, biases, gates, learned tokens) are not decayed: pulling them to zero switches parts of the
    model off.
    """
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters.values())
    beta1, beta2 = cfg.betas
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(beta1, beta2), eps=cfg.eps, fused=fused, foreach=not fused)


def allocate_moments(optimizer: torch.optim.AdamW, parameters: Iterable[Tensor]) -> None:
    """Allocates AdamW's state at once and not at the first step, so that too little memory shows at the start and a
    checkpoint has the same tensors at any step."""
    for p in parameters:
        count = torch.zeros((), device=p.device if optimizer.defaults["fused"] else "cpu")
        optimizer.state[p] = {"step": count, **{moment: torch.zeros_like(p) for moment in MOMENTS}}
