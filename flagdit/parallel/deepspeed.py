"""DeepSpeed's engine, configured for a mesh."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import nn

from flagdit.config.schema import ParallelConfig

BUCKET = 50_000_000
"""Elements that one collective reduces or gathers: large enough for full bandwidth, small beside the model."""


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer, parallel: ParallelConfig, bf16: bool) -> Any:
    """DeepSpeed's engine around a model, with ZeRO over the data and context axes of megatron-core's groups.

    Gradients accumulate and travel in fp32. Accumulation boundaries, norms and clipping are the caller's.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        # A shared-memory collective that would be compiled at the first use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    bucket = min(BUCKET, sum(p.numel() for p in model.parameters()))
    bucket += bucket % 2  # DeepSpeed aligns what it gathers to two elements
    zero: dict[str, Any] = {
        "stage": parallel.zero,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if parallel.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    elif parallel.zero < 3:
        zero["compute_grad_norm"] = False  # `grad_norm` does
    if parallel.zero == 3:
        zero["stage3_prefetch_bucket_size"] = bucket
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # boundaries are set by hand
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if bf16:
        config["bf16"] = {"enabled": True, "check_grad_overflow": False}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"

    class Engine(DeepSpeedEngine):
        def _do_optimizer_sanity_check(self, basic_optimizer: Any) -> str:
            # bf16 weights with fp32 accumulation at stage 1 would get another optimizer class, whose buffers differ.
            return ZERO_OPTIMIZATION

    return Engine(
        args=None,
        model=model,
        optimizer=optimizer,
        mpu=_Mpu,
        dist_init_required=False,
        config=config,
        config_class=deepspeed.DeepSpeedConfig(config, _Mpu),
    )


def fetch_projected(model: nn.Module) -> None:
    """Tells ZeRO 3 which weights a module reads from its children without calling them (`projected`, see
    `tensor.Projection`), so that they are gathered before it runs."""
    from deepspeed.runtime.zero.partition_parameters import register_external_parameter

    for module in model.modules():
        for name in getattr(module, "projected", ()):
            register_external_parameter(module, getattr(module, name).weight)


class _Mpu:
    """megatron-core's groups by the names that DeepSpeed asks for. Its data axis holds the context axis too."""

    @staticmethod
    def _state() -> Any:
        from megatron.core import parallel_state

        return parallel_state

    @classmethod
    def get_model_parallel_group(cls) -> Any:
        return cls._state().get_tensor_model_parallel_group()

    @classmethod
    def get_model_parallel_rank(cls) -> int:
        return cls._state().get_tensor_model_parallel_rank()

    @classmethod
    def get_model_parallel_world_size(cls) -> int:
        return cls._state().get_tensor_model_parallel_world_size()

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    @classmethod
    def get_data_parallel_group(cls) -> Any:
        return cls._state().get_data_parallel_group(with_context_parallel=True)

    @classmethod
    def get_data_parallel_rank(cls) -> int:
        return cls._state().get_data_parallel_rank(with_context_parallel=True)

    @classmethod
    def get_data_parallel_world_size(cls) -> int:
        return cls._state().get_data_parallel_world_size(with_context_parallel=True)

    @staticmethod
    def get_pipeline_model_parallel_rank() -> int:
        return 0

    @staticmethod
    def get_pipeline_model_parallel_world_size() -> int:
        return 1
