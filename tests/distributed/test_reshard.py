"""What one mesh saves, every other loads bit by bit, continues from, and exports alike. The table is printed after the
tests."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "reshard.py"
SOME = "TP2 DP1 ZeRO 1,DP2 ZeRO 1,DP2 ZeRO 3"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("places", "pairs"), [(SOME, 16), pytest.param("", 256, marks=pytest.mark.long)], ids=["two ranks", "all"]
)
def test_every_mesh_loads_what_every_mesh_saved(places, pairs, record_property):
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--places", places],
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    lines = done.stdout.rstrip().splitlines()
    assert done.returncode in (0, 1) and lines, done.stderr[-4000:]
    record_property("table", "\n".join(["one state from every mesh on every other", *lines[:-1]]))
    figures = json.loads(lines[-1])
    assert figures["pairs"] == pairs and figures["pairs_with_other_bits"] == 0, done.stdout
    assert figures["worst_loss"] <= 1e-6 and figures["different_exports"] == 0, done.stdout
