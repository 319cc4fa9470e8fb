"""Counts taken from the real model without computing anything: live memory under FakeTensors, FLOPs by torch's counter.

The formulas of `memory.py` and `time.py` are held against these; `flagdit plan --trace` does it for a recipe. One rank's
model is traced: tensor and context parallel ranks are not (benchmarks/memory_scaling.py measures those).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from flagdit.batch import PackedBatch, PackedText, Segment
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
    batch, spec_model = _batch(cfg, samples, text), cfg
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _model(spec_model, dtype)
        gradients = _Freed(model)
        batch = batch.to("cpu")
        text_MY = batch.text and PackedText(batch.text.features_MY.to(dtype), batch.text.seqlens)
        batch = PackedBatch(batch.segments, batch.layout, {}, text_MY, batch.labels_S)
        x = {m: torch.empty(len(i), model.stems[m].in_features, dtype=dtype) for m, i in _indices(batch)}
        t_S = torch.rand(len(samples))
        with LiveBytes(model.parameters()) as live:
            velocity = model(x, t_S, batch)
            loss = torch.stack([v.float().square().mean() for v in velocity.values()]).sum()
            del velocity
            loss.backward()
        del gradients
    return live.peak


class _Freed:
    """Drops each parameter's gradient as soon as it is there: they are counted elsewhere."""

    def __init__(self, model: torch.nn.Module):
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(self._drop)

    @staticmethod
    def _drop(p: Tensor) -> None:
        p.grad = None


def _model(cfg: ModelConfig, dtype: torch.dtype) -> FlagDiT:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return FlagDiT(cfg)
    finally:
        torch.set_default_dtype(before)


def _batch(cfg: ModelConfig, samples: list[Shape], text: list[int]) -> PackedBatch:
    segments = [Segment(i, modality, shape) for i, (modality, shape) in enumerate(samples)]
    packed = PackedText(torch.empty(sum(text), cfg.text_dim), tuple(text)) if cfg.text_dim else None
    labels = [0] * len(samples) if cfg.num_classes else None
    return pack(segments, None, TokenSpec.from_model(cfg), text=packed, labels=labels)


def _indices(batch: PackedBatch) -> list[tuple[str, Tensor]]:
    return list(batch.layout.patch_index.items())
