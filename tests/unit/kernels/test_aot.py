"""The ahead-of-time gate: every kernel that ships, compiled for GPUs that are not here, spills nothing and moves 128
bits at a time.

Results stand in aot.json by content. What changed is compiled here; rewrite the file with

    python -m flagdit.kernels.aot --record tests/unit/kernels/aot.json --update
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flagdit.kernels.aot import TARGETS, Compiled, unique_launches
from flagdit.kernels.shipped import SHAPES, Shape
from flagdit.model.sizes import SIZES

pytest.importorskip("triton", reason="Triton exists on Linux only")
RECORD = Path(__file__).with_name("aot.json")
GOOD = Compiled(registers=64, spilled=0, shared=0, reads={128: 4}, writes={128: 2, 32: 1}, instructions=300)


def gate(*arguments: str) -> subprocess.CompletedProcess:
    """The command, in a process whose kernels are compiled and not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "flagdit.kernels.aot", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)


def test_everything_that_ships_passes_on_every_target():
    """Compiles some anew, recorded or not, so that the record cannot say what is not so."""
    result = gate("--record", str(RECORD), "--fresh", "norm forward, 7b bf16")
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("128 bits at a time\n")


def test_the_record_has_every_operation_on_every_target():
    rows = json.loads(RECORD.read_text())
    assert all(set(row) == set(TARGETS) for row in rows.values())
    kinds = {name.split(" ")[0] for name in rows}
    assert {"rms_norm_modulate", "gated_residual_norm", "qk_norm_rope", "layer_norm_rope", "rope", "swiglu"} < kinds


def test_a_record_that_is_not_so_is_found(tmp_path):
    rows = json.loads(RECORD.read_text())
    name = "rope forward, 7b bf16"
    rows[name]["sm_90"]["registers"] += 1
    rows["rope backward"] = {}
    forged = tmp_path / "aot.json"
    forged.write_text(json.dumps(rows))
    result = gate("--record", str(forged), "--only", name, "--fresh", name, "--targets", "sm_90")
    assert result.returncode == 1
    assert "the record says" in result.stdout and "recorded but not shipped: rope backward" in result.stdout


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"spilled": 8}, "8 spills"),
        ({"reads": {64: 4}}, "no 128-bit reads"),
        ({"writes": {}}, "no 128-bit writes"),
        ({"writes": {128: 4, 16: 8}}, "16-bit writes"),
    ],
)
def test_what_the_gate_objects_to(change, fault):
    assert replace(GOOD, **change).faults("some_kernel") == ([] if fault is None else [fault])


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")
def test_interpreted_kernels_are_refused():
    with pytest.raises(AssertionError, match="TRITON_INTERPRET"):
        next(unique_launches())


def test_what_ships_are_the_named_sizes():
    published = [size for name, size in SIZES.items() if name not in ("tiny", "small")]
    wanted = {Shape(s.block, s.dim, s.num_heads, s.num_kv_heads, s.ffn_dim) for s in published}
    assert set(SHAPES.values()) == wanted
