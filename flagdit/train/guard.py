"""The guard: a bad step never reaches weights, moments or averages, and is written down with its samples.

It judges after the last backward and before the optimizer, from two numbers that are the same on every rank: the loss
and the gradient norm of the global batch. A bad step is computed once more (`guard.replay`): the same samples with the
same noise give the same numbers, so what is good at the second try was an accident of the machine, and what is bad
again comes from the data or the weights. Then `guard.policy` decides.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flagdit.batch import PackedBatch
from flagdit.config.schema import GuardConfig
from flagdit.data_pipelines.loader import BadSample
from flagdit.errors import FlagDiTError
from flagdit.train.folder import append_line

NORMAL = 1.4826
"""Deviation of a normal law over its median absolute deviation."""
LEAST = 0.01
"""Share of the median that a deviation counts at least: where all losses are nearly equal, small ones are no spikes."""
OUTLIER = 10.0
"""Times the median of a step's own losses from which a sample of a bad but finite step is named."""


class TrainingError(FlagDiTError):
    """Training cannot go on with these numbers."""


@dataclass(frozen=True)
class Attempt:
    """What computing a global batch gave; its gradients wait for the optimizer.

    Attributes:
        loss, grad_norm: of the global batch.
        samples: every sample of it with its own loss (`rows_of`); only where the attempt is bad.
        ranks: whose samples had losses that are not finite; only where the attempt is bad.
        bad: why it must not be applied; None for a good one. The same on every rank.
    """

    loss: float
    grad_norm: float
    bad: str | None = None
    samples: Sequence[dict[str, Any]] = ()
    ranks: Sequence[int] = ()


