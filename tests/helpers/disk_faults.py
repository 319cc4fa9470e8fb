"""A disk that fails, fills up or loses power at a chosen call."""

import errno
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

CALLS = ("open", "write", "fsync", "rename", "mkdir", "rmdir", "unlink")
"""Functions of `os` through which all that is written reaches the disk. Opening for reading is not among them, but for
folders, which are opened to be synced."""


class Faults:
    """Counts the calls that reach the disk and cuts one of them.

    Args:
        number: of the call to cut, from 1; 0: none.
        fault: `kill`: the process dies there; else the name of an error of the disk, such as ENOSPC.
        lasting: the disk goes on failing after it.
    """

    def __init__(self, number: int, fault: str, lasting: bool = False):
        self.calls: list[str] = []
        self._number, self._fault, self._lasting = number, fault, lasting
        self._lock = threading.Lock()

    def install(self, patch: Callable[[Any, str, Any], None]) -> "Faults":
        """Puts itself before `os`; `patch` is setattr or a monkeypatch's."""
        for name in CALLS:
            patch(os, name, self._wrap(name, getattr(os, name)))
        return self

    def _wrap(self, name: str, function: Callable) -> Callable:
        def wrapped(*args, **kwargs):
            if name == "open" and "dir_fd" in kwargs:  # of a removal
                return function(*args, **kwargs)
            with self._lock:  # several files are written at once
                self.calls.append(name)
                count = len(self.calls)
            if count == self._number or (self._lasting and count > self._number > 0):
                if name == "write":  # a part of it is there
                    function(args[0], memoryview(args[1])[: len(args[1]) // 2])
                if self._fault == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                number = getattr(errno, self._fault)
                # A full disk can still make room and rename.
                if self._fault != "ENOSPC" or name not in ("rename", "rmdir", "unlink"):
                    raise OSError(number, os.strerror(number))
            return function(*args, **kwargs)

        return wrapped
