"""The progress bar and its plain twin."""

import io
import re

import pytest
from rich.console import Console

from flagdit.train.display import Clock, PlainDisplay, TerminalDisplay, display_for, duration, quantity, summary

LINE = {
    "step": 20,
    "loss": 0.51239,
    "grad_norm": 1.234,
    "tokens_per_s": 12345.0,
    "samples_per_s": 99.9,
    "mfu": None,
    "bad_steps": 0,
}


def test_plain_lines_outside_a_terminal(capsys):
    display = display_for(io.StringIO())
    assert isinstance(display, PlainDisplay)
    display.start(0, 100)
    display.advance(20)
    display.metrics(LINE)
    display.note("[note] with brackets")
    display.stop()
    out = capsys.readouterr().out
    assert out.startswith("step 20/100  loss 0.5124  grad 1.23  12.3k tokens/s  99.9 samples/s  left ")
    assert out.endswith("[note] with brackets\n") and "\x1b" not in out


@pytest.mark.parametrize("width", [80, 120])
def test_bar_fits_the_terminal(width):
    stream = io.StringIO()
    display = TerminalDisplay(Console(file=stream, force_terminal=True, width=width))
    display.start(0, 1000)
    display.advance(20)
    display.metrics({**LINE, "mfu": 0.417, "bad_steps": 3})
    display.note("step 20  checkpoint [1/2] saved")
    display.stop()
    text = stream.getvalue()
    assert "checkpoint [1/2] saved" in text and "loss 0.5124" in text
    drawn = re.split(r"\r|\n", re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", text))
    bar = [line for line in drawn if line.startswith("train")][-1].rstrip()
    assert "train" in bar and "20/1000" in bar and "left" in bar and "loss 0.5124" in bar
    assert len(bar) <= width and ("MFU 41.7%  bad steps 3" in bar) == (width == 120)


def test_summary_tells_mfu_and_bad_steps_where_there_are_some():
    assert "MFU" not in summary(LINE) and "bad" not in summary(LINE)
    assert summary({**LINE, "mfu": 0.417, "bad_steps": 3}).endswith("MFU 41.7%  bad steps 3")
    assert summary({**LINE, "loss": None, "grad_norm": None}).startswith("all steps skipped")


def test_time_left_is_this_process_own_pace():
    now = iter([0.0, 30.0])
    clock = Clock(lambda: next(now))
    clock.start(100, 400)  # continued at 100
    assert clock.left(100) == "?"
    assert clock.left(110) == "14m30s"  # 3 s a step, 290 to go


@pytest.mark.parametrize(("x", "text"), [(0.5, "0.5"), (999, "999"), (12345, "12.3k"), (7.29e9, "7.29G"), (2e6, "2M")])
def test_quantity(x, text):
    assert quantity(x) == text


@pytest.mark.parametrize(("s", "text"), [(4.6, "5s"), (65, "1m05s"), (3725, "1h02m"), (2 * 86400 + 3600 * 5, "2d05h")])
def test_duration(s, text):
    assert duration(s) == text
