"""The guard: a bad step never reaches weights, moments or averages, and is written down with its samples.

It judges after the last backward and before the optimizer, from two numbers that are the same on every rank: the loss
and the gradient norm of the global batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flagdit.batch import PackedBatch
from flagdit.config.schema import GuardConfig
from flagdit.data_pipelines.loader import BadSample
from flagdit.errors import FlagDiTError
from flagdit.train.folder import append_line


class TrainingError(FlagDiTError):
    """Training cannot go on with these numbers."""


@dataclass
class Guard:
    """Judges steps and keeps count.

    Attributes:
        cfg: limits.
        ledger: file that gets one JSON line per bad step.
        writes: whether this process writes it; all ranks of a run count alike, one writes.
        bad_steps: skipped since the start of the run.
        consecutive: skipped in a row, up to now.
    """

    cfg: GuardConfig
    ledger: Path
    writes: bool = True
    bad_steps: int = 0
    consecutive: int = 0
    _unreadable: int = 0

    def verdict(self, loss: float, grad_norm: float) -> str | None:
        """Why a step is bad; None for a good one."""
        if not math.isfinite(loss):
            return f"loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"gradient norm is {grad_norm}"
        if self.cfg.max_grad_norm and grad_norm > self.cfg.max_grad_norm:
            return f"gradient norm {grad_norm:.4g} is above guard.max_grad_norm={self.cfg.max_grad_norm:g}"
        return None

    def accept(self) -> None:
        self.consecutive = 0

    def reject(
        self,
        step: int,
        reason: str,
        loss: float,
        grad_norm: float,
        rows: Sequence[dict[str, Any]],
    ) -> None:
        """Counts a bad step and writes its samples to the ledger.

        Args:
            step: steps done, this one included.
            rows: the step's samples with their losses (`rows_of`); those whose own loss is not finite are named as
                suspects.

        Raises:
            TrainingError: `guard.max_consecutive` steps in a row were bad.
        """
        self.bad_steps += 1
        self.consecutive += 1
        suspects = [row["id"] for row in rows if isinstance(row["loss"], str)]
        entry = {
            "kind": "step",
            "step": step,
            "reason": reason,
            "loss": _number(loss),
            "grad_norm": _number(grad_norm),
            "suspects": suspects,
            "samples": list(rows),
        }
        self._write(entry)
        if self.consecutive >= self.cfg.max_consecutive:
            raise TrainingError(
                f"{self.consecutive} bad steps in a row up to step {step}; the last one: {reason}",
                where=str(self.ledger),
                fix="The ledger names the samples. No bad step has reached the weights, and the "
                "checkpoints are untouched. Mend the data, raise guard.max_consecutive, or start a new run "
                "with a lower optimizer.lr.",
            )

    def unreadable(self, bad: Sequence[BadSample], tell: Callable[[str], None]) -> None:
        """Writes samples that the data could not give to the ledger, each once.

        Args:
            bad: all that the loader has met so far.
            tell: gets one line for each new one.
        """
        for sample in bad[self._unreadable :]:
            entry = {"id": sample.sample_id, "key": sample.key}
            line = {"kind": "sample", "step": sample.step + 1, "reason": sample.reason, "samples": [entry]}
            self._write(line)
            tell(f"sample {sample.key} left out: {sample.reason}")
        self._unreadable = len(bad)

    def _write(self, line: dict[str, Any]) -> None:
        if self.writes:
            append_line(self.ledger, line)

    def state(self) -> dict[str, Any]:
        return {"bad_steps": self.bad_steps, "consecutive": self.consecutive}

    def load(self, state: dict[str, Any]) -> None:
        self.bad_steps, self.consecutive = state["bad_steps"], state["consecutive"]


def rows_of(batches: Sequence[PackedBatch], losses: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """The ledger's line about every sample.

    Args:
        batches: the step's packs; weightless ones have no samples.
        losses: per-sample losses of each pack.
    """
    return [
        {"id": segment.sample_id, "key": segment.key, "epoch": segment.epoch, "loss": _number(value)}
        for batch, values in zip(batches, losses, strict=True)
        if not batch.weightless
        for segment, value in zip(batch.segments, values, strict=True)
    ]


def _number(value: float) -> float | str:
    # JSON has no NaN.
    return value if math.isfinite(value) else str(value)
