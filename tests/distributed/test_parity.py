"""Every mesh of two and four ranks gives the numbers of one process. The table is printed after the tests."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "parity.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "how", "least"),
    [(2, [], 61), (4, ["--brief"], 58), pytest.param(4, [], 100, marks=pytest.mark.long)],
    ids=["two ranks", "four ranks, briefly", "four ranks"],
)
def test_every_mesh_equals_one_process(ranks, how, least, record_property):
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--ranks", str(ranks), *how],
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    lines = done.stdout.rstrip().splitlines()
    assert done.returncode in (0, 1) and lines, done.stderr[-4000:]
    record_property("table", "\n".join([f"parity with one process, {ranks} ranks", *lines[:-1]]))
    figures = json.loads(lines[-1])
    wrong = [line for line in lines if "too large" in line]
    assert done.returncode == 0 and not figures["failed"], "\n".join(wrong)
    assert figures["cases"] >= least
    assert figures["worst_loss"] <= 1e-6 and figures["worst_grad"] <= 1e-5 and figures["worst_state"] <= 1e-5
