"""All weights in one process, on one device.

Precision. With `train.precision=bf16` the model's parameters are bf16 and autocast is not used. The engine keeps fp32
master weights, accumulates gradients in fp32, updates the masters and copies them back, so that an update smaller than
a bf16 step is not lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flagdit.batch import PackedBatch
from flagdit.config.schema import OptimizerConfig
from flagdit.parallel.engine import MOMENTS, Tensors, adamw, allocate_moments
from flagdit.parallel.mesh import ParallelContext
from flagdit.parallel.shards import Shards, whole_shards


class LocalEngine:
    """All weights in one process, on one device, with torch's AdamW.

    Args:
        model: initialized in fp32; moved to `device` and to `dtype` here.
        cfg: AdamW and clipping.
        device: where to train.
        dtype: of the parameters: float32, or bfloat16 with fp32 master weights.
    """

    def __init__(self, model: nn.Module, cfg: OptimizerConfig, device: torch.device, dtype: torch.dtype):
        self.mesh = ParallelContext(device=device)
        self.model = model.to(device)
        self.dtype = dtype
        self.num_parameters = sum(p.numel() for p in model.parameters())
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
        allocate_moments(self._optimizer, self._masters.values())
        self._norm: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.mesh.device

    def share(self, batch: PackedBatch) -> PackedBatch:
        return batch

    def total(self, value: Tensor) -> Tensor:
        return value

    def total_samples(self, value: Tensor) -> Tensor:
        return value

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def grad_norm(self) -> Tensor:
        for p in self._masters.values():
            if p.grad is None:
                # A modality that is absent from this batch. Its moments decay as with a gradient of zero, as they do in
                # engines that keep all gradients in one flat buffer.
                p.grad = torch.zeros_like(p)
        self._norm = torch.nn.utils.get_total_norm(list(self.gradients().values()))
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

    def gradients(self) -> Tensors:
        return {name: p.grad for name, p in self._masters.items() if p.grad is not None}

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

    def whole(self, model: nn.Module) -> nn.Module:
        return model

    def shards(self, parts: Mapping[str, Tensor]) -> Shards:
        return whole_shards(parts)

    def state(self) -> dict[str, Shards]:
        return {"model": self.shards(self.weights()), "optimizer": self.shards(self._moments())}

    def restored(self) -> None:
        for state in self._optimizer.state.values():
            state["step"].copy_(self._count)
        self._copy_back()

    def _moments(self) -> Tensors:
        state = self._optimizer.state
        found = {f"{name}.{moment}": state[p][moment] for name, p in self._masters.items() for moment in MOMENTS}
        return {**found, "step": self._count}

    @property
    def _count(self) -> Tensor:
        # Every parameter takes part in every step, so one count serves all.
        return next(iter(self._optimizer.state.values()))["step"]

    @torch.no_grad()
    def _copy_back(self) -> None:
        if self._masters is not self._live:
            torch._foreach_copy_(list(self._live.values()), list(self._masters.values()))


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
