"""Which implementation an operation runs: Triton on GPUs, the torch reference elsewhere, or the one that was asked for.

The choice is a function of device, dtype and width, and never of a measurement: all ranks choose alike.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from flagdit.kernels.language import interpreted, triton

BACKENDS = ("auto", "reference", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST_ROW = 16384

log = logging.getLogger("flagdit.kernels")
_told: set[str] = set()


def refusal(device_type: str, dtype: torch.dtype, width: int) -> str | None:
    """Why Triton cannot serve tensors of that device and dtype, with rows of that many elements; None: it can."""
    if triton is None:
        return "Triton is not installed"
    if device_type != "meta" and device_type != "cuda" and not (device_type == "cpu" and interpreted()):
        return f"the tensors are on {device_type}, and Triton needs a GPU"
    if dtype not in DTYPES:
        return f"there are no kernels for {str(dtype).removeprefix('torch.')}"
    if width > WIDEST_ROW:
        return f"rows of {width} elements are wider than {WIDEST_ROW}"
    return None


def _constant(function: Callable) -> Callable:
    """Marked as by `torch.compiler.assume_constant_result`, which would import the compiler: seconds of every start."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def use_triton(operation: str, backend: str, device_type: str, dtype: torch.dtype, width: int = 1) -> bool:
    """Whether `operation` runs its Triton kernels.

    Args:
        operation: its name, for the log.
        backend: auto: Triton on GPUs where it can; reference; triton.
        device_type, dtype: of its main input.
        width: elements of a row that one program holds.

    Raises:
        ValueError: Triton is asked for and cannot serve.
    """
    assert backend in BACKENDS, backend
    if backend == "reference":
        return False
    reason = refusal(device_type, dtype, width)
    if backend == "triton":
        if reason is not None:
            raise ValueError(f"{operation} cannot run in Triton: {reason}")
        return True
    if device_type != "cuda":
        reason = f"the tensors are on {device_type}"
    if reason is not None and (message := f"{operation}: plain torch and not Triton, since {reason}") not in _told:
        _told.add(message)
        log.log(logging.WARNING if device_type == "cuda" else logging.INFO, message)
    return reason is None
