"""The plan of tensor, context and data ranks: activations against a rank that is traced, its collectives pretended;
traffic against the formulas that benchmarks/comm_volume.py counts on real ranks."""

from dataclasses import replace

import pytest
import torch
from _activations import trace
from _collectives import leaving
from _travels import step_traffic

from flagdit.batch import PackedBatch, PackedText, Segment
from flagdit.config.schema import ModelConfig, ParallelConfig, Recipe, TrainConfig
from flagdit.model.attention_backends.flash import Varlen
from flagdit.model.sizes import resolve
from flagdit.model.tokens import TokenSpec, pack
from flagdit.parallel.mesh import Axis, ParallelContext
from flagdit.plan.memory import Slice, activation_bytes
from flagdit.plan.parameters import count_parameters
from flagdit.plan.time import traffic_of
from flagdit.plan.workload import Workload

MODEL = ModelConfig(
    dim=1024, num_layers=3, num_heads=16, ffn_dim=2816, text_dim=256, modalities={"video": 4}, rope_axes=3
)
CLIP = (4, 16, 32, 32)
TEXT = 64
MESHES = {
    "TP2 SP": {"tensor": 2},
    "TP4 SP": {"tensor": 4},
    "TP2": {"tensor": 2, "sequence": False},
    "CP4": {"context": 4},
    "CP4 ring": {"context": 4, "ring": 4},
    "TP2 SP, CP2": {"tensor": 2, "context": 2},
}


def clip(model: ModelConfig) -> PackedBatch:
    text = PackedText.pack([torch.zeros(TEXT, model.text_dim)])
    return pack([Segment(0, "video", CLIP)], [torch.zeros(CLIP)], TokenSpec.from_model(model), text=text)


def workload(recipe: Recipe, batch: PackedBatch, data: int = 1) -> Workload:
    p, accumulation = recipe.parallel, recipe.train.accumulation
    ranks = p.tensor * p.context * data
    return Workload(recipe.model, p, ranks, (batch.layout.num_tokens,), 0, (TEXT,), accumulation, 1, 0, 2)


def of_rank(mesh: str, kind: str) -> tuple[float, int]:
    """Predicted and traced bytes."""
    model = resolve(replace(MODEL, checkpointing=kind))
    recipe = Recipe(model=model, parallel=ParallelConfig(**MESHES[mesh]), train=TrainConfig(precision="bf16"))
    batch = clip(model)
    return activation_bytes(model, Slice.of(workload(recipe, batch))), trace(recipe, 0, Varlen(), batch)[0].peak


@pytest.mark.parametrize("mesh", MESHES)
def test_activations_of_a_rank_are_within_5_percent_of_the_trace(mesh):
    predicted, traced = of_rank(mesh, "none")
    assert predicted == pytest.approx(traced, rel=0.05)


@pytest.mark.parametrize(("mesh", "kind"), [("TP4 SP", "block"), ("CP4", "block"), ("TP2 SP, CP2", "selective")])
def test_with_checkpointing_too(mesh, kind):
    predicted, traced = of_rank(mesh, kind)
    assert predicted == pytest.approx(traced, rel=0.05)


def place(p: ParallelConfig, data: int) -> ParallelContext:
    """Rank 0 of a mesh whose groups are never spoken to."""

    def axis(size: int) -> Axis:
        return Axis(size, 0, object() if size > 1 else None)  # type: ignore[arg-type]

    sequence = p.sequence and p.tensor > 1
    return ParallelContext(
        world=p.tensor * p.context * data,
        tensor=axis(p.tensor),
        context=axis(p.context),
        ulysses=axis(p.context // p.ring),
        ring=axis(p.ring),
        data=axis(data),
        shards=axis(p.context * data),
        tokens=axis(p.context * (p.tensor if sequence else 1)),
        distinct=axis(p.tensor * p.context * data if sequence else p.context * data),
        sequence=sequence,
    )


TRAFFIC = {
    "TP2 SP": ({"tensor": 2}, 1, 1),
    "TP4": ({"tensor": 4, "sequence": False}, 1, 1),
    "CP4": ({"context": 4}, 1, 1),
    "CP4 ring": ({"context": 4, "ring": 4}, 1, 1),
    "CP4 both": ({"context": 4, "ring": 2}, 1, 1),
    "DP4 ZeRO 1": ({"zero": 1}, 4, 2),
    "DP4 ZeRO 2": ({"zero": 2}, 4, 2),
    "DP4 ZeRO 3": ({"zero": 3}, 4, 2),
    "TP2 SP, CP2, DP2 ZeRO 2": ({"tensor": 2, "context": 2, "zero": 2}, 2, 1),
}
"""Name → keys of the mesh, data ranks, micro-batches."""


@pytest.mark.parametrize("kind", ["none", "block"])
@pytest.mark.parametrize("name", TRAFFIC)
def test_traffic_by_axis_is_within_5_percent_of_what_is_counted(name, kind):
    keys, data, accumulation = TRAFFIC[name]
    small = replace(MODEL, dim=512, ffn_dim=1408, checkpointing=kind)  # the counted formula is of a single bucket
    model, parallel = resolve(small), ParallelConfig(**keys)
    recipe = Recipe(model=model, parallel=parallel, train=TrainConfig(precision="bf16", accumulation=accumulation))
    mesh, batch = place(parallel, data), clip(model)
    sizes = {axis: getattr(mesh, axis).size for axis in ("tensor", "ulysses", "ring", "shards")}
    counted = dict.fromkeys(sizes, 0.0)
    for (axis, collective), amount in step_traffic(recipe, mesh, [batch] * accumulation).items():
        if axis in sizes:
            counted[axis] += amount.bytes * leaving(collective, sizes[axis])
    planned = traffic_of(workload(recipe, batch, data), count_parameters(model))
    assert sum(counted.values()) > 0
    for axis, size in counted.items():
        assert getattr(planned, axis) == pytest.approx(size, rel=0.05), axis
