"""The door to Triton: its import, the launch of a kernel, and the memory that kernels write to.

Triton exists on Linux only, so kernels take `jit` and `tl` from here; without Triton the files can still be imported
and their torch references used. Every launch goes through `launch`, which lets tests and reports see its arguments:
the ahead-of-time gate compiles exactly what a launch would, and the traffic count reads the sizes of its tensors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


def jit(function: Callable) -> Any:
    """`triton.jit` where there is Triton."""
    return function if triton is None else triton.jit(function)


def lanes() -> int:
    """Threads of a warp of this machine's GPUs."""
    return 64 if torch.version.hip else 32


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU."""
    return triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Launch:
    """One call of a kernel.

    Attributes:
        kernel: the jitted function.
        grid: number of programs.
        args: all its arguments by name, compile-time constants included; None for absent tensors.
        options: num_warps, num_stages and other options of the compiler, for warps of 32 threads.
    """

    kernel: Any
    grid: int
    args: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__.strip("_")

    def options_for(self, lanes: int) -> dict[str, Any]:
        """The options where a warp has so many threads: the number of threads stays, and with it what each moves."""
        return {**self.options, "num_warps": max(1, self.options["num_warps"] * 32 // lanes)}


_recorded: list[Launch] | None = None


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Inside, kernels are listed and not run, so tensors may be on the meta device and outputs stay as allocated."""
    global _recorded
    assert _recorded is None, "recordings do not nest"
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None


def launch(kernel: Any, grid: int, args: dict[str, Any], *, num_warps: int = 4, **options: Any) -> None:
    """Runs a kernel on the device of its tensors; no programs, no launch.

    Args:
        kernel: a function made by `jit`.
        grid: number of programs, along one axis.
        args: its arguments by name.
        num_warps: of a program, for warps of 32 threads.
        options: others of the compiler: num_stages, …
    """
    if grid == 0:
        return
    # Triton's default for this is about to change; fused multiply-adds are what we want everywhere but in noise.
    wanted = Launch(kernel, grid, args, {"enable_fp_fusion": True, "num_warps": num_warps, **options})
    if _recorded is not None:
        _recorded.append(wanted)
        return
    device = next(a.device for a in args.values() if isinstance(a, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(grid,)](**args, **wanted.options_for(lanes()))


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a kernel's output. Tests replace it to put canaries around and NaN inside."""
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def rows_of(x: Tensor) -> Tensor:
    """x itself if its last axis is contiguous, as the kernels read it, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def optional_rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else rows_of(x)


def stride(x: Tensor | None) -> int:
    """Elements from one row to the next; 0 for absent tensors."""
    return 0 if x is None else x.stride(0)
