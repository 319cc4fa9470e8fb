"""Checks of a node, with the answers of tools in the tools' place."""

import json
import subprocess
import sys

import pytest

from flagdit.launch import health
from flagdit.launch.health import bad_nodes, faults_of_clock, faults_of_command, faults_of_disk, faults_of_gpus

GOOD = "".join(f"{i}, 81559, 0\n" for i in range(8))


@pytest.mark.parametrize(
    ("wanted", "listing", "told"),
    [
        (8, GOOD, []),
        (0, None, []),
        (8, GOOD.replace(", 0\n", ", [N/A]\n"), []),
        (8, None, ["nvidia-smi does not answer, 8 GPUs are expected"]),
        (8, "".join(GOOD.splitlines(True)[:7]), ["7 GPUs of 8"]),
        (8, GOOD.replace("3, 81559", "3, 40960"), ["GPU 3 has 40960 MiB, others 81559"]),
        (8, GOOD.replace("5, 81559, 0", "5, 81559, 2"), ["GPU 5 has 2 uncorrected memory errors"]),
    ],
)
def test_gpus(wanted, listing, told):
    assert list(faults_of_gpus(wanted, listing)) == told


def test_disk(tmp_path):
    assert list(faults_of_disk(tmp_path / "new", 0)) == []
    assert "GB free, 1e+06 are wanted" in next(faults_of_disk(tmp_path, 1e6))
    (tmp_path / "file").touch()
    assert "cannot be written" in next(faults_of_disk(tmp_path / "file" / "x", 0))


def test_clock(tmp_path, monkeypatch):
    assert list(faults_of_clock(tmp_path)) == []
    now = health.time.time()
    monkeypatch.setattr(health.time, "time", lambda: now - 60)
    assert "60 seconds off" in next(faults_of_clock(tmp_path))


def test_command():
    assert list(faults_of_command(None)) == list(faults_of_command("true")) == []
    assert list(faults_of_command("echo fan broken >&2; exit 3")) == [
        "cluster.health_command ended with exit code 3: fan broken"
    ]


def test_the_faulty_are_blamed_before_the_silent(tmp_path):
    def says(node, *faults):
        (tmp_path / f"{node}.json").write_text(json.dumps({"node": node, "faults": faults}))

    nodes = ["a", "b", "c"]
    says("a")
    says("b")
    assert bad_nodes(tmp_path, nodes) == ["c"]
    says("b", "7 GPUs of 8")
    assert bad_nodes(tmp_path, nodes) == ["b"]
    says("b")
    says("c")
    assert bad_nodes(tmp_path, nodes) == []


def two_nodes(tmp_path, *extra):
    """Two processes that believe to be a job of two nodes."""
    from flagdit.launch.local import free_port

    port = str(free_port())
    base = {"SLURM_NTASKS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PATH": "/usr/bin:/bin"}
    line = [sys.executable, "-m", "flagdit.launch.health", "--folder", str(tmp_path), "--min-disk", "0", *extra]
    nodes = [
        subprocess.Popen(
            line,
            env={**base, "SLURM_PROCID": str(i), "SLURMD_NODENAME": f"node{i}"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    return [(node.communicate(timeout=120)[1], node.returncode) for node in nodes]


def test_nodes_sum_together(tmp_path):
    assert [code for _, code in two_nodes(tmp_path / "good")] == [0, 0]
    slow = two_nodes(tmp_path / "slow", "--min-bandwidth", "1e6")
    assert [code for _, code in slow] == [1, 1] and "GB/s, 1e+06 are wanted" in slow[0][0]


def test_one_bad_node_does_not_make_the_other_wait(tmp_path):
    said = two_nodes(tmp_path, "--command", 'test "$SLURMD_NODENAME" = node0')
    assert [code for _, code in said] == [0, 1] and "node1: cluster.health_command" in said[1][0]
    assert bad_nodes(tmp_path, ["node0", "node1"]) == ["node1"]
