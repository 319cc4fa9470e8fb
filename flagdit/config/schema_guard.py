"""The keys of the `guard` block: which steps are bad, and what becomes of them (train/guard.py)."""

from __future__ import annotations

from dataclasses import dataclass

from flagdit.config.fields import key


@dataclass(frozen=True)
class GuardConfig:
    """What happens when a step is bad."""

    max_grad_norm: float = key(
        0.0, "Gradient norm above which a step is bad; 0: only those that are not finite.", at_least=0
    )
    spike: float = key(
        10.0,
        "Robust z-score of the loss above which a step is bad: its distance from the median of the last good losses, "
        "in deviations; 0: off.",
        at_least=0,
    )
    window: int = key(128, "Last good losses that the score is taken against, once half of them are there.", at_least=8)
    replay: bool = key(True, "Compute a bad step once more; if it is good then, the machine had failed, not the data.")
    policy: str = key(
        "skip",
        "A step that stays bad: skip: leave its batch out; rollback: return to the newest checkpoint and leave out all "
        "batches since; stop.",
        choices=("skip", "rollback", "stop"),
    )
    max_consecutive: int = key(10, "Bad steps in a row, or returns to one checkpoint, that stop the run.", at_least=1)
