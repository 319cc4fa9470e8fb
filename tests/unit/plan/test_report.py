"""`flagdit plan`: verdicts, the nearest changes that fit, the ranking of meshes, and their formats."""

import io
import json

import pytest
from rich.console import Console

from flagdit.config.load import load_recipe
from flagdit.errors import RecipeError
from flagdit.plan.report import as_json, make_plan, plot, show, span

BIG = ["model.size=5b", "model.dim=512", "model.num_layers=8", "model.num_heads=8", "model.ffn_dim=null"]
BIG += ["train.precision=bf16", "data.batch_size=8", "train.ema_decays=[0.999]"]


def big(*overrides: str):
    return load_recipe("quickstart", [*BIG, *overrides])


def shown(plan, searched=False) -> str:
    out = io.StringIO()
    show(plan, Console(file=out, width=160), searched=searched)
    return out.getvalue()


def test_what_does_not_fit_gets_the_nearest_changes_that_do():
    plan = make_plan(big(), gpu="a100-80", gpus=8, sample_tokens=16384)
    assert not plan.fits and "does not fit" in shown(plan) and "nearest changes that make it fit" in shown(plan)
    assert plan.others and [len(c.changes) for c in plan.others] == sorted(len(c.changes) for c in plan.others)
    for other in plan.others:
        overrides = [f"{key}={value}".lower() for key, value in other.changes.items()]
        again = make_plan(big(*overrides), gpu="a100-80", gpus=8, sample_tokens=16384)
        assert again.fits and again.memory.total == pytest.approx(other.memory.total)
        assert other.overrides in shown(plan)


def test_search_ranks_fitting_meshes_by_time():
    plan = make_plan(big("model.checkpointing=block"), gpus=8, sample_tokens=8192, search=True)
    seconds = [round(c.time.step, 6) for c in plan.others]
    assert len(seconds) > 3 and seconds == sorted(seconds) and all(c.fits(plan.gpu) for c in plan.others)
    assert "fastest first" in shown(plan, searched=True)


def test_search_finds_meshes_where_the_recipes_own_is_none_of_these_gpus():
    own = big("train.accumulation=4", "model.checkpointing=block")
    with pytest.raises(RecipeError, match=r"multiple of 8 data ranks .*\. --search looks for a mesh of 8 GPUs"):
        make_plan(own, gpus=8, sample_tokens=1024)
    plan = make_plan(own, gpus=8, sample_tokens=1024, search=True)
    assert "multiple of 8 data ranks" in plan.impossible and plan.work == plan.others[0].work
    text = shown(plan, searched=True)
    assert text.startswith("not as it is: data.batch_size=8") and plan.others[0].overrides in text
    assert as_json(plan)["impossible"] == plan.impossible
    with pytest.raises(RecipeError, match="of all other meshes of 8 GPUs none fits"):
        make_plan(own, gpu="a100-40", gpus=8, sample_tokens=4_000_000, search=True)


def test_how_many_gpus_are_enough_is_told():
    recipe = big("data.batch_size=64", "model.checkpointing=block")
    plan = make_plan(recipe, gpu="a100-80", gpus=2, sample_tokens=8192)
    assert not plan.fits and plan.enough in (4, 8, 16, 32, 64) and f"fits on {plan.enough} × a100-80" in shown(plan)
    assert make_plan(recipe, gpu="a100-80", gpus=plan.enough, sample_tokens=8192).fits
    assert not make_plan(recipe, gpu="a100-80", gpus=plan.enough // 2, sample_tokens=8192).fits
    assert make_plan(big(), gpus=8, sample_tokens=1024).enough is None


def test_gpus_are_those_of_the_cluster_unless_given():
    recipe = big("cluster.nodes=2", "cluster.gpus_per_node=4")
    assert make_plan(recipe, sample_tokens=64).work.gpus == 8
    assert make_plan(recipe, gpus=4, sample_tokens=64).work.gpus == 4 and make_plan(big()).work.gpus == 1


def test_a_micro_batch_joins_packs_with_a_token_budget():
    keys = ["data.pack_tokens=1024", "data.batch_size=8", "train.accumulation=2"]
    work = make_plan(big(*keys), gpus=2, sample_tokens=512).work
    assert work.seqlens == (512,) * 4 and work.tokens_per_step == 8 * 1024


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.000222, "0.222 ms"), (0.5, "500 ms"), (1.51, "1.51 s"), (198, "3.3 minutes"), (5400, "90 minutes"),
     (9000, "2.5 hours"), (1744000, "20.2 days"), (79056000, "915 days")],
)  # fmt: skip
def test_times_are_told_in_their_unit(seconds, text):
    assert span(seconds) == text


def test_json_holds_what_the_tables_show():
    plan = make_plan(big(), gpus=8, sample_tokens=1024)
    told = json.loads(json.dumps(as_json(plan)))
    assert told["fits"] and "h100" in told["fits_on"] and told["parameters"]["total"] == plan.parameters.total
    kinds = {key: value for key, value in told["memory"].items() if key not in ("total", "host")}
    assert sum(kinds.values()) == pytest.approx(told["memory"]["total"])
    assert told["tokens_per_step"] == 8 * 1024 and told["mesh"]["data"] == 8
    text = shown(plan)
    assert f"{plan.parameters.total:,}" in text and "8,192" in text and "fits:" in text
    assert told["seconds_between_failures"] == pytest.approx(54 * 86400 / 419 * 16384 / 8)
    assert told["seconds_lost_by_failure"] == pytest.approx(told["seconds"]["step"] * plan.recipe.checkpoint.every / 2)
    assert "at Llama 3's rate" in text
    assert told["gpu_hours"] == pytest.approx(told["days"] * 24 * 8)


def test_plot_is_a_picture(tmp_path):
    plan = make_plan(big(), gpus=8, sample_tokens=1024, search=True)
    plot(plan, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(RecipeError, match=r"--plot .*plan.txt is not a picture"):
        plot(plan, tmp_path / "plan.txt")


@pytest.mark.parametrize(
    ("overrides", "gpus", "told"),
    [
        (["parallel.tensor=3"], 3, "parallel.tensor=3 must divide model.num_heads=32"),
        (["parallel.tensor=2"], 3, "2 or 4 ranks"),
        ([], 3, "data.batch_size=8 must be a multiple of 3 data ranks"),
    ],
)
def test_an_impossible_mesh_is_told_with_its_keys(overrides, gpus, told):
    with pytest.raises(RecipeError, match=told):
        make_plan(big(*overrides), gpus=gpus)


def test_an_unknown_gpu_is_told():
    with pytest.raises(RecipeError, match="--gpu v100 is not known"):
        make_plan(big(), gpu="v100")
