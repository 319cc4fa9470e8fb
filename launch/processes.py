"""Ranks as child processes that live and die together.

Plain subprocesses with torchrun's environment rather than torch's elastic agent: the agent answers every signal by
killing its workers, and restarts or prints a page where one line is the cause. Here a signal reaches the training
loops, which save; and of many ranks that fail together, the one that failed by itself is named.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from flagdit.errors import LaunchError

SETTLE = 2.0
"""Seconds that the other ranks get to fail by themselves: the first to end is not always the first to fail."""
GRACE = 10.0
"""Seconds from SIGTERM to SIGKILL for ranks that outlive a failed one: they hang in a collective, or save."""
POLL = 0.2
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SHOW_CURSOR = b"\x1b[?25h"
PR_SET_PDEATHSIG = 1
MOST_LINES = 40

CONSEQUENCE = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|DistNetworkError|DistBackendError|remote process exited|"
    r"Watchdog caught collective|Timed out waiting|Socket Timeout|TCPStore",
    re.IGNORECASE,
)
"""What torch and its backends say in a rank whose peer has vanished."""
ERROR_HEAD = re.compile(r"(\x1b\[[0-9;]*m|\[rank\d+\]:\s?)*(error: |Traceback \(most recent|Fatal Python error)")


@dataclass
class Rank:
    """One child process, leader of a session of its own.

    Attributes:
        number: its rank.
        log: gets its stderr, and its stdout too unless that goes to the terminal.
        start: where this start's output begins in the log, in bytes.
    """

    number: int
    process: subprocess.Popen
    log: Path
    start: int

    @property
    def code(self) -> int | None:
        """Exit code; -n after signal n; None while it runs."""
        return self.process.poll()

    def send(self, number: int) -> None:
        """Signals the process alone; its loader processes follow it."""
        if self.code is None:
            self.process.send_signal(number)

    def sweep(self) -> None:
        """Kills what is left of it and of its loader processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def said(self) -> str:
        """The last error or traceback in its log, else the log's last lines."""
        with self.log.open("rb") as f:
            f.seek(max(self.start, self.log.stat().st_size - 200_000))
            lines = f.read().decode(errors="replace").rstrip().splitlines()
        heads = [i for i, line in enumerate(lines) if ERROR_HEAD.match(line)]
        told = lines[heads[-1] :] if heads else lines[-10:]
        half = MOST_LINES // 2
        return "\n".join(told if len(told) <= MOST_LINES else [*told[:half], "…", *told[-half:]])


@dataclass
class Outcome:
    """How a group of ranks ended.

    Attributes:
        ended: all ranks, in the order in which they ended.
        ours: numbers of those that were ended from here after another one failed.
        stopped: the signal that was passed on to them; 0: none.
    """

    ended: list[Rank] = field(default_factory=list)
    ours: set[int] = field(default_factory=set)
    stopped: int = 0

    def failed(self, rank: Rank) -> bool:
        """Whether it ended badly, and not because somebody asked it to."""
        asked = [0, 128 + self.stopped, -self.stopped] if self.stopped else [0]
        if rank.number in self.ours:
            asked += [-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM]
        return rank.code not in asked

    def first_failure(self) -> Rank | None:
        """The rank that failed by itself, not for want of a peer."""
        failed = [rank for rank in self.ended if self.failed(rank)]
        alone = [rank for rank in failed if not _for_want_of_a_peer(rank)]
        return next(iter(alone + failed), None)


