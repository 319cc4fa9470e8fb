"""A run that hangs: find out which rank is stuck, show what everybody is doing, and end the processes.

In a hang nearly every rank waits in a collective for one that does not come. Each rank's watchdog thread looks at its
training thread every second. Long is not stuck: another phase, another Python line or another forward of the model is
movement, so that compiling, validating and drawing pictures may take as long as they take. The first step and saving
get several times as long, since there a single native call may last for minutes: a compiler, a write.

The first watchdog that sees no movement asks, and every rank writes down where it is. The rank that is furthest behind,
and not itself waiting, is the one; or the one that writes nothing.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle

HANGING = 79
"""Exit code of a process that its watchdog ended."""
EXCHANGE = 10.0
"""Seconds that the ranks give each other to write down where they are."""
LOOK = 1.0
"""Seconds between two looks at the training thread."""
PATIENCE = 4.0
"""Times as long as usual that phases with long native calls may stand still."""
WAITING_IN = ("torch/distributed/", "megatron/core/", "deepspeed/comm/")


@dataclass(frozen=True)
class Place:
    """Where a rank's training thread is.

    Attributes:
        step: optimizer steps done.
        phase: the last thing it told: data, step, hooks or save.
        waiting: in a collective, for the others.
        line: file and line of its own code.
    """

    rank: int
    host: str
    step: int
    phase: str
    waiting: bool
    line: str


class Watchdog:
    """Watches the thread that made it.

    Args:
        folder: where ranks exchange their places; shared by all.
        rank, world: of this process.
        seconds: without any movement after which the run counts as hanging; 0: never.
        model: every forward of it is movement.
    """

    PHASES = ("data", "step", "hooks", "save")

    def __init__(self, folder: Path, rank: int, world: int, seconds: float, model: nn.Module | None = None):
        self._folder, self._rank, self._world, self._seconds = folder, rank, world, seconds
        self._model = model
        self._owner = threading.get_ident()
        self._beat = (0, self.PHASES[0])
        self._steps = 0
        self._moved = time.monotonic()
        self._answered = time.time()
        self._forwards: RemovableHandle | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._seconds:
            self._write("started")  # so that the others know the host of a rank that freezes
            self._thread.start()
            if self._model is not None:
                self._forwards = self._model.register_forward_pre_hook(self._forward)
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._forwards is not None:
            self._forwards.remove()

    def beat(self, step: int, phase: str) -> None:
        """The training thread begins `phase` with so many steps done."""
        assert phase in self.PHASES
        self._steps += phase == "data"
        self._moved = time.monotonic()
        self._beat = (step, phase)

    def _forward(self, *_: object) -> None:
        self._moved = time.monotonic()

    def _watch(self) -> None:
        place: object = None
        while not self._ended.wait(min(self._seconds / 10, LOOK)):
            before, place = place, (self._beat, _stack(self._owner))
            if place != before:
                self._moved = time.monotonic()
            if time.monotonic() - self._moved > self._patience():
                self._report()
                # Not sys.exit: the training thread would never come back to it.
                os._exit(HANGING)
            if (asked := self._asked()) > self._answered:
                self._answered = asked
                self._write("hangs")

    def _patience(self) -> float:
        """Seconds that the training thread may stand still where it is. Who waits for others is not the one that
        compiles or writes."""
        own = not is_waiting(sys._current_frames().get(self._owner))
        long = self._steps < 2 or self._beat[1] == "save"
        return self._seconds * (PATIENCE if own and long else 1.0)

    def _asked(self) -> float:
        """When a rank last asked where the others are; 0: never."""
        try:
            return (self._folder / "asked").stat().st_mtime
        except OSError:
            return 0.0

    def _write(self, name: str) -> None:
        frame = sys._current_frames().get(self._owner)
        step, phase = self._beat
        place = Place(self._rank, socket.gethostname(), step, phase, is_waiting(frame), own_line(frame))
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"{name}_{self._rank}.json"
        staged = file.with_suffix(".tmp")
        staged.write_text(json.dumps(asdict(place)))
        os.replace(staged, file)

    def _report(self) -> None:
        step, phase = self._beat
        self._write("hangs")
        (self._folder / "asked").touch()
        print(f"rank {self._rank} has not moved for {self._seconds:g} s: step {step}, {phase}", file=sys.stderr)
        faulthandler.dump_traceback(all_threads=True)
        places = self._everyone()
        culprit = stuck(places, self._started())
        print(f"error: {told(culprit, places)}", file=sys.stderr, flush=True)
        # The job's script leaves that node out when it queues the run again (launch/templates/train.sh.j2).
        job = os.environ.get("SLURM_JOB_ID")
        if culprit is not None and job and (self._folder.parent / "slurm").is_dir():
            (self._folder.parent / "slurm" / "suspect").write_text(f"{culprit.host}\n")

    def _everyone(self) -> list[Place]:
        """What the ranks have written by now; a rank that writes nothing within EXCHANGE is dead or frozen."""
        end = time.monotonic() + EXCHANGE
        fresh = time.time() - self._seconds - EXCHANGE
        while True:
            files = [f for f in self._folder.glob("hangs_*.json") if f.stat().st_mtime > fresh]
            if len(files) >= self._world or time.monotonic() > end:
                return sorted((read(file) for file in files), key=lambda place: place.rank)
            time.sleep(0.1)

    def _started(self) -> list[Place]:
        files = (self._folder / f"started_{rank}.json" for rank in range(self._world))
        return [read(file) for file in files if file.exists()]


def read(file: Path) -> Place:
    return Place(**json.loads(file.read_text()))


def stuck(places: list[Place], started: list[Place]) -> Place | None:
    """The rank that the others wait for; None where nothing tells it from the rest.

    Args:
        places: where those are that have written by now.
        started: where all were at the start.
    """
    here = {place.rank for place in places}
    silent = [place for place in started if place.rank not in here]
    if silent:
        return replace(silent[0], line="an unknown place, since it says nothing") if len(silent) == 1 else None
    behind = [p for p in places if not p.waiting] or places
    first = min((p.step, Watchdog.PHASES.index(p.phase)) for p in behind)
    behind = [p for p in behind if (p.step, Watchdog.PHASES.index(p.phase)) == first]
    return behind[0] if len(behind) == 1 and len(places) > 1 else None


def told(culprit: Place | None, places: list[Place]) -> str:
    """The finding as one sentence."""
    if culprit is not None:
        return (
            f"the run hangs: rank {culprit.rank} on {culprit.host} is stuck at {culprit.line} "
            f"(step {culprit.step}, {culprit.phase}), the other ranks wait for it; if that only takes long, raise "
            "parallel.timeout"
        )
    return f"the run hangs at {places[0].line}, and no rank stands out; each rank's log has its stacks"


def _stack(thread: int) -> tuple[tuple[object, int], ...]:
    """Where a thread is, instruction by instruction: two looks that agree have seen no movement."""
    frame, found = sys._current_frames().get(thread), []
    while frame is not None:
        found.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return tuple(found)


def is_waiting(frame: FrameType | None) -> bool:
    """Whether a thread is inside a collective of torch or a library of ours."""
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in WAITING_IN):
            return True
        frame = frame.f_back
    return False


def own_line(frame: FrameType | None) -> str:
    """The innermost line of this project, else the innermost of all."""
    innermost, here = frame, frame
    while here is not None and "flagdit" not in here.f_code.co_filename:
        here = here.f_back
    found = here or innermost
    return f"{Path(found.f_code.co_filename).name}:{found.f_lineno}" if found else "?"
