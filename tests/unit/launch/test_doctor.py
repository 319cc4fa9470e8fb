"""The doctor: a line for each thing, and a way to mend what is wrong."""

import errno
import os

import pytest
from rich.console import Console

from flagdit.launch import doctor
from flagdit.launch.doctor import examine, table_of

BACKENDS = {"varlen": "needs a GPU", "sdpa": None}


@pytest.fixture
def found(tmp_path):
    return lambda: {finding.what: finding for finding in examine(tmp_path / "runs", lambda: BACKENDS)}


def test_a_sound_machine(found, tmp_path):
    findings = found()
    assert findings["python"].state == findings["torch"].state == findings["attention"].state == "ok"
    assert "sdpa (not varlen: needs a GPU)" in findings["attention"].value
    assert "MB/s" in findings["file system"].value and not (tmp_path / "runs").exists()
    console = Console(record=True, width=200)
    console.print(table_of(list(findings.values())))
    assert "torch" in console.export_text()


def test_what_is_wrong_is_told_with_its_remedy(found, monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    monkeypatch.setattr(doctor, "nvidia_smi", lambda: "0, 81559, 0\n1, 81559, 0\n")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    findings = found()
    assert findings["no-such-package"].state == "bad" and "pip install" in findings["no-such-package"].fix
    assert findings["GPUs"].state == "bad" and "2 in the driver" in findings["GPUs"].value
    assert findings["C++ compiler"].state == "warn" and "apt-get install g++" in findings["C++ compiler"].fix


def test_a_full_disk_is_bad_news_not_a_traceback(found, monkeypatch):
    def full(**options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", full)
    assert found()["file system"].state == "bad" and "No space left" in found()["file system"].value
