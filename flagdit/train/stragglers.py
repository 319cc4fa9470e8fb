"""Slow ranks: in a synchronous run all take as long as the slowest, so step times show nobody. A probe does.

Every so many steps each rank times the same matrix product on its device, and how long it has waited for data; rank 0
tells of ranks that are far from the median.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flagdit.train.hooks import due
from flagdit.train.metrics import StepResult
from flagdit.train.run import Run

EVERY_LINES = 10
"""Metrics lines between two looks."""
SLOWER = 1.3
"""Times the median above which a rank is told of."""
LEAST = 0.002
"""Seconds; shorter differences are noise."""
SIZE = {"cuda": 8192, "cpu": 256}
REPEATS = 5


@dataclass(frozen=True)
class Pace:
    """What one rank measured: seconds of the probe, and of waiting for data in a step."""

    rank: int
    host: str
    probe: float
    data: float


class Stragglers:
    """The hook. Its matrices live as long as the run; on a GPU they take 0.4 GB."""

    def __init__(self, run: Run):
        size = SIZE[run.engine.device.type]
        dtype = torch.bfloat16 if run.engine.device.type == "cuda" else torch.float32
        self._a = torch.ones(size, size, device=run.engine.device, dtype=dtype)
        self._waited = 0.0
        self._steps = 0

    def waited(self, seconds: float) -> None:
        """A step has waited so long for its batch."""
        self._waited += seconds
        self._steps += 1

    def after_step(self, run: Run, result: StepResult) -> None:
        mesh = run.engine.mesh
        if mesh.world == 1 or not due(result.step, EVERY_LINES * run.recipe.train.log_every):
            return
        data = self._waited / max(self._steps, 1)
        self._waited, self._steps = 0.0, 0
        paces = mesh.from_all(Pace(mesh.rank, socket.gethostname(), self.probe(), data))
        for line in slow(paces):
            run.display.note(f"step {result.step}  {line}")

    def probe(self) -> float:
        """Median seconds of a matrix product on this rank's device."""
        times = []
        for _ in range(REPEATS):
            _wait_for(self._a.device)
            began = time.perf_counter()
            torch.mm(self._a, self._a)
            _wait_for(self._a.device)
            times.append(time.perf_counter() - began)
        return statistics.median(times)


def slow(paces: Sequence[Pace]) -> list[str]:
    """A line for each rank that is far from the median, by compute or by data."""
    lines = []
    for what, values in (("computes", [p.probe for p in paces]), ("waits for data", [p.data for p in paces])):
        usual = statistics.median(values)
        for pace, value in zip(paces, values, strict=True):
            if value > SLOWER * usual and value - usual > LEAST:
                lines.append(
                    f"rank {pace.rank} on {pace.host} {what} {value / usual:.1f} times as long as the median rank"
                    if usual
                    else f"rank {pace.rank} on {pace.host} {what} {value:.3g} s a step, the median rank not at all"
                )
    return lines


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
