"""Which backend a run uses: decided once, when it is built."""

from __future__ import annotations

import torch
from torch import Tensor

from flagdit.config.schema import ModelConfig
from flagdit.errors import RecipeError
from flagdit.model.attention_backends.base import AttentionBackend, LiveBackend
from flagdit.model.attention_backends.flash import Flash2, Flash3, Flash4, Varlen
from flagdit.model.attention_backends.pairs import Pairs
from flagdit.model.attention_backends.sdpa import Sdpa
from flagdit.model.sizes import resolve

BACKENDS: tuple[LiveBackend, ...] = (Flash3(), Flash4(), Flash2(), Varlen(), Sdpa())
"""Fastest first where samples are short; `_order` says what changes for long ones."""

LONG = 8192
"""Tokens of a sample whose attention fills a GPU alone, so that one call for many samples gains nothing."""


def choose_backend(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    lse: bool = False,
    deterministic: bool = False,
    gqa: bool = False,
    longest: int = 0,
    first: str = "auto",
) -> LiveBackend:
    """The first backend that does not refuse.

    Args:
        lse: `forward` and `backward` are needed (ring attention).
        deterministic: the backward pass must give the same bits twice.
        gqa: there are fewer key than query heads.
        longest: tokens of the longest sample; 0: not known.
        first: name of the backend to try before all others; auto: none.
    """
    refusals = {}
    for backend in sorted(_order(device, longest), key=lambda backend: backend.name != first):
        reason = _reason(backend, device, dtype, head_dim, lse=lse, deterministic=deterministic, gqa=gqa)
        if reason is None:
            return backend
        refusals[backend.name] = reason
    raise AssertionError(f"no attention backend serves {device}, {dtype}, head size {head_dim}: {refusals}")


def resolve_backend(
    cfg: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    lse: bool = False,
    *,
    deterministic: bool = False,
    longest: int = 0,
) -> LiveBackend:
    """The backend that `model.attention` names, or for auto the first that can serve. The arguments are those of
    `choose_backend`.

    Raises:
        RecipeError: the named backend cannot serve.
    """
    shape = resolve(cfg)
    head_dim, gqa = shape.dim // shape.num_heads, shape.num_kv_heads not in (None, shape.num_heads)
    if cfg.attention == "auto":
        return choose_backend(device, dtype, head_dim, lse=lse, deterministic=deterministic, gqa=gqa, longest=longest)
    (backend,) = (backend for backend in BACKENDS if backend.name == cfg.attention)
    reason = backend.refusal(device, dtype, head_dim, lse=lse)
    if reason is not None:
        fit = choose_backend(device, dtype, head_dim, lse=lse, deterministic=deterministic, gqa=gqa, longest=longest)
        raise RecipeError(
            f"model.attention={cfg.attention} cannot serve this run: {reason}",
            fix=f"Use model.attention=auto, which takes {fit.name} here.",
        )
    reason = backend.nondeterminism(device, gqa=gqa) if deterministic else None
    if reason is not None:
        raise RecipeError(
            f"train.deterministic=true, but with model.attention={cfg.attention} {reason}",
            fix="Use model.attention=auto or sdpa, or set train.deterministic=false.",
        )
    return backend


def _reason(
    backend: LiveBackend,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    lse: bool,
    deterministic: bool,
    gqa: bool,
) -> str | None:
    reason = backend.refusal(device, dtype, head_dim, lse=lse)
    return backend.nondeterminism(device, gqa=gqa) if reason is None and deterministic else reason


def _order(device: torch.device, longest: int) -> list[LiveBackend]:
    """BACKENDS, the likely fastest first.

    For long samples on Hopper and later, torch's cuDNN kernels (through sdpa) are ahead of the kernels of
    flash-attn 2, which were written for Ampere and are also torch's own.
    """
    if device.type == "cuda" and longest >= LONG and torch.cuda.get_device_capability(device)[0] >= 9:
        return sorted(BACKENDS, key=lambda backend: backend.name in ("flash2", "varlen"))
    return list(BACKENDS)


class _Uncompiled:
    """A backend whose `__call__` stands outside of compiled graphs."""

    def __init__(self, backend: AttentionBackend):
        self.name, self._backend = backend.name, backend
        self.refusal, self.forward, self.backward = backend.refusal, backend.forward, backend.backward
        self._call = torch.compiler.disable(backend.__call__)

    def __call__(self, q_THD: Tensor, k_UKD: Tensor, v_UKD: Tensor, pairs: Pairs) -> Tensor:
        return self._call(q_THD, k_UKD, v_UKD, pairs)


def uncompiled(backend: AttentionBackend) -> AttentionBackend:
    """The backend as compiled blocks should call it.

    Sdpa walks over runs of samples in Python, so a graph that holds it is good for one layout of the pack only; outside
    of the graph, one graph serves all. The packed kernels are one operator to the compiler and stay inside.
    """
    return _Uncompiled(backend) if isinstance(backend, Sdpa) else backend
