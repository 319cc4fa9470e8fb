"""One sample of 131,072 tokens whose tokens lie on four ranks, against one process.

    python benchmarks/long_sample.py [--rows 256] [--ranks 4] [--out FILE]

A tiny network (1 layer, width 32, 2 heads, random weights) draws one picture in one Euler step; every row is 511
patches and a [nextline]. Ranks exchange heads as far as there are heads, and keys and values around a ring beyond that.
Printed are the largest difference of a pixel (they lie in [−1, 1]) and what drawing added to the peak memory of a
process. Time says little where ranks share cores, and is not kept.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
from pathlib import Path

import torch
from _conditions import write_result
from _ranks import from_ranks

from flagdit.checkpoint import store
from flagdit.checkpoint.weights import load_run_recipe
from flagdit.config.load import load_recipe, save_recipe
from flagdit.generate.mesh import sampling_mesh
from flagdit.generate.pipeline import load_pipeline
from flagdit.model.flag_dit import FlagDiT

PATCHES, PATCH = 511, 2
MODEL = ["model.dim=32", "model.num_layers=1", "model.num_heads=2", "model.ffn_dim=32", f"model.patch_size={PATCH}"]
MODEL += ["model.text_dim=0", "sample.steps=1", "sample.guidance=1", "sample.every=0"]
MODEL += ["train.ema_decays=[]", "validation.every=0"]
LARGEST_DIFFERENCE = 2e-4


def write_run(folder: Path, rows: int) -> Path:
    """A run folder whose recipe asks for one picture of that many rows of patches."""
    size = f"sample.size={PATCHES * PATCH}x{rows * PATCH}"
    recipe = load_recipe("quickstart", [*MODEL, size, f"run_dir={folder}", "name=run"])
    run = folder / "run"
    run.mkdir()
    save_recipe(recipe, run / "recipe.yaml")
    generator = torch.Generator().manual_seed(0)
    weights = FlagDiT(recipe.model).state_dict()
    # Large enough that attention is far from even: a lost or doubled key would show.
    drawn = {k: torch.randn(p.shape, generator=generator) * scale_of(k, p) for k, p in weights.items()}
    store.save(run, 1, {"model": drawn}, {})
    return run


def scale_of(name: str, parameter: torch.Tensor) -> float:
    """Deviation of random weights. Small heads leave most pixels inside of [−1, 1], where they are cut off."""
    return 0.02 if name.startswith("heads") else 0.6


def draw(run: Path, ranks: int) -> tuple[torch.Tensor, float]:
    """The picture, and the peak memory that drawing it added, in GB."""
    with sampling_mesh(load_run_recipe(run), tensor=1, context=ranks) as mesh:
        pipeline = load_pipeline(run, device="cpu", mesh=mesh)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        (picture,) = pipeline.generate([""], pipeline.recipe.sample)
        return picture, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e9


def as_rank(folder: Path, run: Path, ranks: int, number: int) -> None:
    picture, peak = draw(run, ranks)
    if number == 0:
        torch.save(picture, run.parent / f"{ranks}.pt")
    (folder / f"{number}.json").write_text(json.dumps(peak))


def measure(rows: int, ranks: int) -> dict[str, float]:
    """The figures of one process and of that many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder), rows)
        arguments = ["--run", str(run)]
        (alone,) = from_ranks(__file__, 1, *arguments, "--ranks", "1")
        shared = from_ranks(__file__, ranks, *arguments, "--ranks", str(ranks))
        pictures = [torch.load(run.parent / f"{n}.pt") for n in (1, ranks)]
    return {
        "tokens": rows * (PATCHES + 1),
        "ranks": ranks,
        "largest_difference": float((pictures[0] - pictures[1]).abs().max()),
        "deviation": round(float(pictures[0].std()), 3),
        "alone_gb": round(alone, 3),
        "worst_rank_gb": round(max(shared), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=256, help="rows of 512 tokens (default: 256)")
    parser.add_argument("--ranks", type=int, default=4, help="ranks that share the tokens (default: 4)")
    parser.add_argument("--out", type=Path, help="also write figures and conditions to this file")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        as_rank(args.rank_of, args.run, args.ranks, int(os.environ["RANK"]))
        return
    figures = measure(args.rows, args.ranks)
    print(f"{figures['tokens']:,} tokens on {args.ranks} ranks and on one")
    print(f"largest difference of a pixel: {figures['largest_difference']:.0e}")
    print(f"drawing adds {figures['alone_gb']:.2f} GB alone, {figures['worst_rank_gb']:.2f} GB on the worst rank")
    if args.out:
        write_result(args.out, figures, ("torch",), steps=1, layers=1, width=32, heads=2)
    print(json.dumps(figures))
    sys.exit(figures["largest_difference"] > LARGEST_DIFFERENCE)


if __name__ == "__main__":
    main()
