"""ZeRO (arXiv 1910.02054) through DeepSpeed: optimizer states, gradients and weights spread over data × context ranks.

DeepSpeed owns the flat buffers, the reduction of gradients and the gathering of weights. This engine owns what must be
the same on every mesh: the global gradient norm, clipping, the decision whether a step counts, the averages, and the
way from a rank's slices to whole tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flagdit.batch import PackedBatch
from flagdit.config.schema import OptimizerConfig, ParallelConfig
from flagdit.parallel import deepspeed
from flagdit.parallel.context import WholeModel, share
from flagdit.parallel.engine import MOMENTS, Tensors, adamw, allocate_moments
from flagdit.parallel.mesh import ParallelContext
from flagdit.parallel.shards import Shard, Shards
from flagdit.parallel.tensor import Layout


@dataclass(frozen=True)
class Piece:
    """The slice of a parameter whose fp32 master this rank keeps.

    Attributes:
        start, stop: elements of this tensor rank's part of the parameter, flattened.
        group: the flat buffer that holds them.
        offset: where in it.
    """

    start: int
    stop: int
    group: int
    offset: int

    def of(self, flats: list[Tensor]) -> Tensor:
        """The slice, as a view."""
        return flats[self.group].detach().narrow(0, self.offset, self.stop - self.start)


class ZeroEngine:
    """Weights, gradients and optimizer state over a mesh, with torch's AdamW.

    Args:
        model: split over the tensor axis, in its compute dtype, on this rank's device. What takes no gradient stays as
            it is: no state, no part in checkpoints.
        layout: how its parameters lie on the tensor axis.
        mesh: this rank's place.
        patch_dims: modality → features of a patch.
        cfg: AdamW and clipping.
        parallel: stage and offloading.
        initial: name and shape of a whole parameter → its fp32 value, so that masters of bf16 weights start unrounded.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        mesh: ParallelContext,
        patch_dims: Mapping[str, int],
        cfg: OptimizerConfig,
        parallel: ParallelConfig,
        initial: Callable[[str, torch.Size], Tensor],
    ):
        self.mesh, self._layout, self._patch_dims, self._clip = mesh, layout, patch_dims, cfg.grad_clip
        named = dict(model.named_parameters())
        self.num_parameters = sum(layout.splits[n].whole_shape(p.shape, mesh.tensor).numel() for n, p in named.items())
        trained = {name: p for name, p in named.items() if p.requires_grad}
        self._shapes = {name: p.shape for name, p in trained.items()}
        self._module = model
        self._names_by_id = {id(p): name for name, p in trained.items()}
        bf16 = next(model.parameters()).dtype == torch.bfloat16
        self._deepspeed = deepspeed.initialize(model, adamw(trained, cfg), parallel, bf16)
        if parallel.zero == 3 and mesh.tensor.size > 1:
            deepspeed.fetch_projected(model)
        self.model: nn.Module = self._deepspeed
        self._zero: Any = self._deepspeed.optimizer
        self._stage, self._offload = parallel.zero, parallel.offload
        allocate_moments(self._zero.optimizer, self._masters)
        self._pieces = dict(self._find_pieces())
        self._norm: Tensor | None = None
        if bf16:
            for name, master in self.weights().items():
                master.copy_(self._own(name, initial(name, self._whole_shape(name))))

    @property
    def device(self) -> torch.device:
        return self.mesh.device

    def share(self, batch: PackedBatch) -> PackedBatch:
        return share(batch, self.mesh, self._patch_dims)

    def total(self, value: Tensor) -> Tensor:
        return _summed(value, self.mesh.distinct.group)

    def total_samples(self, value: Tensor) -> Tensor:
        return _summed(value, self.mesh.data.group)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._deepspeed.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over its ranks; the loss is already this pack's part of the mean over the global batch.
        self._deepspeed.backward(loss * self.mesh.shards.size, scale_wrt_gas=False)

    def grad_norm(self) -> Tensor:
        squares = torch.zeros((), device=self.device)
        for name, grad in self.gradients().items():
            # A whole parameter has the same gradient on every tensor rank: counted once.
            if self.mesh.tensor.rank == 0 or self._layout.splits[name].dim is not None:
                squares += torch.linalg.vector_norm(grad.float()).square().to(self.device)
        self._norm = _summed(squares, dist.group.WORLD).sqrt()
        return self._norm

    def step(self, lr: float) -> None:
        assert self._norm is not None, "grad_norm() comes before step()"
        if self._clip:
            # As torch.nn.utils.clip_grads_with_norm_.
            share = (self._clip / (self._norm + 1e-6)).clamp(max=1.0)
            for grad in self.gradients().values():
                grad.mul_(share.to(grad.device))
        for group in self._zero.optimizer.param_groups:
            group["lr"] = lr
        self._deepspeed.step()
        self._norm = None

    def discard(self) -> None:
        # What DeepSpeed does with a step that overflowed.
        zero = self._zero
        zero.zero_grad(set_to_none=True)
        if self._offload:
            zero.reset_cpu_buffers()
        elif self._stage == 3:
            zero.averaged_gradients = {}
        else:
            for i in zero.averaged_gradients:
                zero.averaged_gradients[i] = zero.all_grad_tensors[i] = None
        zero.micro_step_id = 0 if self._stage == 3 else -1
        self._norm = None

    def gradients(self) -> Tensors:
        zero = self._zero
        if self._offload:
            flats: list[Any] = [master.grad for master in self._masters]
            return {name: piece.of(flats) for name, piece in self._pieces.items()}
        found = {}
        owners = zero.fp16_groups if self._stage == 3 else zero.params_in_partition
        for group, params in enumerate(owners):
            grads = [g for g in zero.averaged_gradients[group] if not getattr(g, "_zero_padding", False)]
            for p, grad in zip(params, grads, strict=False):
                if piece := self._pieces.get(name := self._names_by_id[id(p)]):
                    found[name] = grad.flatten()[: piece.stop - piece.start]
        return found

    def weights(self) -> Tensors:
        return {name: piece.of(self._masters) for name, piece in self._pieces.items()}

    @contextmanager
    def using(self, weights: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        was_training = self._module.training
        try:
            self._show(weights)
            yield self._module.eval()
        finally:
            self._show(self.weights())
            self._module.train(was_training)

    def whole(self, model: nn.Module) -> nn.Module:
        return WholeModel(model, self.mesh, self._patch_dims)  # type: ignore[return-value]

    def shards(self, parts: Mapping[str, Tensor]) -> Shards:
        return {name: self._shard(name, parts.get(name)) for name in self._shapes}

    def state(self) -> dict[str, Shards]:
        optimizer: Shards = {}
        for moment in MOMENTS:
            found = self.shards(self._moments(moment))
            optimizer |= {f"{name}.{moment}": shard for name, shard in found.items()}
        return {"model": self.shards(self.weights()), "optimizer": {**optimizer, "step": Shard.whole(self._count)}}

    def restored(self) -> None:
        for state in self._zero.optimizer.state.values():
            state["step"].copy_(self._count)
        self._show(self.weights())

    # What follows knows DeepSpeed's buffers.

    @property
    def _masters(self) -> list[Tensor]:
        """Flat fp32 buffers."""
        zero = self._zero
        return zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups

    def _find_pieces(self) -> Iterator[tuple[str, Piece]]:
        zero, rank, names = self._zero, self.mesh.shards.rank, self._names_by_id
        if self._stage == 3:
            for group, params in enumerate(zero.fp16_groups):
                offset = 0
                for p in params:
                    size = p.partition_numel()
                    start, stop = rank * size, min((rank + 1) * size, p.ds_numel)
                    if start < stop:
                        yield names[id(p)], Piece(start, stop, group, offset)
                    offset += size
            return
        for group, params in enumerate(zero.bit16_groups):
            size, flat = zero.partition_size[group], zero.bit16_groups_flat[group]
            for p in params:
                at = p.data.storage_offset() - flat.storage_offset()
                first, end = max(at, rank * size), min(at + p.numel(), (rank + 1) * size)
                if first < end:
                    yield names[id(p)], Piece(first - at, end - at, group, first - rank * size)

    def _moments(self, moment: str) -> Tensors:
        flats = [self._zero.optimizer.state[master][moment] for master in self._masters]
        return {name: piece.of(flats) for name, piece in self._pieces.items()}

    @property
    def _count(self) -> Tensor:
        # Every parameter takes part in every step, so one count serves all.
        return self._zero.optimizer.state[self._masters[0]]["step"]

    @torch.no_grad()
    def _show(self, weights: Mapping[str, Tensor]) -> None:
        """Makes the model compute with these weights."""
        zero, rank = self._zero, self.mesh.shards.rank
        if self._stage == 3:
            zero._partition_all_parameters()
            for name, piece in self._pieces.items():
                partition = self._module.get_parameter(name).ds_tensor  # type: ignore[attr-defined]
                partition.narrow(0, 0, piece.stop - piece.start).copy_(weights[name])
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
            return
        from deepspeed.runtime.utils import all_gather_dp_groups

        own = [partitions[rank] for partitions in zero.parallel_partitioned_bit16_groups]
        for name, piece in self._pieces.items():
            piece.of(own).copy_(weights[name])
        all_gather_dp_groups(
            groups_flat=zero.bit16_groups_flat,
            partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
            dp_process_group=zero.real_dp_process_group,
            start_alignment_factor=zero.nccl_start_alignment_factor,
            allgather_bucket_size=zero.allgather_bucket_size,
        )

    # Slices and whole tensors.

    def _whole_shape(self, name: str) -> torch.Size:
        return self._layout.splits[name].whole_shape(self._shapes[name], self.mesh.tensor)

    def _own(self, name: str, whole: Tensor) -> Tensor:
        """This rank's slice of a whole tensor."""
        piece = self._pieces[name]
        return self._layout.splits[name].part(whole, self.mesh.tensor).flatten()[piece.start : piece.stop]

    def _shard(self, name: str, part: Tensor | None) -> Shard:
        shape, local = self._whole_shape(name), self._shapes[name]
        if part is None:
            return Shard(tuple(shape), torch.float32, ())
        split, rank = self._layout.splits[name].dim, self.mesh.tensor.rank
        origin = [rank * size if dim == split else 0 for dim, size in enumerate(local)]
        return Shard.slice(shape, part, self._pieces[name].start, local, origin)


def _summed(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is None:
        return value
    total = value.detach().clone()
    dist.all_reduce(total, group=group)
    return total
