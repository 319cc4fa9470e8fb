"""The keys of the `checkpoint` block: when a run saves, what it keeps, what it continues from (train/saving.py)."""

from __future__ import annotations

from dataclasses import dataclass

from flagdit.config.fields import key


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving and continuing."""

    every: int = key(1000, "Steps between checkpoints; the last step always saves.", at_least=1)
    keep: int = key(3, "Newest checkpoints to keep; 0: all.", at_least=0)
    keep_every: int = key(0, "Also keep those of steps that are multiples of this; 0: none.", at_least=0)
    keep_best: int = key(0, "Also keep so many with the lowest held-out loss.", at_least=0)
    asynchronous: bool = key(False, "Write while training goes on, from a copy in host memory.")
    busy: str = key(
        "wait", "A save is due while one is being written: wait for it, or skip the new one.", choices=("wait", "skip")
    )
    max_failures: int = key(3, "Failed saves in a row, of those beside training, that stop the run.", at_least=1)
    verify: bool = key(True, "Compare every file with its hash before a run is continued from it.")
    fall_back: bool = key(True, "Where the newest checkpoint is damaged, continue from the one before.")
    grace: float = key(
        240.0,
        "Seconds from a signal to stop until the process leaves; what is not saved by then is given up. 0: no limit.",
        at_least=0,
    )