def run_ranks(
    argv: Sequence[str],
    ranks: int,
    logs: Path,
    environment: Callable[[int], Mapping[str, str]],
    tell: Callable[[str], None],
) -> int:
    """Runs one command as several processes until all have ended.

    Rank 0 has this process's stdout; everything else goes to the logs. A first SIGINT, SIGTERM or SIGUSR1 is passed to
    every rank once, so that they save and leave; a second one kills them. When a rank fails the others are ended, by
    SIGTERM after SETTLE seconds and by SIGKILL after GRACE more. If this process dies, the kernel kills its ranks.

    Args:
        argv: the command.
        ranks: how many.
        logs: folder for rank_0.log, rank_1.log …; what earlier starts wrote there is kept.
        environment: rank → its variables, beside those of this process.
        tell: gets lines for people.

    Returns:
        0, or 128 + n when they left after signal n.

    Raises:
        LaunchError: a rank failed. It says which one and why; `exit_code` is that rank's.
    """
    children: list[Rank] = []
    with _signals_held() as held:
        try:
            for number in range(ranks):
                children.append(_start(argv, number, logs, environment(number), held))
            outcome = _watch(children, tell)
        finally:
            for rank in children:
                rank.sweep()
            if sys.stdout.isatty():
                os.write(1, SHOW_CURSOR)  # a killed progress bar leaves it hidden
    if first := outcome.first_failure():
        raise _error(first, outcome)
    return 128 + outcome.stopped if any(rank.code for rank in children) else 0


def _watch(children: Sequence[Rank], tell: Callable[[str], None]) -> Outcome:
    outcome = Outcome()
    deadline, ending = float("inf"), signal.SIGTERM
    while len(outcome.ended) < len(children):
        received = signal.sigtimedwait({signal.SIGCHLD, *PASSED_ON}, POLL)
        if received and received.si_signo in PASSED_ON:
            name = signal.Signals(received.si_signo).name
            if outcome.stopped:
                tell(f"{name}: killed")
                raise SystemExit(128 + received.si_signo)
            outcome.stopped = received.si_signo
            tell(f"{name}: the ranks save after this step and leave; once more kills them")
            for rank in children:
                rank.send(outcome.stopped)
        for rank in children:
            if rank not in outcome.ended and rank.code is not None:
                outcome.ended.append(rank)
                if outcome.failed(rank):
                    deadline = min(deadline, time.monotonic() + SETTLE)
        if time.monotonic() > deadline:
            for rank in children:
                if rank.code is None:
                    outcome.ours.add(rank.number)
                    rank.send(ending)
            deadline, ending = time.monotonic() + GRACE, signal.SIGKILL
    return outcome


def _start(argv: Sequence[str], number: int, logs: Path, variables: Mapping[str, str], held: set) -> Rank:
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"rank_{number}.log"
    parent = os.getpid()
    libc = ctypes.CDLL(None)

    def in_child() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)  # the parent died before the line above

    with log.open("ab") as file:
        file.write(f"--- rank {number}, {datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}\n".encode())
        file.flush()
        process = subprocess.Popen(
            argv,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=None if number == 0 else file,
            stderr=file,
            start_new_session=True,  # Ctrl-C then comes here only, and is passed on once
            preexec_fn=in_child,
        )
        return Rank(number, process, log, file.tell())


@contextlib.contextmanager
def _signals_held() -> Iterator[set]:
    """Keeps signals waiting until `_watch` asks for them, so that none is lost between two lines. Gives the mask as it
    was, for the children."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, *PASSED_ON})
    try:
        yield before
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _for_want_of_a_peer(rank: Rank) -> bool:
    # A process that was killed said nothing of its own end; NCCL's watchdog aborts, and does.
    assert rank.code is not None
    return (rank.code > 0 or rank.code == -signal.SIGABRT) and bool(CONSEQUENCE.search(rank.said()))


def _error(first: Rank, outcome: Outcome) -> LaunchError:
    assert first.code is not None
    said = first.said().removeprefix("error: ")
    alike = [r for r in outcome.ended if outcome.failed(r) and r.said().removeprefix("error: ") == said]
    who = "all ranks" if 1 < len(alike) == len(outcome.ended) else f"rank {first.number}"
    if first.code < 0:
        how = f"was killed by {signal.Signals(-first.code).name}"
        if first.code == -signal.SIGKILL and first.number not in outcome.ours:
            how += " (not from here: often the machine ran out of memory, see dmesg)"
    else:
        how = f"ended with exit code {first.code}"
    text = "".join(f"\n  {line}" for line in said.splitlines())
    return LaunchError(
        f"{who} {how}" + (f":{text}" if text else ""),
        fix=f"Its log is {first.log}.",
        exit_code=first.code if first.code > 0 else 128 - first.code,
    )
