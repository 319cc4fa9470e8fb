"""Progress off a terminal: plain lines, no control characters."""

import pytest

from flagdit.data_pipelines import progress as module
from flagdit.data_pipelines.progress import progress


def test_plain_lines(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", -1.0)
    with progress("encoding x", 3) as advance:
        advance(1)
        advance(2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("encoding x: 1 of 3, about ") and lines[2].startswith("encoding x: 3 of 3 samples in ")
    assert not any("\x1b" in line or "\r" in line for line in lines)


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    with progress("encoding x", 2) as advance:
        advance(2)
    assert "encoding x: 2 of 2 samples" in capsys.readouterr().out


def test_more_than_was_announced(capsys: pytest.CaptureFixture):
    with progress("building x", 3) as advance:
        advance(7)
    assert "building x: 7 samples in " in capsys.readouterr().out
