"""How this benchmark measures: medians of device times, the copy ceiling, memory, and the time that is left."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Clock:
    """Times work on one device.

    Attributes:
        device: where the work runs.
        dry: run everything once and report no times.
        budget: seconds after which no further measurement starts.
    """

    device: torch.device
    dry: bool
    budget: float
    began: float = field(default_factory=time.monotonic)

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() - self.began > self.budget

    def milliseconds(self, work: Callable[[], Any], seconds: float = 0.4) -> float | None:
        """Median device time of one call, of at least 5 calls and about so many seconds; None in a dry run."""
        work()
        if self.dry:
            return None
        work()
        first = self._timed(work)
        count = max(5, min(100, int(seconds * 1000 / max(first, 1e-3))))
        return statistics.median(self._timed(work) for _ in range(count))

    def _timed(self, work: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def forward_backward(
        self, function: Callable[..., Any], leaves: Sequence[Tensor]
    ) -> tuple[float | None, float | None]:
        """Times of a function and of the gradients of all its inputs."""
        with torch.no_grad():
            forward = self.milliseconds(lambda: function(*leaves))
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [torch.randn_like(y) for y in outputs]
        backward = self.milliseconds(lambda: torch.autograd.grad(outputs, leaves, upstream, retain_graph=True))
        return forward, backward

    def peak_gb(self, work: Callable[[], Any]) -> float | None:
        """Largest memory in use while work runs, tensors that exist before included; None in a dry run."""
        if self.dry:
            work()
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) / 1e9

    def release(self) -> None:
        """Gives the memory of finished measurements back."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def copy_rate(self) -> float | None:
        """GB/s of a copy of 2 GB, read and written bytes both counted: what a kernel bound by memory can reach."""
        size = 1000 if self.dry else 2**30
        source = torch.randn(size, device=self.device, dtype=torch.bfloat16)
        target = torch.empty_like(source)
        taken = self.milliseconds(lambda: target.copy_(source))
        self.release()
        return None if taken is None else 2 * source.nbytes / taken / 1e6


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def cell(value: float | None, form: str = ".3f") -> str:
    """A number for the table; a dash for what was not measured."""
    return "–" if value is None else format(value, form)
