"""FLOPs against torch's counter, parameters against the real model, traffic and time against what must hold."""

from dataclasses import replace

import pytest

from flagdit.config.load import load_recipe
from flagdit.config.schema import ModelConfig
from flagdit.model.sizes import official
from flagdit.model.tokens import TokenSpec, num_tokens
from flagdit.plan.gpus import gpu_named
from flagdit.plan.parameters import count_parameters
from flagdit.plan.time import operations_of, time_of, traffic_of
from flagdit.plan.trace import traced_flops
from flagdit.plan.workload import Workload, workload_of

WIDE = ModelConfig(dim=1024, num_layers=6, num_heads=16, text_dim=512, modalities={"image": 4})


@pytest.mark.parametrize(
    "changes",
    [{}, {"block": "next", "num_kv_heads": 4}, {"text_dim": 0, "num_classes": 10}, {"checkpointing": "block"}],
    ids=str,
)
def test_flops_are_within_1_percent_of_the_counter(changes):
    cfg = replace(WIDE, **changes)
    samples = [("image", (4, 1, 32, 48))] * 4
    text = [24] * 4 if cfg.text_dim else []
    length = num_tokens(samples[0][1], "image", TokenSpec.from_model(cfg))
    recipe = load_recipe("quickstart")
    work = Workload(cfg, recipe.parallel, 1, (length,) * 4, 4 * 16 * 24, tuple(text), 1, 1, 0, 2)
    ops = operations_of(work)
    expected = ops.model
    if changes.get("checkpointing"):
        expected += ops.model / 3  # the blocks once more; stems and heads are nothing beside them
    assert expected == pytest.approx(traced_flops(cfg, samples, text), rel=0.01)


@pytest.mark.parametrize(
    ("name", "count"), [("7b", 7_293_819_936), ("600m", 609_836_576), ("next_2b", 1_988_524_576 - 2304)]
)
def test_parameters_are_exact(name, count):
    # Official counts of models that read text hold one [pad] token of `dim` numbers, which does not exist here.
    parameters = count_parameters(official(name))
    assert parameters.total == sum(parameters.by_part.values()) == count


def plan(gpus: int, *overrides: str):
    recipe = load_recipe("quickstart", ["model.num_heads=8", "model.num_kv_heads=8", *overrides])
    work, parameters = workload_of(recipe, gpus), count_parameters(recipe.model)
    return work, parameters, traffic_of(work, parameters)


def test_an_axis_of_one_rank_sends_nothing():
    _, _, traffic = plan(1)
    assert (traffic.tensor, traffic.ulysses, traffic.ring, traffic.shards) == (0, 0, 0, 0)


def test_traffic_by_axis():
    work, parameters, t = plan(2, "parallel.tensor=2")
    assert t.tensor == 4 * 0.5 * 10 * work.tokens * 128 * 4 and t.ulysses == t.ring == t.shards == 0
    work, parameters, t = plan(2, "parallel.context=2")
    # Queries, keys, values and outputs of half the tokens, forward and backward, half of each goes to the other rank.
    assert t.ulysses == 4 * 0.5 * 2 * (work.tokens / 2) * 128 * 4 * 4 and t.ring == t.tensor == 0
    assert t.shards == 0.5 * parameters.total * (2 * 4 + 4)
    *_, ring = plan(2, "parallel.context=2", "parallel.ring=2")
    assert ring.ring > 0 and ring.ulysses == 0
    *_, again = plan(2, "parallel.tensor=2", "model.checkpointing=block")
    assert again.tensor == 1.4 * plan(2, "parallel.tensor=2")[2].tensor
    *_, sums = plan(2, "parallel.tensor=2", "parallel.sequence=false")
    assert sums.tensor == 0.8 * plan(2, "parallel.tensor=2")[2].tensor
    *_, third = plan(2, "parallel.zero=3")
    assert third.shards == 0.5 * parameters.total * (4 + 4)
    *_, second = plan(2, "parallel.zero=2", "train.accumulation=2")
    assert second.shards == 0.5 * parameters.total * (2 * 2 * 4 + 4)


def test_more_gpus_are_faster_and_less_efficient():
    h100 = gpu_named("h100")
    large = ["model.dim=1024", "model.ffn_dim=4096", "data.batch_size=4096", "train.precision=bf16"]
    times = [time_of(*plan(n, *large)[:2], h100) for n in (1, 4, 16)]
    assert times[0].step > times[1].step > times[2].step
    assert times[0].mfu > times[1].mfu > times[2].mfu > 0
    across = time_of(*plan(4, "parallel.tensor=4")[:2], h100, 2)
    assert across.communication > time_of(*plan(4, "parallel.tensor=4")[:2], h100, 8).communication


def test_attention_is_most_of_a_long_sample():
    recipe = load_recipe("quickstart", ["data.batch_size=1"])
    short, long = (operations_of(workload_of(recipe, 1, n)) for n in (256, 65536))
    assert short.attention / short.model < 0.4 < 0.9 < long.attention / long.model
