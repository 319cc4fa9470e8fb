"""What a training step sends over each axis of the mesh, counted on real ranks against docs/parallelism.md.

    python benchmarks/comm_volume.py [--worlds 2,4] [--only WORDS] [--out FILE]

Starts 2 and 4 ranks on gloo; each trains a small model for a few steps of the real training loop on every mesh of the
table and counts every collective that leaves it (`_collectives.py`). The formulas stand in `_travels.py`. A call too
many or too few, on any rank, ends the benchmark with an error; bytes may differ by 1%, for padding.

Payload is what a rank hands to a call: its part in an all-gather, the whole tensor in an all-reduce, reduce-scatter or
all-to-all, the message in a send. Sent is what then leaves it with ring algorithms.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from _collectives import Amount, Count, Traffic, axes_of, leaving
from _conditions import write_result
from _ranks import from_ranks
from _travels import step_traffic

from flagdit.batch import PackedBatch, PackedText, Segment
from flagdit.config.schema import (
    FlowConfig,
    GuardConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Recipe,
    TrainConfig,
)
from flagdit.flow.objective import FlowMatching
from flagdit.model.sizes import resolve
from flagdit.model.tokens import TokenSpec, pack
from flagdit.parallel.mesh import ParallelContext, mesh_of
from flagdit.train.ema import Emas
from flagdit.train.engine import build_engine
from flagdit.train.guard import Guard
from flagdit.train.step import take_step

WARM_UP = 3
"""Steps before the counted one: ZeRO 3 learns the order of the modules, and has all ranks compare what they learned."""

# Some weights above and some below the size from which ZeRO 3 lets go of them; fewer key/value heads than ranks.
FLAG = ModelConfig(
    dim=256, num_layers=2, num_heads=8, num_kv_heads=2, ffn_dim=1024, cond_dim=64, text_dim=12,
    modalities={"image": 3, "video": 2},
)  # fmt: skip
NEXT = replace(FLAG, block="next", qk_norm="layer", num_kv_heads=4, checkpointing="block")

SHAPES = [(1, 8, 8), (4, 8, 12), (1, 16, 6), (2, 6, 6), (1, 2, 2), (3, 10, 8), (1, 12, 12), (1, 4, 10)]
"""Frames, rows and columns of the samples of a global batch."""


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    model: ModelConfig
    parallel: ParallelConfig
    accumulation: int = 1
    precision: str = "fp32"

    @property
    def recipe(self) -> Recipe:
        return Recipe(
            name=self.name,
            model=resolve(self.model),
            flow=FlowConfig(caption_dropout=0),
            optimizer=OptimizerConfig(lr=1e-4),
            train=TrainConfig(accumulation=self.accumulation, precision=self.precision),
            parallel=self.parallel,
        )


CASES = {
    2: [
        Case("TP2", NEXT, ParallelConfig(tensor=2, sequence=False)),
        Case("TP2 SP", FLAG, ParallelConfig(tensor=2), accumulation=2),
        Case("CP2 Ulysses", NEXT, ParallelConfig(context=2)),
        Case("CP2 ring", NEXT, ParallelConfig(context=2, ring=2)),
        Case("DP2 ZeRO 1", FLAG, ParallelConfig(zero=1), accumulation=2, precision="bf16"),
        Case("DP2 ZeRO 2", FLAG, ParallelConfig(zero=2), accumulation=2),
        Case("DP2 ZeRO 3", FLAG, ParallelConfig(zero=3)),
        Case("DP2 ZeRO 3, twice", FLAG, ParallelConfig(zero=3), accumulation=2, precision="bf16"),
    ],
    4: [
        Case("TP4 SP", NEXT, ParallelConfig(tensor=4)),
        Case("CP4 Ulysses", FLAG, ParallelConfig(context=4)),
        Case("CP4 ring", FLAG, ParallelConfig(context=4, ring=4)),
        Case("CP4 Ulysses and ring", FLAG, ParallelConfig(context=4, ring=2)),
        Case("TP2 SP, CP2 Ulysses", FLAG, ParallelConfig(tensor=2, context=2, zero=2)),
        Case("TP2 SP, DP2 ZeRO 3", FLAG, ParallelConfig(tensor=2, zero=3), precision="bf16"),
        Case("DP4 ZeRO 1", FLAG, ParallelConfig(zero=1)),
        Case("DP4 ZeRO 2", FLAG, ParallelConfig(zero=2)),
        Case("DP4 ZeRO 3", NEXT, ParallelConfig(zero=3)),
    ],
}
"""World size → meshes."""


def packs(model: ModelConfig, parts: int) -> list[PackedBatch]:
    """The global batch in equal parts: pictures and videos of uneven sizes."""
    generator = torch.Generator().manual_seed(0)
    found, size, spec = [], len(SHAPES) // parts, TokenSpec.from_model(model)
    for first in range(0, len(SHAPES), size):
        segments, latents, texts = [], [], []
        for i, (f, h, w) in enumerate(SHAPES[first : first + size], first):
            modality = "video" if f > 1 else "image"
            segments.append(Segment(i, modality, (model.modalities[modality], f, h, w)))
            latents.append(torch.randn(segments[-1].shape, generator=generator))
            texts.append(torch.randn(1 + i % 3, model.text_dim, generator=generator))
        found.append(pack(segments, latents, spec, text=PackedText.pack(texts)))
    return found


def measure(case: Case, mesh: ParallelContext) -> tuple[Traffic, Traffic]:
    """What this rank sends in one step: by the formula, and counted."""
    recipe = case.recipe
    _, engine = build_engine(recipe, mesh)
    run: Any = SimpleNamespace(
        recipe=recipe,
        engine=engine,
        emas=Emas(engine.weights(), recipe.train.ema_decays, recipe.train.ema_warmup),
        objective=FlowMatching(recipe.flow),
        guard=Guard(GuardConfig(), Path("unused")),
        model_config=recipe.model,
        null_text_LY=None,
        step=0,
    )
    mine = packs(recipe.model, mesh.data.size * case.accumulation)[mesh.data.rank :: mesh.data.size]
    for _ in range(WARM_UP):
        take_step(run, mine, 0.0)
    with Count(axes_of(mesh)) as count:
        take_step(run, mine, 0.0)
    return step_traffic(recipe, mesh, mine), dict(count.traffic)


def work(out: Path, only: str) -> None:
    """Run by every rank: writes its rows."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = []
    for case in CASES[dist.get_world_size()]:
        if only in case.name:
            with mesh_of(case.recipe, "cpu") as mesh:
                expected, counted = measure(case, mesh)
            ranks = {name: getattr(mesh, name).size for name in ("tensor", "ulysses", "ring", "data", "shards")}
            for axis, kind in sorted(expected.keys() | counted.keys()):
                want, got = (found.get((axis, kind), Amount()) for found in (expected, counted))
                sent = round(got.bytes * leaving(kind, ranks.get(axis, dist.get_world_size())))
                rows.append([case.name, axis, kind, want.calls, got.calls, want.bytes, got.bytes, sent])
    (out / f"{dist.get_rank()}.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", default="2,4", help="numbers of ranks, comma-separated (default: 2,4)")
    parser.add_argument("--only", default="", help="meshes whose name holds this")
    parser.add_argument("--out", type=Path, help="also write figures and conditions to this file")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        return work(args.rank_of, args.only)
    head = ("mesh", "axis", "collective", "calls", "payload", "formula", "sent")
    print(f"{head[0]:<22}{head[1]:<9}{head[2]:<15}{head[3]:>6}{head[4]:>12}{head[5]:>12}{head[6]:>12}")
    wrong, error, meshes, table = [], 0.0, set(), []
    for world in map(int, args.worlds.split(",")):
        for rank, rows in enumerate(from_ranks(__file__, world, "--only", args.only)):
            for name, axis, kind, want_calls, calls, want, payload, sent in rows:
                difference = abs(payload - want) / max(payload, want, 1)
                error = max(error, difference)
                if calls != want_calls or difference > 0.01:
                    wrong.append(
                        f"{name}, rank {rank}: {axis} {kind}: {calls} calls of {payload} bytes, the formula says "
                        f"{want_calls} of {want}"
                    )
                meshes.add(name)
                if rank == 0:
                    print(f"{name:<22}{axis:<9}{kind:<15}{calls:>6}{payload:>12,}{want:>12,}{sent:>12,}")
                    table.append(dict(zip(head, (name, axis, kind, calls, payload, want, sent), strict=True)))
    print(*wrong, sep="\n")
    figures = {"meshes": len(meshes), "unexpected_calls": len(wrong), "largest_byte_error": error}
    if args.out and not wrong:
        write_result(args.out, {**figures, "rank_0": table}, ("torch", "megatron-core", "deepspeed"))
    print(json.dumps(figures))
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
