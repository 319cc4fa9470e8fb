"""How far a long conversion is: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from flagdit.checkpoint.safetensors_files import Advance
from flagdit.checkpoint.tensors import Derived, TensorSource

SECONDS_BETWEEN_LINES = 10.0
GB = 1e9


@contextmanager
def progress(what: str, total: int) -> Iterator[Advance]:
    """Shows progress over `total` bytes; the body calls the yielded function with the number of new ones."""
    start = time.monotonic()
    done = 0
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda count: bar.advance(task, count)
        return
    last = start

    def tell(count: int) -> None:
        nonlocal done, last
        done += count
        if time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            left = (last - start) / max(done, 1) * (total - done)
            text = f"{what}: {done / GB:.1f} of {total / GB:.1f} GB, about {left:.0f} s left"
            print(text, file=sys.stderr, flush=True)

    yield tell


def counted(source: TensorSource, advance: Advance) -> TensorSource:
    """The same tensors; each is told to the progress bar when it has been read."""

    def read(name: str) -> Tensor:
        tensor = source.read(name)
        advance(tensor.nbytes)
        return tensor

    return Derived(source.entries, read)
