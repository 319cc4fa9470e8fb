"""Metric lines, rates and peaks."""

import dataclasses
import json
import math

import pytest
import torch

from flagdit.train.metrics import Meter, StepResult, peak_tflops

STEP = StepResult(step=1, loss=2.0, grad_norm=1.0, lr=0.1, samples=4, tokens=40, flops=3e12, seconds=0.5)


def test_line_holds_means_rates_and_totals():
    meter = Meter(peak_tflops=10.0)
    meter.add(STEP, 1.0)
    second = dataclasses.replace(STEP, step=2, loss=4.0, grad_norm=3.0, lr=0.2, seconds=1.5)
    meter.add(second, 2.0)
    line = meter.line(second, bad_steps=0)
    assert line == {
        "step": 2,
        "loss": 3.0,
        "grad_norm": 2.0,
        "lr": 0.2,
        "tokens": 80,
        "samples": 8,
        "tokens_per_s": 40.0,
        "samples_per_s": 4.0,
        "mfu": 0.3,
        "ema_seconds": None,
        "bad_steps": 0,
        "seconds": 3.0,
    }
    meter.add(STEP, 1.0)  # the window begins anew, the totals go on
    line = meter.line(STEP, bad_steps=0)
    assert (line["loss"], line["tokens"], line["seconds"]) == (2.0, 120, 4.0)


def test_bad_steps_stay_out_of_the_means():
    meter = Meter(None)
    bad = dataclasses.replace(STEP, loss=math.nan, grad_norm=math.inf, bad="loss is nan")
    meter.add(bad, 1.0)
    assert meter.line(bad, 1)["loss"] is None
    meter.add(STEP, 1.0)
    meter.add(bad, 1.0)
    line = meter.line(bad, 2)
    assert (line["loss"], line["grad_norm"], line["mfu"], line["bad_steps"]) == (2.0, 1.0, None, 2)
    assert json.loads(json.dumps(line, allow_nan=False)) == line


def test_a_window_continues_from_its_saved_state():
    one, two = Meter(None), Meter(None)
    one.add(dataclasses.replace(STEP, loss=0.1), 1.0)
    two.load(json.loads(json.dumps(one.state())))
    for meter in (one, two):
        meter.add(dataclasses.replace(STEP, loss=0.2), 1.0)
    assert one.line(STEP, 0) == two.line(STEP, 0)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("GTX", None),
    ],
)
def test_known_peaks(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(torch.device("cuda"), 0.0) == peak
    assert peak_tflops(torch.device("cuda"), 77.0) == 77.0


def test_a_cpu_has_no_known_peak():
    assert peak_tflops(torch.device("cpu"), 0.0) is None
    assert peak_tflops(torch.device("cpu"), 0.1) == 0.1