@dataclass
class Guard:
    """Judges steps, decides what becomes of bad ones, and keeps count.

    Attributes:
        cfg: limits and policy.
        ledger: file that gets one JSON line per decision.
        writes: whether this process writes it; all ranks of a run count alike, one writes.
        bad_steps: left out since the start of the run.
        consecutive: left out in a row, up to now.
        accidents: steps that were bad once and good when they were computed again.
        returns: to the checkpoint of step `returned_to`, since a newer one was there.
        recent: the last good losses, which spikes are measured against.
    """

    cfg: GuardConfig
    ledger: Path
    writes: bool = True
    bad_steps: int = 0
    consecutive: int = 0
    accidents: int = 0
    returns: int = 0
    returned_to: int = -1
    recent: deque[float] = field(default_factory=deque)
    _unreadable: int = 0

    def verdict(self, loss: float, grad_norm: float) -> str | None:
        """Why a step is bad; None for a good one."""
        if not math.isfinite(loss):
            return f"loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"gradient norm is {grad_norm}"
        if self.cfg.max_grad_norm and grad_norm > self.cfg.max_grad_norm:
            return f"gradient norm {grad_norm:.4g} is above guard.max_grad_norm={self.cfg.max_grad_norm:g}"
        if self.cfg.spike and len(self.recent) >= self.cfg.window // 2:
            median, score = robust_score(loss, self.recent)
            if score > self.cfg.spike:
                return (
                    f"loss {loss:.4g} is {score:.1f} deviations above the median {median:.4g} of the last "
                    f"{len(self.recent)} (guard.spike={self.cfg.spike:g})"
                )
        return None

    def accept(self, loss: float) -> None:
        """A step was applied."""
        self.consecutive = 0
        self.recent.append(loss)
        while len(self.recent) > self.cfg.window:
            self.recent.popleft()

    def forgive(self, step: int, first: Attempt, again: Attempt) -> None:
        """Writes down a step that was bad at first and is good when computed again; it will be applied.

        Args:
            step: steps done, this one included.
        """
        self.accidents += 1
        self._write(_entry(step, first, again, cause="machine", decision="applied at the second try"))

    def reject(self, step: int, first: Attempt, again: Attempt | None) -> None:
        """Counts a bad step and writes down its samples and what becomes of them.

        Args:
            step: steps done, this one included.
            again: the second try; None where there was none.

        Raises:
            TrainingError: the policy is to stop, or `guard.max_consecutive` steps in a row were bad.
        """
        self.bad_steps += 1
        self.consecutive += 1
        too_many = self.consecutive >= self.cfg.max_consecutive
        stops = too_many or self.cfg.policy == "stop"
        decision = "stopped" if stops else {"skip": "skipped", "rollback": "returns to a checkpoint"}[self.cfg.policy]
        self._write(_entry(step, first, again, "unknown" if again is None else "data or weights", decision))
        if stops:
            raise TrainingError(
                f"step {step} is bad: {first.bad}"
                if self.cfg.policy == "stop"
                else f"{self.consecutive} bad steps in a row up to step {step}; the last one: {first.bad}",
                where=str(self.ledger),
                fix="The ledger names the samples. No bad step has reached the weights, and the checkpoints are "
                "untouched. Mend the data, change guard.policy or guard.max_consecutive, or start a new run with a "
                "lower optimizer.lr.",
            )

    def returned(self, step: int, to: int, batches: dict[int, list[int]], recent: Sequence[float]) -> None:
        """Takes note of a return to a checkpoint.

        Args:
            step: of the bad step.
            to: step of the checkpoint.
            batches: step → sample ids of the batches since, which are left out.
            recent: good losses up to the checkpoint.

        Raises:
            TrainingError: the run has returned to this checkpoint `guard.max_consecutive` times.
        """
        self.bad_steps += len(batches) - 1  # the bad step itself is counted
        self.returns, self.returned_to = (self.returns + 1 if to == self.returned_to else 1), to
        self.recent = deque(recent)
        reason = f"returned to step {to}, left out the batches of steps {to + 1} to {step}"
        self._write({"kind": "return", "step": step, "reason": reason, "batches": batches})
        if self.returns >= self.cfg.max_consecutive:
            raise TrainingError(
                f"{self.returns} returns to the checkpoint of step {to}, the last one from step {step}",
                where=str(self.ledger),
                fix="The run does not get past this point: mend the data, or start anew with a lower optimizer.lr.",
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
        counts = ("bad_steps", "consecutive", "accidents", "returns", "returned_to")
        return {**{name: getattr(self, name) for name in counts}, "recent": list(self.recent)}

    def load(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, deque(value) if name == "recent" else value)


def robust_score(value: float, others: Sequence[float]) -> tuple[float, float]:
    """The median of the others, and how many of their deviations a value lies above it. Median and median absolute
    deviation do not move when a few of the others are spikes themselves."""
    median = statistics.median(others)
    deviation = NORMAL * statistics.median([abs(other - median) for other in others])
    return median, (value - median) / max(deviation, LEAST * abs(median), 1e-12)


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


def suspects(samples: Sequence[dict[str, Any]]) -> list[int]:
    """Ids of the samples whose own loss is not finite; where all are, of those that stand out."""
    broken = [row["id"] for row in samples if isinstance(row["loss"], str)]
    if broken or not samples:
        return broken
    limit = OUTLIER * statistics.median(row["loss"] for row in samples)
    return [row["id"] for row in samples if row["loss"] > limit]


def _entry(step: int, first: Attempt, again: Attempt | None, cause: str, decision: str) -> dict[str, Any]:
    """A line of the ledger."""
    return {
        "kind": "step",
        "step": step,
        "reason": first.bad,
        "cause": cause,
        "decision": decision,
        "loss": _number(first.loss),
        "grad_norm": _number(first.grad_norm),
        "again": again and {"loss": _number(again.loss), "grad_norm": _number(again.grad_norm)},
        "ranks": list(first.ranks),
        "suspects": suspects(first.samples),
        "samples": list(first.samples),
    }


def _number(value: float) -> float | str:
    # JSON has no NaN.
    return value if math.isfinite(value) else str(value)
