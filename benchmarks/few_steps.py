"""Retrieval, evaluations and time of the sampling presets against the 60-step Euler default.

    python benchmarks/few_steps.py [RUN] [--limit 48] [--rounds 5] [--out FILE]

RUN is a run of the quickstart. Retrieval is that of `flagdit evaluate` on its training captions. Times are of one pack
of 8 pictures; the ways run in turn, and the ratio is the median over rounds, so that whatever else the machine does
falls on all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from _conditions import write_result

from flagdit.config.schema import SampleConfig
from flagdit.data_pipelines.index import Dataset
from flagdit.generate.evaluate import evaluate_retrieval
from flagdit.generate.pipeline import Pipeline, load_pipeline
from flagdit.generate.sample import settings_of

PACK = 8


def ways(pipeline: Pipeline) -> dict[str, SampleConfig]:
    """What is compared; the first is what the others are measured against."""
    named = {name: settings_of(pipeline.recipe, name, {}) for name in ("standard", "fast", "draft")}
    fast = named["fast"]
    return {
        **named,
        "fast, no reuse": replace(fast, guidance_reuse=1),
        "fast, linear grid": replace(fast, schedule="linear"),
        "fast, interval": replace(fast, guidance_reuse=1, guidance_interval=[0.1, 0.8]),
        "euler 20": replace(named["standard"], steps=20),
    }


def passes(pipeline: Pipeline, cfg: SampleConfig) -> int:
    """Passes of one sample through the network, both halves of guidance counted."""
    counted = 0

    def count(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal counted
        counted += len(args[1])

    hook = pipeline.model.register_forward_pre_hook(count, with_kwargs=True)
    pipeline.generate(["a"], cfg)
    hook.remove()
    return counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/quickstart"), help="default: runs/quickstart")
    parser.add_argument("--limit", type=int, default=48, help="captions of the training split (default: 48)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--out", type=Path, help="also write figures and conditions to this file")
    args = parser.parse_args()
    pipeline = load_pipeline(args.run)
    dataset = Dataset.open(pipeline.recipe.data.path)
    compared = ways(pipeline)
    prompts = [dataset.read(i).caption for i in range(PACK)]
    times: dict[str, list[float]] = {name: [] for name in compared}
    for turn in range(args.rounds + 1):
        for name, cfg in compared.items():
            start = time.perf_counter()
            pipeline.generate(prompts, cfg)
            if turn:  # the first round warms up
                times[name].append((time.perf_counter() - start) / PACK)
    figures = {}
    print(f"{'way':<20}{'passes':>8}{'retrieval':>11}{'s/picture':>11}{'speedup':>9}")
    for name, cfg in compared.items():
        top1 = evaluate_retrieval(pipeline, dataset, cfg=cfg, most=args.limit).top1["train"]
        ratio = statistics.median(a / b for a, b in zip(times["standard"], times[name], strict=True))
        each = statistics.median(times[name])
        count = passes(pipeline, cfg)
        print(f"{name:<20}{count:>8}{top1:>11.1%}{each:>11.3f}{ratio:>9.2f}", flush=True)
        key = name.replace(", ", "_").replace(" ", "_")
        figures |= {f"{key}_passes": count, f"{key}_top1": round(top1, 4), f"{key}_speedup": round(ratio, 2)}
    if args.out:
        write_result(args.out, figures, ("torch",), threads=torch.get_num_threads(), prompts=args.limit, pack=PACK)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
