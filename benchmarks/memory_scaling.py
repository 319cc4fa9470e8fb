"""Activation memory of a rank against the ranks that hold a pack together, and what the 7B model at 128K tokens takes.

    python benchmarks/memory_scaling.py [--largest N] [--out FILE]

First, real ranks (1, 2 and 4 on gloo) run forward and backward of a small model over one pack, and every live byte that
is no parameter and no gradient of one is counted (`_live_bytes.py`): the peak must fall in proportion to the ranks.

Then one process pretends to be one rank of the 7B recipe's mesh: fake tensors, which have shapes and no memory, and a
fake process group, whose collectives return at once. Attention is one operator there (the one that all flash kernels
are called through), which holds queries, keys, values, output and log-sum-exps, never T×T scores; the fp32 gradient
of the queries that flash kernels keep inside their backward pass is added. Norms run as the CPU runs them, in more
steps and with more fp32 copies than on a GPU. States are added by count (`_states.py`).
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _activations import measure, trace
from _conditions import write_result
from _live_bytes import LiveBytes
from _ranks import from_ranks
from _states import states

from flagdit.batch import PackedBatch, PackedText, Segment
from flagdit.config.load import SHIPPED, load_recipe
from flagdit.config.schema import ModelConfig, ParallelConfig, Recipe, TextConfig, TrainConfig
from flagdit.model.attention_backends.flash import Varlen
from flagdit.model.attention_backends.sdpa import Sdpa
from flagdit.model.sizes import resolve
from flagdit.model.tokens import TokenSpec, num_tokens, pack
from flagdit.parallel.mesh import mesh_of

SMALL = ModelConfig(
    dim=128, num_layers=3, num_heads=8, ffn_dim=384, text_dim=32, modalities={"image": 4, "video": 4}
)  # fmt: skip
SAMPLES = [(4, 32, 32), (1, 64, 64), (1, 40, 100), (4, 32, 30)]
"""Frames, rows and columns of latent: about 4K tokens in all."""

MESHES = {
    1: {"one process": ParallelConfig()},
    2: {
        "TP2 SP": ParallelConfig(tensor=2),
        "CP2 Ulysses": ParallelConfig(context=2),
        "CP2 ring": ParallelConfig(context=2, ring=2),
    },
    4: {
        "TP4 SP": ParallelConfig(tensor=4),
        "CP4 Ulysses": ParallelConfig(context=4),
        "CP4 ring": ParallelConfig(context=4, ring=4),
        "CP4 Ulysses and ring": ParallelConfig(context=4, ring=2),
        "TP2 SP, CP2 Ulysses": ParallelConfig(tensor=2, context=2),
        "TP2 SP, CP2 ring": ParallelConfig(tensor=2, context=2, ring=2),
    },
}
"""World size → how its ranks hold one pack."""

CHECKPOINTING = ("none", "block")
RECIPE = "t2v/7b_128k"
LONG = 131_072
GPU_GB = 80


# Small, on real ranks.


def small_pack(model: ModelConfig) -> PackedBatch:
    segments, latents, texts = [], [], []
    for i, (f, h, w) in enumerate(SAMPLES):
        segments.append(Segment(i, "video" if f > 1 else "image", (4, f, h, w)))
        latents.append(torch.randn(segments[-1].shape))
        texts.append(torch.randn(8, model.text_dim))
    return pack(segments, latents, TokenSpec.from_model(model), text=PackedText.pack(texts))


def work(out: Path, largest: int) -> None:
    """Run by every rank: peaks of all meshes of its world."""
    torch.manual_seed(0)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world > 1:
        dist.init_process_group("gloo")
    found: dict[str, int] = {}
    for name, parallel in MESHES[world].items():
        for kind in CHECKPOINTING:
            recipe = Recipe(model=resolve(replace(SMALL, checkpointing=kind)), parallel=parallel)
            with mesh_of(recipe, "cpu") as mesh:
                live = measure(recipe, mesh, Sdpa(), small_pack(recipe.model))
            found[f"{name}/{kind}"] = live.peak
            if rank == 0 and largest:
                print(f"\n{name}, checkpointing {kind}: {live.peak / 1e6:.1f} MB", flush=True)
                tell(live, largest)
    (out / f"{rank}.json").write_text(json.dumps(found))
    if world > 1:
        dist.destroy_process_group()


def tell(live: LiveBytes, count: int) -> None:
    """Prints the largest tensors at the peak."""
    for size, number, (name, shape, dtype) in live.largest(count):
        print(f"  {size / 1e6:>10.2f} MB  {number:>4} × {dtype} {list(shape)} of {name}", flush=True)


def gather(largest: int) -> dict[str, int]:
    """Mesh/checkpointing → the largest peak of its ranks, in bytes."""
    found: dict[str, int] = {}
    for world in MESHES:
        every = from_ranks(__file__, world, "--largest", str(largest))
        found |= {name: max(rank[name] for rank in every) for name in every[0]}
    return found


# The 7B model, without memory.


def long_recipe() -> Recipe:
    """The shipped recipe of 7B parameters and 128K tokens; until there is one, the same by hand."""
    if (SHIPPED / f"{RECIPE}.yaml").exists():
        recipe = load_recipe(RECIPE)
        return replace(recipe, model=resolve(recipe.model))
    model = ModelConfig(size="7b", modalities={"video": 16}, text_dim=4096, rope_axes=3, checkpointing="block")
    return Recipe(
        name="7b_128k",
        model=resolve(model),
        text=TextConfig(max_length=256),
        train=TrainConfig(precision="bf16"),
        parallel=ParallelConfig(tensor=8, context=8, ring=2),
    )


def long_pack(recipe: Recipe) -> PackedBatch:
    """One clip of latents of 64 rows and columns, as many frames as fit into 128K tokens, and the longest caption."""
    model, spec = recipe.model, TokenSpec.from_model(recipe.model)
    channels = model.modalities["video"]
    frames = LONG // num_tokens((channels, 1, 64, 64), "video", spec)
    segment = Segment(0, "video", (channels, frames, 64, 64))
    text = PackedText.pack([torch.zeros(recipe.text.max_length, model.text_dim)]) if model.text_dim else None
    labels = [0] if model.num_classes else None
    return pack([segment], [torch.zeros(segment.shape)], spec, text=text, labels=labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--largest", type=int, default=0, help="also print so many of the largest tensors at each peak")
    parser.add_argument("--out", type=Path, help="also write figures and conditions to this file")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.rank_of:
        return work(args.rank_of, args.largest)
    figures = {**small(args.largest), **long(args.largest)}
    if args.out:
        write_result(args.out, figures, ("torch", "megatron-core", "deepspeed"))
    print(json.dumps({name: value for name, value in figures.items() if not isinstance(value, dict)}))


def small(largest: int) -> dict[str, Any]:
    """Measures, prints and returns the scaling of activations."""
    found = gather(largest)
    print(f"\n{'mesh':<24}{'checkpointing':<15}{'MB a rank':>10}{'× ranks ÷ one process':>23}")
    deviations = {}
    for world, meshes in MESHES.items():
        for name in meshes:
            for kind in CHECKPOINTING:
                share = found[f"{name}/{kind}"] * world / found[f"one process/{kind}"]
                deviations[f"{name}/{kind}"] = round(share - 1, 4)
                print(f"{name:<24}{kind:<15}{found[f'{name}/{kind}'] / 1e6:>10.1f}{share:>23.3f}")
    return {"worst_deviation": max(map(abs, deviations.values())), "deviations": deviations, "peak_bytes": found}


def long(largest: int) -> dict[str, Any]:
    """Traces, prints and returns what a rank of the 7B recipe takes."""
    recipe = long_recipe()
    p = recipe.parallel
    live, local, shards = trace(recipe, 0, Varlen(), long_pack(recipe))
    parts = {"activations": live.peak, **states(recipe, local, shards)}
    print(
        f"\n{recipe.name}: rank 0 of TP{p.tensor}×CP{p.context} (ring {p.ring}), ZeRO {p.zero}, {LONG:,} tokens, "
        f"checkpointing {recipe.model.checkpointing}, {recipe.train.precision}"
    )
    for name, size in parts.items():
        print(f"  {name:<44}{size / 1e9:>8.2f} GB")
    total = sum(parts.values()) / 1e9
    print(f"  {'in all':<44}{total:>8.2f} GB of {GPU_GB}")
    if largest:
        tell(live, largest)
    return {
        "traced_peak_gb": round(total, 2),
        "fits": total < GPU_GB,
        "traced_bytes": parts,
    }


if __name__ == "__main__":
    main()
