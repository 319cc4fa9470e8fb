"""megatron-core's tensor-parallel layers.

megatron-core places some buffers on `torch.cuda.current_device()`. Where there is no CUDA, the name `torch` inside four
of its modules is bound to a stand-in that answers with the CPU; torch itself is left alone, and with CUDA nothing is
done at all.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn


class _Cuda:
    """torch.cuda with the CPU as its current device."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def current_device(self) -> torch.device:
        return torch.device("cpu")


class _Torch(types.ModuleType):
    """torch, but for `cuda`."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _Cuda()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@dataclass(frozen=True)
class Layers:
    """megatron-core's split linears, returning plain tensors.

    Attributes:
        column: outputs are split. The gradient of its inputs stays a part: whoever calls it sums it, once for all
            linears that read the same inputs.
        column_gather: the same with its outputs gathered; its gradient is summed on the way back where `sequence` says
            that the ranks go on with different tokens.
        row: inputs are split; the results are summed, and under `sequence` every rank keeps its own tokens.
        enter: what every rank computed of its own tokens (without `sequence`: of all) → of all tokens, for layers that
            split their outputs; its gradient is summed on the way back.
        leave: sums over the ranks, of its own tokens for each under `sequence`.
    """

    column: Callable[[nn.Linear], nn.Module]
    column_gather: Callable[[nn.Linear], nn.Module]
    row: Callable[[nn.Linear], nn.Module]
    enter: Callable[[Tensor], Tensor]
    leave: Callable[[Tensor], Tensor]


def layers(group: Any, sequence: bool) -> Layers:
    """Makers of this rank's part of a linear, uninitialized, on the linear's device and in its dtype.

    Args:
        group: the tensor axis.
        sequence: sequence parallelism.
    """
    _prepare()
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, mappings

    class Column(ColumnParallelLinear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[0]

    if sequence:
        gather = mappings.all_gather_last_dim_from_tensor_parallel_region
        enter = mappings.gather_from_sequence_parallel_region
        leave = mappings.reduce_scatter_to_sequence_parallel_region
    else:
        gather = mappings.gather_from_tensor_model_parallel_region
        enter = mappings.copy_to_tensor_model_parallel_region
        leave = mappings.reduce_from_tensor_model_parallel_region

    class ColumnGather(Column):
        def forward(self, x: Tensor) -> Tensor:
            return gather(super().forward(x), group=group)

    class Row(RowParallelLinear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[0]

    def make(cls: type, linear: nn.Linear, sequence: bool, **options: Any) -> nn.Module:
        with linear.weight.device:
            return cls(
                linear.in_features,
                linear.out_features,
                config=_config(group.size(), sequence, linear.weight.dtype),
                init_method=None,
                bias=linear.bias is not None,
                tp_group=group,
                **options,
            )

    def row(linear: nn.Linear) -> nn.Module:
        assert linear.bias is None, "a bias would be added by every rank"
        return make(Row, linear, sequence, input_is_parallel=True, skip_bias_add=False)

    return Layers(
        column=lambda linear: make(Column, linear, False, disable_grad_reduce=True),
        column_gather=lambda linear: make(ColumnGather, linear, False, disable_grad_reduce=True),
        row=row,
        enter=partial(enter, group=group),
        leave=partial(leave, group=group),
    )


def _config(size: int, sequence: bool, dtype: torch.dtype) -> Any:
    from megatron.core import ModelParallelConfig

    return ModelParallelConfig(
        tensor_model_parallel_size=size,
        sequence_parallel=sequence,
        use_cpu_initialization=True,  # on the current default device, which may be meta
        perform_initialization=False,
        params_dtype=dtype,
        gradient_accumulation_fusion=False,
    )


@lru_cache(maxsize=1)
def _prepare() -> None:
    """Binds the stand-in where there is no CUDA."""
    from megatron.core import utils
    from megatron.core.tensor_parallel import layers, mappings
    from megatron.core.tensor_parallel import utils as tensor_utils

    if not torch.cuda.is_available():
        for area in (layers, mappings, tensor_utils, utils):
            area.torch = _Torch()
