"""Retrieval at 1, 1.5 and 2 times the size of training, for every scaling of positions.

    python benchmarks/resolution.py [RUN] [--limit 48] [--out FILE]

RUN is a run of the quickstart. Its captions are drawn at each size with the `fast` preset, shrunk to the size of the
data and looked for among all its pictures, as `flagdit evaluate` does. `stages` draws at the size of training, then
enlarges and draws half of the way anew, with linear scaling.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from _conditions import write_result

from flagdit.config.schema import SampleConfig
from flagdit.data_pipelines.index import Dataset
from flagdit.generate.evaluate import evaluate_retrieval, nearest, scaled
from flagdit.generate.pipeline import Pipeline, load_pipeline
from flagdit.generate.resolution import resize, upscale
from flagdit.generate.sample import settings_of

SCALES = (1.0, 1.5, 2.0)
SCALINGS = ("none", "linear", "ntk", "time_aware", "time_switch")


def in_stages(pipeline: Pipeline, dataset: Dataset, cfg: SampleConfig, scale: float, limit: int) -> float:
    """Retrieval of pictures that are drawn small and enlarged."""
    train = dataset.splits["train"]
    chosen = [train[i * len(train) // limit] for i in range(limit)]
    pictures = [pipeline.codec.decode(dataset.read(i).latent_CFHW) for i in range(len(dataset))]
    captions = [dataset.read(i).caption for i in chosen]
    height, width = pictures[0].shape[2:]
    unit = pipeline.codec.factor * pipeline.spec.patch_size
    size = (scaled(width, scale, unit), scaled(height, scale, unit))
    drawn = upscale(pipeline, captions, cfg, sizes=[size] * limit, strength=0.5)
    found = nearest([resize(p, (width, height)) for p in drawn], pictures)
    return sum(i == j for i, j in zip(found, chosen, strict=True)) / limit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/quickstart"), help="default: runs/quickstart")
    parser.add_argument("--limit", type=int, default=48, help="captions of the training split (default: 48)")
    parser.add_argument("--out", type=Path, help="also write figures and conditions to this file")
    args = parser.parse_args()
    pipeline = load_pipeline(args.run)
    dataset = Dataset.open(pipeline.recipe.data.path)
    base = replace(settings_of(pipeline.recipe, "fast", {}), train_size=pipeline.recipe.sample.size)
    figures = {}
    print(f"{'scaling':<14}" + "".join(f"{scale:>8g}x" for scale in SCALES))
    for name in SCALINGS:
        cfg = replace(base, scaling=name, proportional=name != "none")
        for scale in SCALES:
            found = evaluate_retrieval(pipeline, dataset, cfg=cfg, scale=scale, most=args.limit)
            figures[f"{name}_{scale:g}x"] = round(found.top1["train"], 4)
        print(f"{name:<14}" + "".join(f"{figures[f'{name}_{scale:g}x']:>9.1%}" for scale in SCALES), flush=True)
    cfg = replace(base, scaling="linear")
    for scale in SCALES[1:]:
        figures[f"stages_{scale:g}x"] = round(in_stages(pipeline, dataset, cfg, scale, args.limit), 4)
    print(f"{'stages':<14}{'':>9}" + "".join(f"{figures[f'stages_{scale:g}x']:>9.1%}" for scale in SCALES[1:]))
    if args.out:
        write_result(args.out, figures, ("torch",), prompts=args.limit, sample="fast")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
