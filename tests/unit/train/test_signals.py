"""The first signal asks, the second leaves; in a process of its own."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from flagdit.train.signals import stop_on_signals

CHILD = """
import hashlib, sys, time
from flagdit.train.signals import stop_on_signals

def kernel():
    "Native code that runs for minutes, in which Python handles no signal."
    hashlib.pbkdf2_hmac("sha256", b"", b"", 500_000_000)

mode = sys.argv[1]
with stop_on_signals(1.0 if "late" in mode else 0) as stop:
    print("ready", flush=True)
    if "kernel" in mode:
        kernel()
    while stop.signal is None:
        time.sleep(0.01)
    print("asked", stop.signal, flush=True)
    if mode in ("stubborn", "late"):
        time.sleep(60)
"""


def child(mode):
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, mode], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_first_signal_asks(number):
    process = child("polite")
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert out == f"asked {number}\n" and f"{number.name}: saving after this step" in err and process.returncode == 0


def test_second_signal_leaves_at_once():
    process = child("stubborn")
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == f"asked {signal.SIGINT}\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130


def test_a_second_signal_leaves_native_code_too():
    process = child("kernel")
    process.send_signal(signal.SIGINT)
    assert "saving after this step" in process.stderr.readline() + process.stderr.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130


@pytest.mark.parametrize("mode", ["late", "late kernel"])
def test_what_is_not_saved_in_time_is_given_up_with_the_same_code(mode):
    process = child(mode)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 143 and 0.9 < time.monotonic() - began < 4
    assert "not saved within checkpoint.grace=1 s; the last checkpoint stands" in err


def test_a_scheduler_that_sends_several_signals_at_once_asks_once():
    process = child("polite")
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0 and out.startswith("asked") and err.count("saving after this step") == 1


def test_a_signal_to_a_forked_child_is_not_its_parents():
    with stop_on_signals() as stop:
        pid = os.fork()
        if not pid:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        os.waitpid(pid, 0)
        time.sleep(0.1)
        assert stop.signal is None


def test_a_child_that_lives_on_does_not_hold_its_parent_back():
    with stop_on_signals():
        pid = os.fork()
        if not pid:
            time.sleep(60)
            os._exit(0)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the child still lives"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_handlers_come_back_and_threads_do_without():
    before = signal.getsignal(signal.SIGINT)
    running = threading.active_count()
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.signal == signal.SIGINT and signal.getsignal(signal.SIGINT) is before
    assert signal.set_wakeup_fd(-1) == -1 and threading.active_count() == running
    caught = []

    def inside():
        with stop_on_signals() as stop:
            caught.append(stop.signal)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert caught == [None]
