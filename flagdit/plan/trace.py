"""Counts taken from the real model without computing anything: live memory under FakeTensors, FLOPs by torch's counter.

The formulas of `memory.py` and `time.py` are held against these. The model of one process is traced; what tensor and
context parallel ranks hold is measured by benchmarks/memory_scaling.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from flagdit.batch import PackedBatch, PackedText, Patches, Segment
from flagdit.config.schema import ModelConfig
from flagdit.model.flag_dit import FlagDiT
from flagdit.model.tokens import TokenSpec, pack

Shape = tuple[str, tuple[int, int, int, int]]
"""Modality and latent size (channels, frames, rows, columns) of a sample."""


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of all storages that operations make inside the context.

    Args:
        known: tensors that were there before; views of them count nothing.

    Attributes:
        live, peak: now and at most, in bytes.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {x.untyped_storage()._cdata: 0 for x in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in _pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def traced_activations(cfg: ModelConfig, samples: list[Shape], text: list[int], dtype: torch.dtype) -> int:
    """Peak bytes of one forward and backward beside weights and their gradients.

    Args:
        cfg: the network.
        samples: of the pack.
        text: text tokens of each sample; empty without text.
        dtype: of parameters and activations.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _model(cfg, dtype)
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(_forget_gradient)
        batch, x, t_S = _inputs(model, samples, text, dtype)
        with LiveBytes(model.parameters()) as live:
            _loss(model(x, t_S, batch)).backward()
    return live.peak


def traced_flops(cfg: ModelConfig, samples: list[Shape], text: list[int]) -> int:
    """FLOPs of one forward and backward by torch's own counter, attention as plain products."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _model(cfg, torch.float32)
        batch, x, t_S = _inputs(model, samples, text, torch.float32)
        # The counter does not know torch's attention kernel for CPUs.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            _loss(model(x, t_S, batch)).backward()
    return counter.get_total_flops()


def _loss(velocity: Patches) -> Tensor:
    return torch.stack([v.float().square().mean() for v in velocity.values()]).sum()


def _forget_gradient(p: Tensor) -> None:
    """They are counted elsewhere."""
    p.grad = None


def _model(cfg: ModelConfig, dtype: torch.dtype) -> FlagDiT:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return FlagDiT(cfg)
    finally:
        torch.set_default_dtype(before)


def _inputs(
    model: FlagDiT, samples: list[Shape], text: list[int], dtype: torch.dtype
) -> tuple[PackedBatch, Patches, Tensor]:
    """A pack, its noised patches and its times; to be called under FakeTensorMode."""
    cfg = model.cfg
    segments = [Segment(i, modality, shape) for i, (modality, shape) in enumerate(samples)]
    features_MY = torch.empty(sum(text), cfg.text_dim, dtype=dtype)
    with unset_fake_temporarily():
        batch = pack(
            segments,
            None,
            TokenSpec.from_model(cfg),
            text=PackedText(torch.empty(sum(text), 0), tuple(text)) if cfg.text_dim else None,
            labels=[0] * len(samples) if cfg.num_classes else None,
        )
    batch = batch.to("cpu")
    if batch.text is not None:
        batch = replace(batch, text=replace(batch.text, features_MY=features_MY))
    x = {
        modality: torch.empty(len(index), model.patch_dims[modality], dtype=dtype)
        for modality, index in batch.layout.patch_index.items()
    }
    return batch, x, torch.rand(len(samples))
