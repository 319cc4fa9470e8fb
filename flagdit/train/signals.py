"""Stopping politely, and in time: the first SIGINT, SIGTERM or SIGUSR1 lets the step end and saves; the second leaves
at once, and so does the end of the time for saving.

SIGUSR1 is what clusters send before a job's time is up. The exit code is 128 + the signal's number, however the process
leaves: the job's script then queues the run again (launch/templates/train.sh.j2). A thread listens, since the training
thread may be inside a kernel, a collective or a write of many seconds, where Python handles no signal.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
ECHO = 5.0
"""Seconds in which further signals are the first one's echo: a scheduler that preempts a job sends several at once. Not
so Ctrl-C, which a person types."""
END = 0
"""No signal: tells the listening thread to end."""
SHOW_CURSOR = b"\x1b[?25h"


class Stop:
    """Whether somebody asked the run to stop.

    Args:
        seconds: from the first signal to the moment at which the process leaves, saved or not; 0: any time.

    Attributes:
        signal: number of the signal that came; None so far.
    """

    def __init__(self, seconds: float = 0):
        self.signal: int | None = None
        self._seconds = seconds
        self._owner = os.getpid()

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Python's handler: the training thread sees the signal as soon as it runs Python again."""
        if os.getpid() == self._owner and self.signal is None:  # else a forked loader worker; its parent decides
            self.signal = number

    def listen(self, pipe: int) -> None:
        """The thread: reads signal numbers as they come, until END."""
        first, since = 0, 0.0
        # Unlike select(), poll() takes descriptors of any number.
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        while True:
            left = since + self._seconds - time.monotonic() if first and self._seconds else None
            if not poll.poll(None if left is None else 1000 * max(left, 0)):
                _leave(first, f"not saved within checkpoint.grace={self._seconds:g} s; the last checkpoint stands")
            number = os.read(pipe, 1)[0]
            if number == END:
                return
            if number not in STOPPING:
                continue
            if first and (number == signal.SIGINT or time.monotonic() - since > ECHO):
                _leave(number, "leaving at once")
            if not first:
                first, since = number, time.monotonic()
                self.signal = number
                _say(f"{signal.Signals(number).name}: saving after this step; once more leaves at once")


@contextlib.contextmanager
def stop_on_signals(seconds: float = 0) -> Iterator[Stop]:
    """Catches the signals as long as the context lasts. Outside the main thread, where Python cannot, it does nothing.

    Args:
        seconds: as `Stop` takes them.
    """
    stop = Stop(seconds)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    heard = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    before = {number: signal.signal(number, stop.handle) for number in STOPPING}
    _deaf_children()
    listener = threading.Thread(target=stop.listen, args=(read,), name="signals", daemon=True)
    listener.start()
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(heard)
        os.write(write, bytes([END]))  # closing would not do: loader workers have inherited it
        listener.join()
        os.close(write)
        os.close(read)


@functools.cache  # once for each process: it cannot be taken back
def _deaf_children() -> None:
    """A signal to a forked child must not write into the pipe that it shares with its parent."""
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


def _leave(number: int, why: str) -> None:
    # A progress bar may have hidden the cursor; nothing else is worth the wait.
    if os.isatty(1):
        os.write(1, SHOW_CURSOR)
    _say(f"{signal.Signals(number).name}: {why}")
    os._exit(128 + number)


def _say(text: str) -> None:
    os.write(2, f"\n{text}\n".encode())
