"""The first signal asks, the second leaves; in a process of its own."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from flagdit.train.signals import stop_on_signals

CHILD = """
import sys, time
from flagdit.train.signals import stop_on_signals
with stop_on_signals() as stop:
    print("ready", flush=True)
    while stop.signal is None:
        time.sleep(0.01)
    print("asked", stop.signal, flush=True)
    if sys.argv[1] == "stubborn":
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


def test_handlers_come_back_and_threads_do_without():
    before = signal.getsignal(signal.SIGINT)
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.signal == signal.SIGINT and signal.getsignal(signal.SIGINT) is before
    caught = []

    def inside():
        with stop_on_signals() as stop:
            caught.append(stop.signal)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert caught == [None]
