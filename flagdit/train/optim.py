"""The engine: who owns the weights, their gradients and their optimizer state.

The training loop speaks to an `Engine` only. `LocalEngine` keeps everything in one process with torch's AdamW; a
sharding engine offers the same methods with every rank holding its part.

Precision. With `train.precision=bf16` the model's parameters are bf16 and autocast is not used. The engine keeps fp32
master weights, accumulates gradients in fp32, updates the masters and copies them back, so that an update smaller than
a bf16 step is not lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from flagdit.config.schema import OptimizerConfig
from flagdit.errors import CheckpointError

Tensors = dict[str, Tensor]


class Engine(Protocol):
    """What the loop needs of whoever owns the weights.

    Attributes:
        model: what a forward pass runs through; its parameters are in the compute dtype.
        device: where batches must be.
    """

    model: nn.Module
    device: torch.device

    def total(self, value: Tensor) -> Tensor:
        """A scalar summed over all ranks that hold different samples."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of one micro-batch."""
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

    def weights(self) -> Tensors:
        """The live fp32 weights by name: what EMAs follow and checkpoints hold."""
        ...

    def using(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[nn.Module]:
        """The model with other weights, for as long as the context lasts; the training weights come back bit by bit."""
        ...

    def state(self) -> dict[str, Tensors]:
        """The tensors of a checkpoint by group: `model` (fp32 weights) and `optimizer` (moments and step count)."""
        ...

    def load(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Takes back what `state` gave."""
        ...


class LocalEngine:
    """All weights in one process, on one device, with torch's AdamW.

    Args:
        model: initialized in fp32; moved to `device` and to `dtype` here.
        cfg: AdamW and clipping.
        device: where to train.
        dtype: of the parameters: float32, or bfloat16 with fp32 master weights.
    """

    def __init__(self, model: nn.Module, cfg: OptimizerConfig, device: torch.device, dtype: torch.dtype):
        self.model = model.to(device)
        self.device, self.dtype = device, dtype
        self._clip = cfg.grad_clip
        self._live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._masters: dict[str, nn.Parameter] = self._live
        if dtype != torch.float32:
            self._masters = {name: nn.Parameter(p.detach().clone()) for name, p in self._live.items()}
            # Parameters only: buffers such as position tables keep their precision.
            for name, p in self._live.items():
                p.data = p.data.to(dtype)
                p.register_post_accumulate_grad_hook(_MoveGradient(self._masters[name]))
        self._optimizer = adamw(self._masters, cfg)
        self._norm: Tensor | None = None

    def total(self, value: Tensor) -> Tensor:
        return value

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def grad_norm(self) -> Tensor:
        for p in self._masters.values():
            if p.grad is None:
                # A modality that is absent from this batch. Its moments decay as with a gradient of zero, as they do in
                # engines that keep all gradients in one flat buffer.
                p.grad = torch.zeros_like(p)
        self._norm = torch.nn.utils.get_total_norm([p.grad for p in self._masters.values()])  # type: ignore[misc]
        return self._norm

    def step(self, lr: float) -> None:
        assert self._norm is not None, "grad_norm() comes before step()"
        if self._clip:
            torch.nn.utils.clip_grads_with_norm_(self._masters.values(), self._clip, self._norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self.discard()
        self._copy_back()

    def discard(self) -> None:
        self._optimizer.zero_grad()
        self._norm = None

    def weights(self) -> Tensors:
        return {name: p.detach() for name, p in self._masters.items()}

    @contextmanager
    def using(self, weights: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        kept = {name: p.data for name, p in self._live.items()}
        was_training = self.model.training
        try:
            for name, p in self._live.items():
                p.data = weights[name].to(self.dtype)
            yield self.model.eval()
        finally:
            for name, p in self._live.items():
                p.data = kept[name]
            self.model.train(was_training)

    def state(self) -> dict[str, Tensors]:
        return {"model": self.weights(), "optimizer": self._moments()}

    def load(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        copy_tensors(self.weights(), groups["model"], "model")
        moments = self._moments()
        copy_tensors(moments, groups["optimizer"], "optimizer")
        for p in self._masters.values():
            self._optimizer.state[p]["step"].copy_(moments["step"])
        self._copy_back()

    def _moments(self) -> Tensors:
        # Every parameter takes part in every step, so one count serves all.
        state = self._optimizer.state
        found = {f"{name}.{moment}": state[p][moment] for name, p in self._masters.items() for moment in MOMENTS}
        return {**found, "step": next(iter(state.values()))["step"].clone()}

    @torch.no_grad()
    def _copy_back(self) -> None:
        if self._masters is not self._live:
            torch._foreach_copy_(list(self._live.values()), list(self._masters.values()))


MOMENTS = ("exp_avg", "exp_avg_sq")


def adamw(parameters: Mapping[str, nn.Parameter], cfg: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with decay on matrices only and its state allocated at once.

    Vectors (norm weights, biases, gates, learned tokens) are not decayed: pulling them to zero switches parts of the
    model off. The state is allocated here and not at the first step, so that too little memory shows at the start and a
    checkpoint has the same tensors at any step.
    """
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters.values())
    beta1, beta2 = cfg.betas
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(beta1, beta2), eps=cfg.eps, fused=fused, foreach=not fused)
    for p in parameters.values():
        count = torch.zeros((), device=p.device if fused else "cpu")
        optimizer.state[p] = {"step": count, **{moment: torch.zeros_like(p) for moment in MOMENTS}}
    return optimizer


def copy_tensors(into: Mapping[str, Tensor], saved: Mapping[str, Tensor], group: str) -> None:
    """Fills tensors in place from a checkpoint's group of the same names and shapes.

    Raises:
        CheckpointError: names or shapes differ; nothing has been written then.
    """
    missing, extra = sorted(into.keys() - saved.keys()), sorted(saved.keys() - into.keys())
    shapes = [name for name in into.keys() & saved.keys() if into[name].shape != saved[name].shape]
    if missing or extra or shapes:
        faults = [("missing", missing), ("not of this model", extra), ("of another shape", sorted(shapes))]
        told = "; ".join(f"{len(names)} {fault} ({', '.join(names[:3])})" for fault, names in faults if names)
        raise CheckpointError(
            f"the checkpoint's {group} tensors do not fit this recipe: {told}",
            fix="Use the recipe that the run was started with.",
        )
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(saved[name])


class _MoveGradient:
    """Adds a parameter's fresh gradient to its fp32 master's and frees it, while backward still runs."""

    def __init__(self, master: nn.Parameter):
        self.master = master

    def __call__(self, parameter: Tensor) -> None:
        grad = parameter.grad
        assert grad is not None
        if self.master.grad is None:
            self.master.grad = grad.float()
        else:
            self.master.grad.add_(grad)
        parameter.grad = None
