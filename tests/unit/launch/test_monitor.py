"""`flagdit status`: what is told of a run, by its folder and by what SLURM knows."""

import fcntl
import json

import pytest
from rich.console import Console

from flagdit.config.load import load_recipe, save_recipe
from flagdit.errors import LaunchError
from flagdit.launch import monitor, scheduler
from flagdit.launch.monitor import all_runs, log_files, status_of, table_of


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function: a run folder after so many of 1000 steps, with a job that SLURM knows as the facts say."""

    def make(name="a", *, step=100, facts=None, event=None, stopped=False):
        folder = tmp_path / name
        (folder / "slurm").mkdir(parents=True)
        (folder / "logs").mkdir()
        (folder / "checkpoints" / "step_00000050").mkdir(parents=True)
        save_recipe(load_recipe("quickstart", ["train.steps=1000"]), folder / "recipe.yaml")
        lines = [{"step": n, "seconds": 2.0 * n, "tokens_per_s": 50.0 * n} for n in range(10, step + 1, 10)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if facts is not None:
            (folder / "slurm" / "jobs.jsonl").write_text('{"job": "7"}\n')
        if event:
            (folder / "slurm" / "events.jsonl").write_text(json.dumps({"event": event}) + "\n")
        if stopped:
            (folder / "slurm" / "stop").touch()
        monkeypatch.setattr(scheduler, "there", lambda: True)
        monkeypatch.setattr(scheduler, "job", lambda number: facts)
        return folder

    return make


def test_a_running_job(run):
    facts = {"JobState": "RUNNING", "NodeList": "node[1-2]", "Restarts": "3"}
    status = status_of(run(facts=facts))
    assert (status.state, status.nodes, status.restarts, status.job) == ("RUNNING", "node[1-2]", 3, "7")
    assert (status.step, status.steps, status.checkpoint, status.tokens_per_s) == (100, 1000, 50, 5000)
    assert status.eta == pytest.approx(1800) and status.error is None


@pytest.mark.parametrize(
    ("given", "state"),
    [
        ({}, "no job"),
        ({"step": 1000}, "finished"),
        ({"stopped": True}, "stopped"),
        ({"facts": {"JobState": "COMPLETED"}, "stopped": True}, "stopped"),
        ({"facts": {"JobState": "RUNNING"}, "stopped": True}, "RUNNING"),
        ({"facts": {"JobState": "PENDING", "Reason": "Priority"}}, "PENDING (Priority)"),
        ({"facts": {"JobState": "FAILED"}}, "FAILED"),
        ({"facts": {}, "event": "gave up"}, "gave up"),
        ({"facts": {}, "event": "start"}, "UNKNOWN"),
    ],
)
def test_states(run, given, state):
    assert status_of(run(**given)).state == state


def test_a_checkpoint_past_the_last_metrics_counts(run):
    folder = run()
    (folder / "checkpoints" / "step_00000107").mkdir()
    assert status_of(folder).step == status_of(folder).checkpoint == 107


def test_a_run_that_trains_here_is_told_by_its_lock(run):
    folder = run()
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert status_of(folder).state == "training here"
    assert status_of(folder).state == "no job"


def test_the_table_fits_a_terminal_and_errors_stand_below_it(run, tmp_path):
    folder = run("quickstart", facts={"JobState": "FAILED", "NodeList": "node[1-2]"})
    (folder / "logs" / "rank_1.log").write_text("step 100\nerror: the disk is full\nbye\n")
    console = Console(record=True, width=80)
    console.print(table_of(all_runs(tmp_path)))
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert lines[0].split() == ["run", "job", "state", "nodes", "restarts", "step", "tokens/s", "saved", "left"]
    assert lines[1].split() == ["quickstart", "7", "FAILED", "node[1-2]", "0", "100/1000", "5,000", "50", "30m"]
    assert lines[2:] == ["", "quickstart: rank_1.log: error: the disk is full"]


def test_times_left():
    assert [monitor._duration(s) for s in (50, 600, 5400, 100_000)] == ["1m", "10m", "1h30m", "1d03h"]


def test_logs_of_ranks_are_those_of_their_nodes_where_torchrun_started_them(run):
    folder = run()
    (folder / "logs" / "node_1.log").touch()
    with pytest.raises(LaunchError, match=r"there is no rank_3\.log\. There are node_1\.log"):
        log_files(folder, 3)
    keys = ["cluster.launcher=torchrun", "cluster.ranks_per_node=2"]
    save_recipe(load_recipe("quickstart", keys), folder / "slurm" / "recipe.yaml")
    assert log_files(folder, 3) == log_files(folder, 2) == [folder / "logs" / "node_1.log"]
    (folder / "logs" / "rank_3.log").touch()
    assert log_files(folder, 3) == [folder / "logs" / "rank_3.log"]


def test_no_run_is_told(tmp_path):
    with pytest.raises(LaunchError, match="there is no run in"):
        status_of(tmp_path)
