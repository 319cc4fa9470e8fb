"""Ranks that live and die together, with small scripts in the place of training."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flagdit.errors import LaunchError
from flagdit.launch import processes
from flagdit.launch.processes import run_ranks

HEAD = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n"


def ranks_of(tmp_path: Path, script: str, ranks: int, tell=lambda line: None) -> int:
    argv = [sys.executable, "-c", HEAD + script]
    return run_ranks(argv, ranks, tmp_path, lambda rank: {"RANK": str(rank)}, tell)


def launcher(tmp_path: Path, script: str, ranks: int) -> subprocess.Popen:
    """The same in a process of its own, to send signals to."""
    code = f"""
import sys
from pathlib import Path
from flagdit.launch.processes import run_ranks
argv = [sys.executable, "-c", {HEAD + script!r}]
tell = lambda line: print(line, flush=True)
sys.exit(run_ranks(argv, {ranks}, Path({str(tmp_path)!r}), lambda rank: {{"RANK": str(rank)}}, tell))
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(true, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def files(tmp_path: Path, pattern: str) -> list[str]:
    return sorted(p.name for p in tmp_path.glob(pattern))


def test_rank_0_has_the_terminal_and_the_others_their_logs(tmp_path, capfd):
    script = "print('out', rank); print('err', rank, file=sys.stderr)"
    assert ranks_of(tmp_path, script, 3) == 0
    assert ranks_of(tmp_path, script, 3) == 0
    out, err = capfd.readouterr()
    assert (out, err) == ("out 0\nout 0\n", "")
    texts = [(tmp_path / f"rank_{r}.log").read_text() for r in range(3)]
    for rank, text in enumerate(texts):
        assert text.count(f"--- rank {rank}, ") == 2 and text.count(f"err {rank}") == 2
        assert text.count(f"out {rank}") == (2 if rank else 0)


@pytest.mark.parametrize(
    ("fault", "code", "told"),
    [
        ("raise ValueError('broken here')", 1, ["rank 2 ended with exit code 1:", "ValueError: broken here"]),
        ("sys.exit('error: data.path=x is wrong. Mend it.')", 1, ["rank 2 ended", "\n  data.path=x is wrong"]),
        ("sys.exit(7)", 7, ["rank 2 ended with exit code 7."]),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, ["rank 2 was killed by SIGKILL", "out of memory"]),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 139, ["rank 2 was killed by SIGSEGV"]),
    ],
)
def test_a_dead_rank_ends_the_others_and_is_named(tmp_path, monkeypatch, capfd, fault, code, told):
    monkeypatch.setattr(processes, "SETTLE", 0.3)
    began = time.monotonic()
    with pytest.raises(LaunchError) as caught:
        ranks_of(tmp_path, f"if rank == 2: {fault}\nopen('{tmp_path}/pid%d' % os.getpid(), 'w'); time.sleep(60)", 3)
    assert time.monotonic() - began < 10
    text = str(caught.value)
    assert caught.value.exit_code == code and all(part in text for part in told), text
    assert "rank_2.log" in text and capfd.readouterr() == ("", "")
    assert not any(alive(int(name[3:])) for name in files(tmp_path, "pid*"))


def test_the_rank_that_failed_by_itself_is_named_before_those_that_lost_it(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "SETTLE", 1.5)
    script = "if rank == 1: print('ZeroDivisionError of mine', file=sys.stderr); time.sleep(0.7); 1 / 0\n"
    script += "raise RuntimeError('[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4242')"
    with pytest.raises(LaunchError, match="rank 1 ended with exit code 1") as caught:
        ranks_of(tmp_path, script, 3)
    assert str(caught.value).count("ZeroDivisionError") == 1 and "closed by peer" not in str(caught.value)


def test_an_error_that_all_ranks_share_is_told_once(tmp_path):
    with pytest.raises(LaunchError) as caught:
        ranks_of(tmp_path, "time.sleep(0.1 * rank); print('error: no such data', file=sys.stderr); sys.exit(2)", 3)
    assert str(caught.value).startswith("all ranks ended with exit code 2:\n  no such data\n")
    assert caught.value.exit_code == 2


