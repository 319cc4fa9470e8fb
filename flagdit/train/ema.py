"""Exponential moving averages of the weights, several decays at once, in fp32.

ema ← d·ema + (1−d)·weights, with d = min(decay, (1+step)/(10+step)) under warm-up: early averages forget the random
start, and a decay of 0.9999 is useful long before 10,000 steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Emas:
    """Averages that follow a set of fp32 tensors.

    Args:
        weights: the live tensors by name (an engine's `weights()`); a sharded engine gives its shards. Averages start
            as copies.
        decays: decay per step of each average.
        warmup: limit the decay to (1+step)/(10+step).
    """

    def __init__(self, weights: Mapping[str, Tensor], decays: Sequence[float], warmup: bool):
        self.decays = tuple(decays)
        self._warmup = warmup
        self._live = dict(weights)
        self._averages = [{name: w.detach().clone() for name, w in weights.items()} for _ in decays]

    def __len__(self) -> int:
        return len(self.decays)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """The weights of one average, in the order of `decays`."""
        return self._averages[index]

    @property
    def num_bytes(self) -> int:
        """Memory of all averages in this process."""
        return sum(w.nbytes for average in self._averages for w in average.values())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after optimizer step `step`, counted from 0. Not called for skipped steps."""
        for decay, average in zip(self.decays, self._averages, strict=True):
            d = min(decay, (1 + step) / (10 + step)) if self._warmup else decay
            torch._foreach_lerp_(list(average.values()), list(self._live.values()), 1 - d)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """A checkpoint's tensors by group, `ema_<decay>`: written in place when it is loaded."""
        return {self.group(i): average for i, average in enumerate(self._averages)}

    def group(self, index: int) -> str:
        """Name of one average in checkpoints and logs."""
        return f"ema_{self.decays[index]}"
