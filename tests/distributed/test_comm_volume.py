"""A training step sends what docs/parallelism.md says, and nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "comm_volume.py"


@pytest.mark.long
def test_two_ranks_send_what_the_formula_says():
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--worlds", "2", "--only", "2 "],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    figures = json.loads(done.stdout.rstrip().splitlines()[-1])
    assert figures["meshes"] >= 6 and figures["unexpected_calls"] == 0 and figures["largest_byte_error"] <= 0.01
