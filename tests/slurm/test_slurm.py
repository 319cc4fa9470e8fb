"""Runs on a real SLURM: what interrupts them, and that nobody has to wake up.

One rank where one is enough: it starts in seconds. Runs are long enough that an interruption finds them in the middle.
"""

import json

import pytest

from flagdit.config.load import load_recipe
from flagdit.launch import monitor, scheduler
from flagdit.launch.slurm import launch_encoding, launch_training
from flagdit.train.loop import train

STEPS = 400
LONG = {"train__steps": STEPS, "checkpoint__every": 50}


def submit(file, *overrides) -> str:
    """The job's id."""
    return launch_training(str(file), list(overrides), submit=True, tell=lambda line: None)


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory, request):
    """Step → loss of the run that all others must equal, bit by bit."""
    return {}


@pytest.fixture
def reference(uninterrupted, recipe, tools):
    if not uninterrupted:
        uninterrupted |= tools.losses(train(load_recipe(recipe("whole", **LONG))))
    return uninterrupted


def test_a_job_on_two_nodes(cluster, recipe, tools, tmp_path):
    file = recipe("two", train__steps=6, cluster__nodes=2, checkpoint__every=3)
    job = submit(file)
    facts = cluster.ended(job)
    run = tmp_path / "runs" / "two"
    assert facts["JobState"] == "COMPLETED" and facts["NumNodes"] == "2", monitor.last_error(run)
    assert sorted(tools.losses(run)) == list(range(1, 7)) and tools.events(run) == ["start", "done"]
    assert {p.name for p in (run / "slurm" / "health").iterdir()} == {"node1.json", "node2.json"}
    environment = json.loads((run / "environment.jsonl").read_text().splitlines()[-1])
    assert environment["host"] == "node1" and (run / "logs" / "rank_1.log").exists()
    assert monitor.status_of(run).state == "finished"


def test_usr1_saves_and_queues_again_with_the_same_losses(cluster, recipe, tools, tmp_path, reference):
    job = submit(recipe("signalled", **LONG))
    run = tmp_path / "runs" / "signalled"
    for restart in range(2):
        cluster.wait(lambda restart=restart: len(tools.losses(run)) > 60 * (restart + 1))
        scheduler.command(["scancel", "--batch", "--signal=USR1", job])
        cluster.wait(lambda restart=restart: tools.events(run).count("start") == restart + 2)
    facts = cluster.ended(job)
    assert facts["JobState"] == "COMPLETED" and facts["Restarts"] == "2"
    assert tools.losses(run) == reference
    assert tools.events(run) == ["start", "requeue", "start", "requeue", "start", "done"]


def test_a_dead_node_is_replaced(cluster, recipe, tools, tmp_path, reference):
    job = submit(recipe("powered", **LONG))
    run = tmp_path / "runs" / "powered"
    cluster.wait(lambda: len(tools.losses(run)) > 80)
    node = scheduler.job(job)["NodeList"]
    cluster("power-off", node)
    try:
        cluster.wait(lambda: tools.events(run).count("start") == 2)
        assert cluster.ended(job)["JobState"] == "COMPLETED"
    finally:
        cluster("power-on", node)
    assert tools.losses(run) == reference


def test_a_preempted_job_comes_back(cluster, recipe, tools, tmp_path, reference):
    job = submit(recipe("preempted", cluster__partition="main", cluster__exclusive=True, **LONG))
    run = tmp_path / "runs" / "preempted"
    cluster.wait(lambda: len(tools.losses(run)) > 60)
    urgent = tmp_path / "urgent.sh"
    urgent.write_text("#!/bin/sh\nsleep 5\n")
    line = [
        "sbatch",
        "--parsable",
        "--partition=high",
        "--nodes=3",
        "--exclusive",
        f"--output={tmp_path}/urgent.out",
        str(urgent),
    ]
    other = scheduler.command(line).stdout.strip()
    cluster.ended(other)
    facts = cluster.ended(job)
    assert facts["JobState"] == "COMPLETED" and int(facts["Restarts"]) >= 1
    assert tools.losses(run) == reference


