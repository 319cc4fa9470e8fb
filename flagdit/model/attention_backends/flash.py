"""The flash attention kernels: torch's own, flash-attn 2, FlashAttention-3 and flash-attn 4.

Shape legend
    T, U  query tokens and key tokens of the pack
    H, K  query heads, key/value heads (K divides H)
    D     channels of a head

Packages are imported when a kernel first runs. What each needs and how it is called was read from its source at the
version that its class names; all take fewer key than query heads, and all return the log-sum-exp as (H, T) fp32.
"""

from __future__ import annotations

import importlib
import importlib.util
from abc import abstractmethod
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flagdit.model.attention_backends.packed import PackedBackend, Packing, Saved

HALF = (torch.bfloat16, torch.float16)
_aten = torch.ops.aten


def installed(module: str) -> bool:
    """Whether a module can be found, without importing it (its parent packages are)."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _release(package: str) -> tuple[int, ...]:
    """(major, minor) of an installed distribution; () where it cannot be told."""
    try:
        parts = version(package).split(".")[:2]
    except PackageNotFoundError:
        return ()
    return tuple(int(part) for part in parts if part.isdecimal())


class FlashBackend(PackedBackend):
    """Base of the four: their common needs.

    Attributes:
        module: to import; its absence refuses the backend.
        package: what to install.
    """

    module: str
    package: str

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int, *, lse: bool = False) -> str | None:
        if device.type != "cuda":
            return f"it runs on CUDA devices, not on {device.type}"
        if missing := self.missing():
            return missing
        if dtype not in HALF:
            return f"it computes in bf16 and fp16, not in {str(dtype).removeprefix('torch.')}"
        if head_dim % 8:
            return f"it needs heads of a multiple of 8 channels, not {head_dim}"
        return self.unsuited(torch.cuda.get_device_capability(device), head_dim)

    def missing(self) -> str | None:
        """What is not installed, as a clause."""
        return None if installed(self.module) else f"{self.package} is not installed (no module {self.module})"

    @abstractmethod
    def unsuited(self, capability: tuple[int, int], head_dim: int) -> str | None:
        """Why it cannot run on a GPU of this compute capability with such heads."""

    def nondeterminism(self, device: torch.device, *, gqa: bool) -> str | None:
        return None

    def load(self) -> ModuleType:
        return importlib.import_module(self.module)


def _old(capability: tuple[int, int]) -> str | None:
    if capability[0] >= 8:
        return None
    return f"it needs compute capability 8.0 (Ampere) or later, this GPU has {capability[0]}.{capability[1]}"


def _wide(head_dim: int, most: int) -> str | None:
    return f"it takes heads of up to {most} channels here, not {head_dim}" if head_dim > most else None


class Varlen(FlashBackend):
    """torch's own flash kernels, those of torch.nn.attention.varlen (read at torch 2.13).

    That module's `varlen_attn` calls the two aten operators below; they are called directly, because its arguments
    changed from one torch to the next and its backward takes no log-sum-exp from outside. A kernel that was activated
    with torch.nn.attention.activate_flash_attention_impl serves these operators too.
    """

    name = "varlen"

    def missing(self) -> str | None:
        return None if torch.backends.cuda.is_flash_attention_available() else "this torch was built without it"

    def unsuited(self, capability: tuple[int, int], head_dim: int) -> str | None:
        # The backward of wide heads needs more shared memory than consumer GPUs have.
        most = 192 if capability in ((8, 6), (8, 9)) or capability[0] == 12 else 256
        return _old(capability) or _wide(head_dim, most)

    def kernel_forward(self, q_THD: Tensor, k_UKD: Tensor, v_UKD: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        *lengths, scale = packing
        out, lse, *_ = _aten._flash_attention_forward(
            q_THD, k_UKD, v_UKD, *lengths, 0.0, False, False, scale=scale
        )  # dropout, causal, debug mask
        return out, lse

    def kernel_backward(
        self, grad_THD: Tensor, saved: Saved, packing: Packing, deterministic: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The operator asks torch itself whether to be deterministic. The generator's state is not read without dropout.
        *lengths, scale = packing
        rng_state = torch.zeros(2, dtype=torch.uint64, device=grad_THD.device)
        unused = torch.empty(0, device=grad_THD.device)
        return _aten._flash_attention_backward(grad_THD, *saved, *lengths, 0.0, False, rng_state, unused, scale=scale)


class Flash2(FlashBackend):
    """flash-attn 2 (read at 2.8.3; Ampere to Hopper and later, 2.7 or later for these arguments)."""

    name = "flash2"
    module = "flash_attn.flash_attn_interface"
    package = "flash-attn"

    def missing(self) -> str | None:
        if missing := super().missing():
            return missing
        found = _release(self.package)
        return f"it needs {self.package} 2.7 or later, not {found[0]}.{found[1]}" if (0,) < found < (2, 7) else None

    def unsuited(self, capability: tuple[int, int], head_dim: int) -> str | None:
        return _old(capability) or _wide(head_dim, 256)

    def kernel_forward(self, q_THD: Tensor, k_UKD: Tensor, v_UKD: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        *lengths, scale = packing
        forward = self.load()._flash_attn_varlen_forward
        out, lse, *_ = forward(q_THD, k_UKD, v_UKD, *lengths, 0.0, scale, False)  # dropout, scale, causal
        return out, lse

    def kernel_backward(
        self, grad_THD: Tensor, saved: Saved, packing: Packing, deterministic: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        *lengths, scale = packing
        grads = _empty(saved)
        self.load()._flash_attn_varlen_backward(
            grad_THD, *saved, *grads, *lengths, 0.0, scale, False, -1, -1, 0.0, None,
            deterministic,
        )  # dropout, scale, causal, window, softcap, ALiBi  # fmt: skip
        return grads


class Flash3(FlashBackend):
    """FlashAttention-3 (read at 3.0.0b1 and at main of 2025; Hopper).

    Its Python functions changed their arguments between those two; the operators beneath did not, and torch's own
    adapter (torch/nn/attention/_fa3.py) calls them alike.
    """

    name = "flash3"
    module = "flash_attn_interface"
    package = "flash-attn-3"

    def unsuited(self, capability: tuple[int, int], head_dim: int) -> str | None:
        if capability[0] != 9:
            return f"it needs compute capability 9.0 (Hopper), this GPU has {capability[0]}.{capability[1]}"
        return _wide(head_dim, 256)

    def nondeterminism(self, device: torch.device, *, gqa: bool) -> str | None:
        # mha_bwd of hopper/flash_api.cpp frees the semaphores of dk and dv before the kernel runs.
        return "its deterministic backward is unsafe with fewer key than query heads" if gqa else None

    def kernel_forward(self, q_THD: Tensor, k_UKD: Tensor, v_UKD: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self._ops().fwd(
            q_THD, k_UKD, v_UKD,
            None, None, None, None,  # k_new, v_new, qv, out
            packing.cu_seqlens_q, packing.cu_seqlens_k,
            None, None, None,  # cu_seqlens_k_new, seqused_q, seqused_k
            packing.max_seqlen_q, packing.max_seqlen_k,
            None, None, None, None, None, None,  # page_table, kv_batch_idx, leftpad_k, rotary cos, sin and lengths
            None, None, None,  # descale of q, k, v
            packing.scale,
            False, -1, -1, 0, 0.0, True,  # causal, window, attention_chunk, softcap, rotary_interleaved
            None, 1, None, 0,  # scheduler_metadata, num_splits, pack_gqa, sm_margin
        )  # fmt: skip
        return out, lse

    def kernel_backward(
        self, grad_THD: Tensor, saved: Saved, packing: Packing, deterministic: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = _empty(saved)
        self._ops().bwd(
            grad_THD, *saved, *grads,
            packing.cu_seqlens_q, packing.cu_seqlens_k,
            None, None,  # seqused_q, seqused_k
            packing.max_seqlen_q, packing.max_seqlen_k,
            packing.scale,
            False, -1, -1, 0.0,  # causal, window, softcap
            deterministic,
            0,  # sm_margin
        )  # fmt: skip
        return grads

    def _ops(self) -> Any:
        self.load()  # registers the operators
        return torch.ops.flash_attn_3


class Flash4(FlashBackend):
    """flash-attn 4, in CuTe DSL (read at 4.0.0b36; Hopper and later, its backward has no Ampere).

    Compiles a kernel for each head size and shape class on first use.
    """

    name = "flash4"
    module = "flash_attn.cute.interface"
    package = "flash-attn-4"

    def unsuited(self, capability: tuple[int, int], head_dim: int) -> str | None:
        if capability[0] < 9:
            return f"it needs compute capability 9.0 (Hopper) or later, this GPU has {capability[0]}.{capability[1]}"
        if capability[0] in (10, 11) and head_dim == 256:
            return None
        return _wide(head_dim, 256 if capability[0] == 9 else 128)

    def nondeterminism(self, device: torch.device, *, gqa: bool) -> str | None:
        major = torch.cuda.get_device_capability(device)[0]
        return f"it has no deterministic backward for compute capability {major}.x" if major == 12 else None

    def kernel_forward(self, q_THD: Tensor, k_UKD: Tensor, v_UKD: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self._call("_flash_attn_fwd")(
            q_THD, k_UKD, v_UKD, **_named(packing), causal=False, return_lse=True
        )
        return out, lse

    def kernel_backward(
        self, grad_THD: Tensor, saved: Saved, packing: Packing, deterministic: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        q_THD, k_UKD, v_UKD, out_THD, lse_HT = saved
        dq, dk, dv, *_ = self._call("_flash_attn_bwd")(
            q_THD, k_UKD, v_UKD, out_THD, grad_THD, lse_HT, **_named(packing), causal=False, deterministic=deterministic
        )
        return dq, dk, dv

    def _call(self, name: str) -> Callable[..., tuple[Tensor, ...]]:
        return getattr(self.load(), name)


def _named(packing: Packing) -> dict[str, Any]:
    fields = packing._asdict()
    return {"softmax_scale": fields.pop("scale"), **fields}


def _empty(saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    """Where a kernel writes the gradients of queries, keys and values."""
    q, k, v = saved[:3]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
