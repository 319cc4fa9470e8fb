"""Settings of the whole test run."""

import os
import tempfile
from pathlib import Path

import pytest

# Triton decides when a kernel is defined whether it runs in the interpreter, so this stands before all imports of ours.
# On a machine with a GPU, kernels are tested on it instead.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def memory_disk():
    """A folder in memory, where there is one: what writes thousands of files durably need not wait for a real disk."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as folder:
        yield Path(folder)


def pytest_terminal_summary(terminalreporter):
    """Prints the tables that tests recorded with record_property("table", text), whichever worker ran them."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    for report in reports:
        for name, text in getattr(report, "user_properties", ()) if getattr(report, "when", "") == "call" else ():
            if name == "table":
                terminalreporter.write_line("")
                terminalreporter.write_line(text)