def test_restarts_are_capped(cluster, recipe, tools, tmp_path):
    job = submit(recipe("capped", cluster__restarts=1, cluster__health=False, **LONG))
    run = tmp_path / "runs" / "capped"
    for starts in (1, 2):
        cluster.wait(lambda starts=starts: tools.events(run).count("start") == starts)
        seen = len(tools.losses(run))
        cluster.wait(lambda seen=seen: len(tools.losses(run)) > seen)
        scheduler.command(["scancel", "--batch", "--signal=USR1", job])
    facts = cluster.ended(job)
    assert facts["JobState"] == "FAILED" and facts["Restarts"] == "1"
    assert tools.events(run) == ["start", "requeue", "start", "gave up"]
    assert "cluster.restarts=1" in (run / "logs" / f"slurm_{job}.out").read_text()


def test_a_users_mistake_is_not_tried_again(cluster, recipe, tools, tmp_path):
    job = submit(recipe("wrong", data__path=tmp_path / "nowhere", cluster__health=False))
    run = tmp_path / "runs" / "wrong"
    assert cluster.ended(job)["JobState"] == "FAILED" and tools.events(run) == ["start", "failed"]
    status = monitor.status_of(run)
    assert "nowhere" in status.error and status.restarts == 0


def test_a_node_that_fails_its_check_is_left_out(cluster, recipe, tools, tmp_path):
    sick = 'test "$SLURMD_NODENAME" != node1 || { echo fan broken >&2; exit 1; }'
    job = submit(recipe("sick", train__steps=4), f"cluster.health_command={sick.replace(chr(34), '')}")
    run = tmp_path / "runs" / "sick"
    facts = cluster.ended(job)
    assert facts["JobState"] == "COMPLETED" and facts["ExcNodeList"] == "node1" and facts["NodeList"] != "node1"
    assert (run / "slurm" / "bad_nodes").read_text() == "node1\n" and tools.events(run) == [
        "start",
        "requeue",
        "start",
        "done",
    ]
    assert "fan broken" in (run / "logs" / f"slurm_{job}.out").read_text()


def test_status_logs_and_stop(cluster, recipe, tools, tmp_path):
    job = submit(recipe("stopped", train__steps=100_000, checkpoint__every=1000))
    run = tmp_path / "runs" / "stopped"
    cluster.wait(lambda: len(tools.losses(run)) > 5)
    status = monitor.status_of(run)
    assert (status.state, status.job, status.steps) == ("RUNNING", job, 100_000)
    assert status.step > 0 and status.tokens_per_s > 0 and status.nodes.startswith("node")
    shown = tools.flagdit("status", "--all", "--run-dir", tmp_path / "runs").stdout
    assert "stopped" in shown and "RUNNING" in shown
    assert "loss" in tools.flagdit("logs", run, "--rank", 0).stdout
    assert "rank_7.log" in tools.flagdit("logs", run, "--rank", 7).stderr
    done = tools.flagdit("stop", run)
    assert done.returncode == 0 and "the same launch continues" in done.stdout, done.stderr
    status = monitor.status_of(run)
    assert (
        status.state == "stopped" and status.checkpoint == status.step > 5 and tools.events(run) == ["start", "stopped"]
    )
    assert "no job in the queue" in tools.flagdit("stop", run).stderr


def test_chained_jobs_run_one_after_the_other(cluster, recipe, tools, tmp_path):
    last = submit(recipe("chained", train__steps=4, cluster__chain=2, cluster__health=False))
    assert cluster.ended(last)["JobState"] == "COMPLETED"
    assert tools.events(tmp_path / "runs" / "chained") == ["start", "done"] * 2


def test_an_encoding_array(cluster, recipe, data, tmp_path):
    import shutil

    sources = []
    for name in ("a", "b"):
        shutil.copytree(data / "raw", tmp_path / name)
        sources.append(tmp_path / name)
    job = launch_encoding(str(recipe("array")), [], [], sources, tmp_path / "out", submit=True, tell=lambda line: None)
    for task in ("0", "1"):
        assert cluster.ended(f"{job}_{task}")["JobState"] == "COMPLETED"
    for name in ("a", "b"):
        assert json.loads((tmp_path / "out" / name / "dataset.json").read_text())["splits"]


def test_slurm_refuses_before_anything_is_queued(cluster, recipe):
    from flagdit.errors import LaunchError, RecipeError

    with pytest.raises(RecipeError, match=r"cluster\.partition=mian is not a partition here; did you mean main"):
        submit(recipe("refused", cluster__partition="mian"))
    with pytest.raises(LaunchError, match="SLURM refuses the job"):
        submit(recipe("refused", cluster__nodes=9, data__batch_size=9))
