"""The GPU benchmark without a GPU: every step at tiny sizes, and the arithmetic of its tables on given times."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists on Linux only")
FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, run benchmarks/gpu/run.sh itself")
MODULES = ("clock", "contestants", "kernel_times", "network_times", "measure")


def test_a_dry_run_goes_through_every_step_and_reports_no_times(tmp_path):
    out = tmp_path / "gpu.json"
    command = [FOLDER / "run.sh", "--dry-run", "--out", out]
    result = subprocess.run(
        command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    kernels = figures["kernels"]
    assert figures["copy_gb_per_s"] is None and kernels["compiled_over_fused"] is None
    assert set(kernels["times_ms"]) == set(kernels["errors"]) >= {"rms_norm_modulate", "qk_norm_rope", "swiglu"}
    assert all(t == [None, None] for one in kernels["times_ms"].values() for t in one.values())
    assert max(kernels["errors"].values()) < 1e-5
    assert {row["backend"] for row in figures["attention"]} == {"sdpa", "varlen", "flash2", "flash3", "flash4"}
    assert [row["path"] for row in figures["block"]] == ["fused", "torch", "compiled torch"]
    assert all(row["ms"] is row["mfu"] is row["peak_gb"] is None for row in figures["block"])
    assert not out.exists()


def test_without_a_gpu_and_without_dry_run_it_says_so():
    result = subprocess.run(
        [FOLDER / "run.sh"], env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, timeout=120
    )
    assert result.returncode != 0 and "torch sees no GPU here" in result.stderr


@pytest.fixture
def modules(monkeypatch):
    """The benchmark's modules, for tiny sizes and with a clock on which everything takes 2 ms."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.syspath_prepend(FOLDER.parent)
    found = {name: importlib.import_module(name) for name in MODULES}
    clock = found["clock"].Clock
    monkeypatch.setattr(clock, "milliseconds", lambda self, work, seconds=1.0: (work(), 2.0)[1])
    monkeypatch.setattr(clock, "peak_gb", lambda self, work: 1.5)
    monkeypatch.setattr(found["kernel_times"], "REAL", found["contestants"].TINY)
    yield found
    for name in (*MODULES, "_conditions"):
        sys.modules.pop(name, None)


def test_shares_of_the_copy_rate_and_goals(modules, monkeypatch, capsys):
    kernel_times = modules["kernel_times"]
    monkeypatch.setattr(kernel_times, "far_offsets", lambda *_: {"swiglu": 0.0})
    monkeypatch.setitem(kernel_times.LARGEST_ERROR, torch.bfloat16, 1.0)  # the interpreter cuts bits off
    monkeypatch.setattr(torch, "compile", lambda function, backend: function)
    monkeypatch.setattr(kernel_times.Pack, "operations", lambda self: [self.norm(), self.swiglu()])
    clock = modules["clock"].Clock(torch.device("cpu"), dry=False, budget=1e9)
    # 40 rows of 48 bf16 numbers are 3840 bytes, so two passes at 0.00384 GB/s take 2 ms: the whole of the copy rate.
    found = kernel_times.measure(clock, copy_rate=0.00384)
    assert found["goals"]["rms_norm_modulate"]["reached"] == pytest.approx([1.0, 1.5])
    assert found["goals"]["swiglu"]["reached"] == pytest.approx([1.5 * 56 / 48, 2.5 * 56 / 48])
    assert found["compiled_over_fused"] == pytest.approx(1.0)
    assert "100%" in capsys.readouterr().out


def test_wrong_kernels_end_it(modules, monkeypatch):
    kernel_times = modules["kernel_times"]
    with pytest.raises(SystemExit, match=r"WRONG RESULTS: swiglu, rope"):
        kernel_times.report_errors(
            {"errors": {"swiglu": float("nan"), "norm": 1e-3}, "errors_of_last_rows": {"rope": 0.1}}, torch.bfloat16
        )


def test_operations_without_time_left_are_named(modules, monkeypatch):
    kernel_times = modules["kernel_times"]
    monkeypatch.setattr(kernel_times, "far_offsets", lambda *_: {})
    clock = modules["clock"].Clock(torch.device("cpu"), dry=False, budget=-1)
    found = kernel_times.measure(clock, copy_rate=1.0)
    assert len(found["skipped"]) == 5 and found["compiled_over_fused"] is None
    rows = modules["network_times"].blocks(clock)
    assert {row["refusal"] for row in rows} == {"no time left"}


def test_rates_of_a_block(modules, monkeypatch):
    network_times = modules["network_times"]
    monkeypatch.setattr(network_times, "peak_tflops", lambda *_: 1e-3)
    monkeypatch.setattr(network_times, "SIZES", network_times.TINY_SIZES)
    monkeypatch.setattr(network_times, "CONFIG", network_times.TINY_CONFIG)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    clock = modules["clock"].Clock(torch.device("cpu"), dry=False, budget=1e9)
    rows = network_times.blocks(clock)
    # Multiply-adds of 8 tokens: four projections of 32², three of 32·48, attention 2·8²·32; modulation 6·32² for the
    # one sample. Two operations each, three times that with backward, in 2 ms.
    work = 8 * (4 * 32**2 + 3 * 32 * 48) + 2 * 8**2 * 32 + 6 * 32**2
    for row in rows:
        assert row["tflops"] == pytest.approx(6 * work / 2e9)
        assert row["mfu"] == pytest.approx(row["tflops"] / 1e-3) and row["peak_gb"] == 1.5
