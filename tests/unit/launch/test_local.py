"""`flagdit launch local`: what is checked before anything starts, and the ranks' environment."""

import os

import pytest

from flagdit.config.load import load_recipe
from flagdit.errors import LaunchError, RecipeError
from flagdit.launch import local
from flagdit.launch.local import check_ranks, rank_environment, train_locally, visible_gpus

FOUR = ["parallel.tensor=2", "parallel.context=2"]


@pytest.fixture
def started(monkeypatch):
    """What would have been run."""
    calls = []

    def run(argv, ranks, logs, environment, tell):
        calls.append((argv, ranks, logs, [environment(rank) for rank in range(ranks)]))
        return 0

    monkeypatch.setattr(local, "run_ranks", run)
    monkeypatch.setattr(local, "visible_gpus", lambda: 0)
    return calls


def test_every_rank_runs_the_same_command_with_torchruns_environment(started, tmp_path):
    told = []
    overrides = [*FOUR, f"run_dir={tmp_path}", "name=x"]
    assert train_locally("quickstart", overrides, None, told.append) == 0
    ((argv, ranks, logs, environments),) = started
    assert argv[1:] == ["-m", "flagdit.cli", "train", "quickstart", *overrides]
    assert ranks == 4 and logs == tmp_path / "x" / "logs" and str(logs) in told[0]
    assert [e["RANK"] for e in environments] == [e["LOCAL_RANK"] for e in environments] == ["0", "1", "2", "3"]
    assert {e["WORLD_SIZE"] for e in environments} == {e["LOCAL_WORLD_SIZE"] for e in environments} == {"4"}
    assert len({(e["MASTER_ADDR"], e["MASTER_PORT"]) for e in environments}) == 1


def test_cores_are_shared_unless_somebody_decided(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert rank_environment(0, cores, 1)["OMP_NUM_THREADS"] == "1"
    assert rank_environment(0, 1, 1)["OMP_NUM_THREADS"] == str(cores)
    assert rank_environment(0, 10 * cores, 1)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert rank_environment(0, 2, 1)["OMP_NUM_THREADS"] == "7"


def test_ranks_fill_the_mesh():
    recipe = load_recipe("quickstart", FOUR)
    check_ranks(recipe, 8, 0)
    with pytest.raises(LaunchError, match=r"--ranks 6 .*Try --ranks 4 or 8"):
        check_ranks(recipe, 6, 0)
    with pytest.raises(LaunchError, match=r"Try --ranks 4\."):
        check_ranks(recipe, 3, 0)


@pytest.mark.parametrize(
    ("device", "ranks", "gpus", "told"),
    [
        ("auto", 4, 2, "Use --ranks 2"),
        ("cuda", 4, 0, "train.device=cpu"),
        ("auto", 4, 0, None),
        ("cpu", 4, 2, None),
        ("cuda", 2, 2, None),
    ],
)
def test_every_rank_has_a_gpu_of_its_own(device, ranks, gpus, told):
    recipe = load_recipe("quickstart", [f"train.device={device}"])
    if told is None:
        check_ranks(recipe, ranks, gpus)
    else:
        with pytest.raises(LaunchError, match=told):
            check_ranks(recipe, ranks, gpus)


def test_a_wrong_recipe_starts_nothing(started):
    with pytest.raises(RecipeError, match=r"did you mean model\.dim"):
        train_locally("quickstart", ["model.dims=1"], 2, print)
    assert started == []


@pytest.mark.parametrize(("text", "count"), [("", 0), ("-1", 0), ("0", 1), ("0,3", 2), ("GPU-aa,GPU-bb,", 2)])
def test_gpus_that_the_environment_shows(monkeypatch, text, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
    assert visible_gpus() == count
