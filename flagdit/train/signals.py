"""Stopping politely: the first SIGINT, SIGTERM or SIGUSR1 lets the step end and saves, the second leaves at once.

SIGUSR1 is what clusters send before a job's time is up.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
ECHO = 5.0
"""Seconds in which further signals are the first one's echo: a scheduler that preempts a job sends several at once. Not
so Ctrl-C, which a person types."""
SHOW_CURSOR = b"\x1b[?25h"


class Stop:
    """Whether somebody asked the run to stop.

    Attributes:
        signal: number of the signal that came; None so far.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._since = 0.0
        self._owner = os.getpid()

    def handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return  # a forked loader worker; its parent decides
        if self.signal is not None:
            if number != signal.SIGINT and time.monotonic() - self._since < ECHO:
                return
            # A progress bar may have hidden the cursor; nothing else is worth the wait.
            if os.isatty(1):
                os.write(1, SHOW_CURSOR)
            os._exit(128 + number)
        self.signal, self._since = number, time.monotonic()
        text = f"\n{signal.Signals(number).name}: saving after this step; once more leaves at once\n"
        os.write(2, text.encode())


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Catches the signals as long as the context lasts. Outside the main thread, where Python cannot, it does
    nothing."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.handle) for number in STOPPING}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
