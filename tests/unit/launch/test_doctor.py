"""The doctor: a line for each thing, and a way to mend what is wrong."""

import errno
import os

import pytest
from rich.console import Console

from flagdit.launch import doctor
from flagdit.launch.doctor import Finding, examine, table_of, verdict

BACKENDS = {"flash2": "needs a GPU", "varlen": "needs a GPU", "sdpa": None}


@pytest.fixture
def found(tmp_path):
    return lambda: {finding.what: finding for finding in examine(tmp_path / "runs", lambda: BACKENDS)}


def test_a_sound_machine(found, tmp_path):
    findings = found()
    assert findings["python"].state == findings["torch"].state == findings["attention"].state == "ok"
    assert findings["attention"].value == "sdpa; not flash2, varlen: needs a GPU"
    assert findings["flagdit"].value.startswith("0.1.0, ") and findings["flash-attn"].state == "none"
    assert "MB/s" in findings["file system"].value and not (tmp_path / "runs").exists()
    console = Console(record=True, width=200)
    console.print(table_of(list(findings.values())))
    assert "torch" in console.export_text()


def test_what_is_wrong_is_told_with_its_remedy(found, monkeypatch):
    wanted = ["torch>=2", "no-such-package==1.5", "rich>=999", "numpy>=1", "nothing; extra == 'gpu'"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: wanted)
    monkeypatch.setattr(doctor, "nvidia_smi", lambda: "0, 81559, 0\n1, 81559, 0\n")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    findings = found()
    assert findings["no-such-package"].state == "bad"
    assert findings["no-such-package"].fix == "pip install 'no-such-package==1.5'"
    assert findings["rich"].state == "bad" and findings["rich"].value.endswith("but >=999 is needed")
    assert "numpy" not in findings and "nothing" not in findings, "what is well is not told, nor what was not asked for"
    assert findings["GPUs"].state == "bad" and "2 in the driver" in findings["GPUs"].value
    assert findings["C++ compiler"].state == "warn" and "apt-get install g++" in findings["C++ compiler"].fix


def test_slurm_without_an_answer_is_told(found, monkeypatch):
    monkeypatch.setattr(doctor.scheduler, "there", lambda: True)
    monkeypatch.setattr(doctor.scheduler, "live_partitions", lambda: None)
    assert found()["SLURM"].state == "warn" and "scontrol ping" in found()["SLURM"].fix
    monkeypatch.setattr(doctor.scheduler, "live_partitions", lambda: {"main": "1-00:00:00", "high": "infinite"})
    assert found()["SLURM"].value == "main (longest job: 1-00:00:00), high (longest job: infinite)"


def test_the_verdict_counts():
    ok, warn, bad = Finding("a", ""), Finding("b", "", "warn"), Finding("c", "", "bad")
    assert verdict([ok]) == "nothing is wrong"
    assert verdict([ok, warn, bad, bad]) == "2 wrong, 1 to look at"


def test_a_full_disk_is_bad_news_not_a_traceback(found, monkeypatch):
    def full(**options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", full)
    assert found()["file system"].state == "bad" and "No space left" in found()["file system"].value
