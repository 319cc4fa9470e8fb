"""The processes of a run, as a few that agree with each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """All processes of a run; one alone needs nobody.

    Attributes:
        rank, world: this process among all.
        group: that carries their messages; None: the default one. A thread beside the training needs its own.
    """

    rank: int = 0
    world: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0, group=self.group)
        return holder[0]

    def from_all(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of the ranks, on every rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=self.group)
        return found

    def first(self, function: Callable[[], T]) -> T:
        """What the function returns on rank 0, the only one that calls it; if it raises, every rank does."""
        if self.world == 1:
            return function()
        value: Any = None
        error: BaseException | None = None
        if self.is_first:
            try:
                value = function()
            except Exception as raised:
                error = raised
        value, error = self.from_first((value, error))
        if error is not None:
            raise error
        return value


ALONE = Ranks()
