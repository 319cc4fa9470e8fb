"""What a person sees while a run goes: a live progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column


class Display(Protocol):
    """Shows a run."""

    def start(self, step: int, steps: int) -> None:
        """The run goes from `step` steps done to `steps`."""
        ...

    def advance(self, step: int) -> None:
        """One more step is done."""
        ...

    def metrics(self, line: dict[str, Any]) -> None:
        """A metrics line is there."""
        ...

    def note(self, text: str) -> None:
        """Something worth a line of its own."""
        ...

    def stop(self) -> None: ...


class Clock:
    """Estimates the time left from this process's own pace, saving and sampling included."""

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now

    def start(self, step: int, steps: int) -> None:
        self._first, self._steps, self._began = step, steps, self._now()

    def left(self, step: int) -> str:
        done = step - self._first
        if not done:
            return "?"
        return duration((self._now() - self._began) / done * (self._steps - step))


class SilentDisplay:
    """Shows nothing: for ranks that do not speak for the run."""

    def start(self, step: int, steps: int) -> None: ...

    def advance(self, step: int) -> None: ...

    def metrics(self, line: dict[str, Any]) -> None: ...

    def note(self, text: str) -> None: ...

    def stop(self) -> None: ...


class PlainDisplay:
    """One line of text per metrics line, for files and pipes."""

    def __init__(self) -> None:
        self._clock = Clock()

    def start(self, step: int, steps: int) -> None:
        self._steps = steps
        self._clock.start(step, steps)

    def advance(self, step: int) -> None:
        pass  # lines come with the metrics only

    def metrics(self, line: dict[str, Any]) -> None:
        step = line["step"]
        print(f"step {step}/{self._steps}  {summary(line)}  left {self._clock.left(step)}", flush=True)

    def note(self, text: str) -> None:
        print(text, flush=True)

    def stop(self) -> None:
        pass


class TerminalDisplay:
    """A progress bar with the latest figures; notes scroll above it."""

    def __init__(self, console: Console) -> None:
        self._clock = Clock()
        whole = Column(no_wrap=True)
        self._bar = Progress(
            TextColumn("[bold]train", table_column=whole),
            BarColumn(bar_width=16),
            MofNCompleteColumn(table_column=whole),
            TextColumn("[dim]left {task.fields[left]}", table_column=whole),
            TextColumn("{task.fields[figures]}", table_column=Column(ratio=1, no_wrap=True)),
            console=console,
            expand=True,
        )

    def start(self, step: int, steps: int) -> None:
        self._clock.start(step, steps)
        self._task = self._bar.add_task("train", total=steps, completed=step, figures="", left="?")
        self._bar.start()

    def advance(self, step: int) -> None:
        self._bar.update(self._task, completed=step, left=self._clock.left(step))

    def metrics(self, line: dict[str, Any]) -> None:
        self._bar.update(self._task, figures=summary(line))

    def note(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, markup=False)

    def stop(self) -> None:
        self._bar.stop()


def display_for(stream: Any = None) -> Display:
    """The display that fits a stream; standard output where none is given."""
    console = Console(file=stream or sys.stdout)
    return TerminalDisplay(console) if console.is_terminal else PlainDisplay()


def summary(line: dict[str, Any]) -> str:
    """A metrics line in a few words."""
    if line["loss"] is None:
        parts = ["all steps skipped"]
    else:
        parts = [f"loss {line['loss']:.4f}", f"grad {line['grad_norm']:.3g}"]
    parts += [f"{quantity(line['tokens_per_s'])} tokens/s", f"{quantity(line['samples_per_s'])} samples/s"]
    if line["mfu"] is not None:
        parts.append(f"MFU {line['mfu']:.1%}")
    if line["bad_steps"]:
        parts.append(f"bad steps {line['bad_steps']}")
    return "  ".join(parts)


def quantity(x: float) -> str:
    """Three digits and a unit: 12300 → 12.3k."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if x >= size:
            return f"{x / size:.3g}{unit}"
    return f"{x:.3g}"


def duration(seconds: float) -> str:
    """Two units: 3725 → 1h02m."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02d}h"
    if hours:
        return f"{hours}h{m:02d}m"
    return f"{m}m{s:02d}s" if m else f"{s}s"
