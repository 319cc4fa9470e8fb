"""A sample whose tokens lie on four ranks equals that of one process: in minutes at 131,072 tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "long_sample.py"


@pytest.mark.parametrize("rows", [8, pytest.param(256, marks=pytest.mark.long)])
def test_a_long_sample_on_four_ranks_equals_one_process(rows):
    command = [sys.executable, str(BENCHMARK), "--rows", str(rows)]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARK.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["tokens"] == rows * 512 and figures["ranks"] == 4
    assert figures["largest_difference"] <= 1e-4 and figures["deviation"] > 0.05
