"""Saving while training goes on: the state is copied in the main thread and written by another.

The copy is what training waits for. It lives in host memory that is allocated once, at the start, as large as this
rank's part of the checkpoint.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flagdit.checkpoint import store
from flagdit.checkpoint.folders import Keep, retention
from flagdit.config.schema import CheckpointConfig
from flagdit.errors import CheckpointError
from flagdit.parallel.mesh import ParallelContext
from flagdit.parallel.ranks import Ranks
from flagdit.parallel.shards import Shard, Shards


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint of one step holds; see `store.save`."""

    step: int
    groups: dict[str, Shards]
    state: dict[str, Any]
    documents: dict[str, str]
    validation: float | None


class Saver:
    """Writes the checkpoints of a run. All ranks call its methods after the same steps.

    Args:
        run_dir: the run folder.
        cfg: checkpoint.
        mesh: this rank's place.
        tell: gets a line about everything that a person should know.

    Attributes:
        saved: step of the newest checkpoint that is on the disk.
        ranks: of the run, with a group of their own, so that a save and a training step do not wait for each other.
        failures, skipped: saves that failed, and saves that were left out because one was still being written.
    """

    def __init__(self, run_dir: Path, cfg: CheckpointConfig, mesh: ParallelContext, tell: Callable[[str], None]):
        self.ranks: Ranks = mesh.own_group()
        self.saved = self.failures = self.skipped = 0
        self._run_dir, self._cfg, self._tell = run_dir, cfg, tell
        self._agree, self._skips = mesh.largest, cfg.busy == "skip"
        self._keep = Keep(cfg.keep, cfg.keep_every, cfg.keep_best)
        self._copies = _Copies()
        self._writing: _Writing | None = None
        self._in_a_row = 0
        self._stall = 0.0

    def prepare(self, step: int, groups: dict[str, Shards]) -> None:
        """Before the first step: `step` is on the disk. Allocates the memory for copies, so that too little of it shows
        at the start."""
        self.saved = step
        if self._cfg.asynchronous:
            self._copies.allocate(groups)

    def save(self, snapshot: Snapshot, *, final: bool) -> None:
        """Saves, beside the training if the recipe says so.

        Args:
            final: nothing comes after it: the checkpoint is on the disk when this returns.

        Raises:
            CheckpointError: it could not be written, or so many saves in a row could not that the run must stop.
        """
        began = time.perf_counter()
        busy = self._agree(int(self._writing is not None and self._writing.is_alive()))
        if busy and self._skips and not final:
            self.skipped += 1
            self._tell(f"step {snapshot.step}  checkpoint left out: the one before is still being written")
            return
        self.wait()
        if self._in_a_row >= self._cfg.max_failures:
            raise CheckpointError(
                f"the last {self._in_a_row} checkpoints could not be written",
                where=str(self._run_dir),
                fix="Earlier checkpoints are as they were. Free space, then start the same command again.",
            )
        if self._cfg.asynchronous and not final:
            copied = replace(snapshot, groups=self._copies.take(snapshot.groups))
            stall = time.perf_counter() - began
            self._writing = _Writing(self._write, copied, stall)
            self._writing.start()
        else:
            self._write(snapshot)
            self.saved = snapshot.step
            stall = time.perf_counter() - began
            self._tell(f"step {snapshot.step}  checkpoint saved in {stall:.1f} s")
        self._stall += stall

    def poll(self) -> None:
        """Tells of a background save that has ended since the last call."""
        if self._writing is not None and not self._writing.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until no save is under way. A failed one is told and counted."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        writing.join()
        step = writing.snapshot.step
        if writing.error is None:
            self.saved, self._in_a_row = step, 0
            self._tell(
                f"step {step}  checkpoint saved in {writing.seconds:.1f} s, for {writing.stall:.2f} s of which "
                "training stood still"
            )
            return
        self.failures += 1
        self._in_a_row += 1
        self._tell(f"step {step}  checkpoint NOT saved ({self.failures} so far): {writing.error}")

    def figures(self) -> dict[str, Any]:
        """For a line of metrics: seconds that training stood still for saves since the last call, and counts."""
        stall, self._stall = self._stall, 0.0
        return {"save_stall": stall, "failed_saves": self.failures, "skipped_saves": self.skipped}

    def _write(self, snapshot: Snapshot) -> None:
        store.save(
            self._run_dir,
            snapshot.step,
            snapshot.groups,
            snapshot.state,
            documents=snapshot.documents,
            validation=snapshot.validation,
            ranks=self.ranks,
        )
        self.ranks.first(lambda: retention(self._run_dir, self._keep))


class _Writing(threading.Thread):
    """One save under way.

    Attributes:
        stall: seconds that training had to wait for it.
        seconds: from the copy's end to the disk; known at the end.
        error: why it failed; None while it goes on and where it did not.
    """

    def __init__(self, write: Callable[[Snapshot], None], snapshot: Snapshot, stall: float):
        super().__init__(name=f"checkpoint-{snapshot.step}", daemon=True)
        self.snapshot, self.stall = snapshot, stall
        self.seconds = 0.0
        self.error: BaseException | None = None
        self._write = write

    def run(self) -> None:
        began = time.perf_counter()
        try:
            self._write(self.snapshot)
        except BaseException as error:  # the main thread reports it
            self.error = error
        self.seconds = time.perf_counter() - began


class _Copies:
    """Copies of shards in host memory, page-locked where they come from a GPU."""

    def __init__(self) -> None:
        self._groups: dict[str, Shards] = {}

    def allocate(self, groups: dict[str, Shards]) -> None:
        self._groups = {group: {n: _like(shard) for n, shard in shards.items()} for group, shards in groups.items()}

    @torch.no_grad()
    def take(self, groups: dict[str, Shards]) -> dict[str, Shards]:
        if not self._groups:
            self.allocate(groups)
        into, out_of = (_memories(taken) for taken in (self._groups, groups))
        if out_of:
            torch._foreach_copy_(into, out_of, non_blocking=True)
        if any(memory.is_cuda for memory in out_of):
            torch.cuda.synchronize()
        return self._groups


def _like(shard: Shard) -> Shard:
    parts = [
        (box, torch.zeros(memory.shape, dtype=memory.dtype, pin_memory=memory.is_cuda)) for box, memory in shard.parts
    ]
    return replace(shard, parts=tuple(parts))


def _memories(groups: dict[str, Shards]) -> list[Tensor]:
    return [memory for shards in groups.values() for shard in shards.values() for _, memory in shard.parts]
