"""Figures of a run: means since the last line, rates, and the share of the device's peak (MFU)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

PEAK_TFLOPS = {"B200": 2250.0, "H200": 989.0, "H100": 989.0, "A100": 312.0}
"""Dense bf16 peak of known GPUs, in TFLOP/s, from their data sheets (SXM versions)."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        step: steps done, this one included.
        loss: mean loss of the global batch.
        grad_norm: of the global batch, before clipping.
        lr: learning rate of the step.
        samples, tokens: of the global batch.
        flops: forward and backward, of the model alone.
        seconds: waiting for data, computing and updating; not the hooks.
        bad: why the step was left out; None for a good one.
        accident: what was wrong with a good step at its first try; None where nothing was.
        ema_seconds: time that the averages took; None where it was not measured.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    samples: int
    tokens: int
    flops: float
    seconds: float
    bad: str | None = None
    accident: str | None = None
    ema_seconds: float | None = None


@dataclass
class Totals:
    """Sums over the run, kept in checkpoints. `seconds` counts everything between start and end, restarts left out."""

    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class Window:
    """Sums since the last line, kept in checkpoints so that a continued run writes the same lines."""

    steps: int = 0
    good: int = 0
    loss: float = 0.0
    grad_norm: float = 0.0
    samples: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    def add(self, result: StepResult) -> None:
        self.steps += 1
        self.samples += result.samples
        self.tokens += result.tokens
        self.flops += result.flops
        self.seconds += result.seconds
        if result.bad is None:
            self.good += 1
            self.loss += result.loss
            self.grad_norm += result.grad_norm


class Meter:
    """Turns step results into metric lines.

    Args:
        peak_tflops: of all devices together, for MFU; None where it is not known.
    """

    def __init__(self, peak_tflops: float | None):
        self.totals, self.window = Totals(), Window()
        self._peak = peak_tflops

    def add(self, result: StepResult, seconds: float) -> None:
        """Takes in a step and the wall time since the one before, hooks included."""
        self.window.add(result)
        self.totals.samples += result.samples
        self.totals.tokens += result.tokens
        self.totals.seconds += seconds

    def line(self, result: StepResult, bad_steps: int) -> dict[str, Any]:
        """The line at `result.step`; the window starts anew. loss and grad_norm are means over its good steps."""
        w, self.window = self.window, Window()
        return {
            "step": result.step,
            "loss": w.loss / w.good if w.good else None,
            "grad_norm": w.grad_norm / w.good if w.good else None,
            "lr": result.lr,
            "tokens": self.totals.tokens,
            "samples": self.totals.samples,
            "tokens_per_s": w.tokens / w.seconds,
            "samples_per_s": w.samples / w.seconds,
            "mfu": w.flops / w.seconds / (self._peak * 1e12) if self._peak else None,
            "ema_seconds": result.ema_seconds,
            "bad_steps": bad_steps,
            "seconds": self.totals.seconds,
        }

    def state(self) -> dict[str, Any]:
        return {"totals": asdict(self.totals), "window": asdict(self.window)}

    def load(self, state: dict[str, Any]) -> None:
        self.totals, self.window = Totals(**state["totals"]), Window(**state["window"])


def peak_tflops(device: torch.device, given: float, devices: int = 1) -> float | None:
    """Peak of all devices together in TFLOP/s: by the recipe's figure for one if there is one, else by a known GPU's,
    else None."""
    if given:
        return given * devices
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * devices for gpu, peak in PEAK_TFLOPS.items() if gpu in name), None)