def test_a_rank_that_ignores_sigterm_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "SETTLE", 0.2)
    monkeypatch.setattr(processes, "GRACE", 0.5)
    script = f"""
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if rank == 0:
    if os.fork() == 0:
        open('{tmp_path}/pid%d' % os.getpid(), 'w'); time.sleep(60)
    open('{tmp_path}/pid%d' % os.getpid(), 'w'); time.sleep(60)
while len([n for n in os.listdir('{tmp_path}') if n.startswith('pid')]) < 2: time.sleep(0.02)
sys.exit(5)
"""
    with pytest.raises(LaunchError, match="rank 1 ended with exit code 5") as caught:
        ranks_of(tmp_path, script, 2)
    assert caught.value.exit_code == 5
    pids = [int(name[3:]) for name in files(tmp_path, "pid*")]
    assert len(pids) == 2
    wait_until(lambda: not any(alive(pid) for pid in pids))


SAVES = """
def leave(n, frame):
    count.append(n)
    open('{folder}/got%d_%d_%d' % (rank, n, len(count)), 'w')
    if {polite}: time.sleep(0.3); sys.exit(128 + n)
count = []
for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1): signal.signal(n, leave)
open('{folder}/pid%d' % os.getpid(), 'w')
while True: time.sleep(0.05)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_every_rank_once(tmp_path, number):
    parent = launcher(tmp_path, SAVES.format(folder=tmp_path, polite=True), 2)
    wait_until(lambda: len(files(tmp_path, "pid*")) == 2)
    parent.send_signal(number)
    out, _ = parent.communicate(timeout=20)
    assert parent.returncode == 128 + number, out
    assert files(tmp_path, "got*") == [f"got{rank}_{int(number)}_1" for rank in range(2)]
    assert out.count(f"{signal.Signals(number).name}: the ranks save after this step") == 1 and "error" not in out


def test_a_second_signal_kills(tmp_path):
    parent = launcher(tmp_path, SAVES.format(folder=tmp_path, polite=False), 2)
    wait_until(lambda: len(files(tmp_path, "pid*")) == 2)
    parent.send_signal(signal.SIGTERM)
    wait_until(lambda: len(files(tmp_path, "got*")) == 2)
    assert parent.poll() is None
    parent.send_signal(signal.SIGTERM)
    out, _ = parent.communicate(timeout=20)
    assert parent.returncode == 143 and "SIGTERM: killed" in out
    assert not any(alive(int(name[3:])) for name in files(tmp_path, "pid*"))


def test_a_killed_launcher_leaves_no_orphan(tmp_path):
    parent = launcher(tmp_path, SAVES.format(folder=tmp_path, polite=True), 2)
    wait_until(lambda: len(files(tmp_path, "pid*")) == 2)
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(alive(int(name[3:])) for name in files(tmp_path, "pid*")))


def test_a_failure_while_saving_is_a_failure(tmp_path):
    script = SAVES.format(folder=tmp_path, polite="(rank == 0 or sys.exit(3))")
    parent = launcher(tmp_path, script, 2)
    wait_until(lambda: len(files(tmp_path, "pid*")) == 2)
    parent.send_signal(signal.SIGUSR1)
    out, _ = parent.communicate(timeout=20)
    assert "rank 1 ended with exit code 3" in out


def test_children_do_not_inherit_the_held_signals(tmp_path):
    script = f"open('{tmp_path}/mask', 'w').write(str(signal.pthread_sigmask(signal.SIG_BLOCK, [])))"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert ranks_of(tmp_path, script, 1) == 0
    assert (tmp_path / "mask").read_text() == str(before)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_long_errors_are_shortened_and_their_end_is_kept(tmp_path):
    script = (
        "print('Traceback (most recent call last)', *range(90), 'the end', sep='\\n', file=sys.stderr); sys.exit(1)"
    )
    with pytest.raises(LaunchError) as caught:
        ranks_of(tmp_path, script, 1)
    text = str(caught.value)
    assert text.count("\n") < 45 and "Traceback" in text and "the end" in text
