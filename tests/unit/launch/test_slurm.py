"""Scripts for three clusters, as files to read; shellcheck; what is refused before submission."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flagdit.config.load import load_recipe
from flagdit.config.validate_cluster import cluster_problems, seconds_of
from flagdit.errors import LaunchError, RecipeError
from flagdit.launch import scheduler, slurm
from flagdit.launch.slurm import launch_encoding, launch_training, render_encoding, render_training

GOLDENS = Path(__file__).parents[2] / "goldens" / "slurm"
RUN = Path("/shared/runs/big")
BIG = ["name=big", "model.num_heads=8", "data.batch_size=512", "parallel.tensor=4"]
CLUSTERS = {
    "h100_ib": ["cluster.account=vision", "cluster.nodes=8"],
    "p5_efa": ["cluster.nodes=4", "cluster.launcher=torchrun", "cluster.exclude=p5-[3,7]", "cluster.chain=3"],
    "a100_modules": [
        "cluster.account=u1234",
        "cluster.nodes=2",
        "cluster.reservation=friday",
        "cluster.comment=the big one",
        "cluster.dependency=afterok:41",
        "cluster.logs=/shared/logs",
        "cluster.health_command=dcgmi health -c",
    ],
}


def recipe_of(name: str, *overrides: str):
    return load_recipe("quickstart", [*BIG, *CLUSTERS[name], *overrides], [f"clusters/{name}"])


def portable(script: str) -> str:
    return script.replace(sys.executable, "PYTHON").replace(str(Path.cwd()), "/work-folder")


def scripts() -> dict[str, str]:
    found = {name: render_training(slurm.checked(recipe_of(name)), RUN) for name in CLUSTERS}
    sources = [Path("/raw/part 0"), Path("/raw/part-1")]
    return {**found, "encode": render_encoding(recipe_of("a100_modules"), sources, Path("/shared/encoded"))}


@pytest.mark.parametrize("name", [*CLUSTERS, "encode"])
def test_scripts_are_as_they_were_read_by_a_person(name):
    file = GOLDENS / f"{name}.sh"
    script = portable(scripts()[name])
    if os.environ.get("REWRITE_GOLDENS"):
        file.write_text(script)
    assert script == file.read_text(), "REWRITE_GOLDENS=1 writes them anew; read the difference"


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="shellcheck is not installed: apt-get install shellcheck"
)
@pytest.mark.parametrize("name", [*CLUSTERS, "encode"])
def test_scripts_pass_shellcheck(name, tmp_path):
    (tmp_path / "job.sh").write_text(scripts()[name])
    done = subprocess.run(["shellcheck", tmp_path / "job.sh"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert subprocess.run(["bash", "-n", tmp_path / "job.sh"]).returncode == 0


MISTAKES = {
    # key that the message must name → overrides that are wrong
    "cluster.partition": [["cluster.partition=gpus"], ["cluster.partition=g p u"], ["cluster.partition=''"]],
    "cluster.time": [
        ["cluster.time=3-00:00:00"],
        ["cluster.partition=gpu-short", "cluster.time=08:00:00"],
        ["cluster.time=tomorrow"],
        ["cluster.time=1:2:3:4"],
        ["cluster.time=0"],
        ["cluster.time=01:99:00"],
        ["cluster.time=-5"],
    ],
    "cluster.signal": [["cluster.signal=28800"], ["cluster.signal=0"], ["cluster.signal=soon"]],
    "cluster.account": [["cluster.account=???"], ["cluster.account=my account"], ["cluster.account=a;b"]],
    "cluster.qos": [["cluster.qos=high prio"]],
    "cluster.reservation": [["cluster.reservation='a b'"]],
    "cluster.gpu_type": [["cluster.gpu_type=a 100"], ["cluster.gpus_per_node=0"]],
    "cluster.memory": [["cluster.memory=lots"], ["cluster.memory=240 GB"], ["cluster.memory=-1"]],
    "cluster.nodes": [
        ["cluster.nodes=0"],
        ["cluster.nodes=3", "parallel.context=2", "parallel.tensor=4"],
        ["cluster.nodes=two"],
        ["cluster.nodes=1", "parallel.context=4", "parallel.tensor=2"],
    ],
    "cluster.gpus_per_node": [["cluster.gpus_per_node=-1"], ["cluster.gpus_per_node=0", "train.device=cuda"]],
    "cluster.ranks_per_node": [["cluster.ranks_per_node=8"], ["cluster.ranks_per_node=0"]],
    "cluster.cpus_per_rank": [["cluster.cpus_per_rank=0"]],
    "parallel.tensor": [["parallel.tensor=3"], ["parallel.tensor=8"], ["parallel.tensor=16"]],
    "parallel.ring": [["parallel.tensor=1", "parallel.context=8", "parallel.ring=3"]],
    "parallel.context": [["parallel.tensor=1", "parallel.context=16"], ["parallel.context=3"]],
    "data.batch_size": [["data.batch_size=7"], ["train.accumulation=3", "data.batch_size=512"]],
    "cluster.constraint": [["cluster.constraint=a100; rm"]],
    "cluster.exclude": [["cluster.exclude=node 3"], ["cluster.exclude=node[3"]],
    "cluster.dependency": [["cluster.dependency=later"], ["cluster.dependency=singleton", "cluster.chain=2"]],
    "cluster.chain": [["cluster.chain=0"]],
    "cluster.restarts": [["cluster.restarts=-1"]],
    "cluster.modules": [["cluster.modules=[cuda 12]"], ["cluster.modules=['a;b']"]],
    "cluster.container": [["cluster.container=/a.sqsh", "cluster.venv=/venv"]],
    "cluster.mounts": [["cluster.mounts=[/a:/b]"], ["cluster.container=/a.sqsh", "cluster.mounts=[/a]"]],
    "cluster.environment": [
        ["cluster.environment={1X: a}"],
        ["cluster.environment={RANK: '0'}"],
        ["cluster.environment=NCCL_DEBUG"],
    ],
    "cluster.network": [["cluster.network=infiniband"]],
    "cluster.launcher": [["cluster.launcher=mpirun"]],
    "cluster.cache": [["cluster.cache=relative/path"]],
    "cluster.comment": [['cluster.comment=a "quoted" word']],
    "cluster.min_disk": [["cluster.min_disk=-1"]],
    "cluster.account?": [["cluster.acount=u1"]],
    "name": [["name=a b"], ["name=a/b"]],
    "model.num_heads": [["model.num_heads=6", "model.dim=132"], ["model.num_heads=5"]],
}
CASES = [(key, overrides) for key, several in MISTAKES.items() for overrides in several]


def test_there_are_fifty_seeded_mistakes():
    assert len(CASES) >= 50


@pytest.mark.parametrize(("key", "overrides"), CASES, ids=lambda x: " ".join(x) if isinstance(x, list) else x)
def test_mistakes_are_caught_before_submission_and_name_their_key(key, overrides, monkeypatch):
    from dataclasses import replace

    from flagdit.model.sizes import resolve
    from flagdit.parallel.mesh import check_mesh

    monkeypatch.setattr(slurm, "live_partitions", lambda: None)
    monkeypatch.setattr(slurm, "submit_script", lambda *args: pytest.fail("it was submitted"))
    monkeypatch.setattr(slurm, "there", lambda: True)

    def check(recipe, ranks):
        check_mesh(replace(recipe, model=resolve(recipe.model)), ranks)

    base = [*BIG, *CLUSTERS["a100_modules"]]
    with pytest.raises(RecipeError) as caught:
        launch_training(
            "quickstart", [*base, *overrides], ["clusters/a100_modules"], check=check, submit=True, tell=print
        )
    assert key.rstrip("?") in str(caught.value)


def test_partitions_come_from_the_cluster_where_the_recipe_names_none():
    recipe = load_recipe("quickstart", ["cluster.partition=main", "cluster.time=02:00:00"])
    assert cluster_problems(recipe) == []
    assert "did you mean main2" in cluster_problems(recipe, {"main2": "infinite"})[0].text
    assert "allows, 1:00:00" in cluster_problems(recipe, {"main": "1:00:00"})[0].text
    assert cluster_problems(recipe, {"main": "infinite"}) == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("02:00:00", 7200), ("1-0", 86400), ("1-12:30", 131400), ("2-01:02:03", 176523)],
)
def test_slurms_times(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "x", "1:60", "00:61:00", "1-", "infinite"])
def test_not_slurms_times(text):
    assert seconds_of(text) is None


def test_submission_freezes_the_recipe_and_clears_what_an_earlier_job_left(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "live_partitions", lambda: None)
    monkeypatch.setattr(slurm, "there", lambda: True)
    jobs = iter(["41", "42"])
    monkeypatch.setattr(slurm, "submit_script", lambda script, file: file.write_text(script) and next(jobs))
    state = tmp_path / "x" / "slurm"
    state.mkdir(parents=True)
    (state / "stop").touch()
    overrides = [f"run_dir={tmp_path}", "name=x", "cluster.chain=2", "train.steps=7", "optimizer.warmup_steps=1"]
    overrides += ["optimizer.schedule=constant", "optimizer.decay_steps=0"]
    told = []
    assert launch_training("quickstart", overrides, submit=True, tell=told.append) == "42"
    assert load_recipe(state / "recipe.yaml").train.steps == 7 and not (state / "stop").exists()
    assert (state / "jobs.jsonl").read_text().count('"job"') == 2 and "job 42" in told[-1]
    assert "--dependency=singleton" in (state / "job.sh").read_text()


def test_a_run_with_a_job_gets_no_second_one_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "live_partitions", lambda: None)
    monkeypatch.setattr(scheduler, "there", lambda: True)
    monkeypatch.setattr(slurm, "there", lambda: True)
    jobs = iter(["41", "42"])
    monkeypatch.setattr(slurm, "submit_script", lambda script, file: next(jobs))
    states = {"41": {"JobState": "RUNNING"}}
    monkeypatch.setattr(scheduler, "job", lambda number: states.get(number, {}))
    overrides = [f"run_dir={tmp_path}"]
    assert launch_training("quickstart", overrides, submit=True, tell=print) == "41"
    with pytest.raises(LaunchError, match=r"in the queue already: 41 \(RUNNING\).*flagdit stop .*afterany:41"):
        launch_training("quickstart", overrides, submit=True, tell=print)
    behind = [*overrides, "cluster.dependency=afterany:41"]
    assert launch_training("quickstart", behind, submit=True, tell=print) == "42"
    states["41"] = {"JobState": "COMPLETED"}
    jobs = iter(["43"])
    assert launch_training("quickstart", overrides, submit=True, tell=print) == "43"


def test_a_refusal_of_slurm_is_told_in_its_words(tmp_path, monkeypatch):
    def refuses(arguments):
        assert arguments[:2] == ["sbatch", "--test-only"]
        return subprocess.CompletedProcess(arguments, 1, "", "sbatch: error: allocation failure: Invalid account\n")

    monkeypatch.setattr(slurm, "command", refuses)
    with pytest.raises(LaunchError, match="SLURM refuses the job: Invalid account"):
        slurm.submit_script("#!/bin/sh\n", tmp_path / "job.sh")


def test_without_slurm_the_script_can_be_read_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(slurm, "there", lambda: False)
    monkeypatch.setattr(slurm, "live_partitions", lambda: None)
    overrides = [f"run_dir={tmp_path}/runs"]
    launch_training("quickstart", overrides, submit=False, tell=print)
    assert capsys.readouterr().out.startswith("#!/usr/bin/env bash\n#SBATCH --job-name=quickstart\n")
    with pytest.raises(LaunchError, match="no sbatch"):
        launch_training("quickstart", overrides, submit=True, tell=print)
    assert list(tmp_path.iterdir()) == []


def test_encoding_wants_data_sets(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "live_partitions", lambda: None)
    with pytest.raises(LaunchError, match="no data set is in"):
        launch_encoding("quickstart", [], [], [tmp_path / "a"], tmp_path, submit=False, tell=print)
    with pytest.raises(LaunchError, match="different folder names"):
        launch_encoding(
            "quickstart", [], [], [tmp_path / "a", tmp_path / "b" / "a"], tmp_path, submit=False, tell=print
        )
