"""How far a long command is: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS_BETWEEN_LINES = 10.0

Advance = Callable[[int], None]


@contextmanager
def progress(what: str, total: int) -> Iterator[Advance]:
    """Shows progress over `total` samples; the body calls the yielded function with the number of new ones."""
    start = time.monotonic()
    done = 0
    if sys.stdout.isatty():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, transient=True) as bar:
            task = bar.add_task(what, total=total)

            def move(count: int) -> None:
                nonlocal done
                done += count
                bar.advance(task, count)

            yield move
    else:
        last = start

        def tell(count: int) -> None:
            nonlocal done, last
            done += count
            if time.monotonic() - last > SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                left = (last - start) / max(done, 1) * max(total - done, 0)
                print(f"{what}: {done} of {total}, about {left:.0f} s left", flush=True)

        yield tell
    # A file may give several samples, so that there are more than were announced.
    counted = f"{done} of {total}" if done <= total else f"{done}"
    print(f"{what}: {counted} samples in {time.monotonic() - start:.1f} s", flush=True)
