"""What a model of clips, views and sounds does at lengths that it was not trained on, and between scenes.

    python benchmarks/moving.py [RUN] [--out FILE]

RUN is trained on clips (`motion`), views (`objects`) and sounds (`instruments`); docs/generation.md says how. Printed:

- changes between scenes: the largest step between neighbouring frames there over the mean step inside the scenes, for
  several pairs of prompts, drawn as one video and, for contrast, as two videos cut together;
- the step from the last frame to the first over the mean step, of a loop and of a plain video;
- a given first frame: how far a pixel of it strays (pixels lie in [−1, 1]), and the step to the next frame;
- views: the mean cosine of EfficientNet-Lite0's features between neighbouring views of an object, of generated sets, of
  real ones, and of views picked from different generated sets;
- seconds of sound asked for and made.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from _conditions import write_result
from torch import Tensor

from flagdit.config.schema import SampleConfig
from flagdit.data_pipelines.index import Dataset
from flagdit.generate.features import lite0
from flagdit.generate.pipeline import Pipeline, load_pipeline
from flagdit.generate.sample import settings_of
from flagdit.generate.transition import scenes, smoothness

SECONDS = (0.5, 1.0, 2.0, 3.3)


def frames_apart(a_CHW: Tensor, b_CHW: Tensor) -> float:
    return float((a_CHW - b_CHW).square().mean().sqrt())


def steps_of(video_CFHW: Tensor) -> list[float]:
    return [frames_apart(a, b) for a, b in pairwise(video_CFHW.unbind(1))]


def drawn(pipeline: Pipeline, prompts: Sequence[str], cfg: SampleConfig, number: int, **how) -> Tensor:
    size = pipeline.default_size(cfg)
    return scenes(pipeline, prompts, cfg, size=size, window=cfg.train_frames, sample_id=number, **how)


def changes(pipeline: Pipeline, pairs: Sequence[tuple[str, str]], cfg: SampleConfig) -> dict[str, float]:
    """Smoothness of scene changes, drawn as one video and cut together from two."""
    half = cfg.frames // 2
    smooth, cut = [], []
    for number, pair in enumerate(pairs):
        smooth.append(smoothness(drawn(pipeline, pair, cfg, number), [half], width=cfg.train_frames // 4 + 1))
        parts = [drawn(pipeline, [prompt], replace(cfg, frames=half), number) for prompt in pair]
        cut.append(smoothness(torch.cat(parts, dim=1), [half]))
    found = {
        "change_median": statistics.median(smooth),
        "change_worst": max(smooth),
        "cut_median": statistics.median(cut),
    }
    return {name: round(value, 2) for name, value in found.items()}


def ends(pipeline: Pipeline, prompts: Sequence[str], cfg: SampleConfig) -> dict[str, float]:
    """The step over the end of loops and of plain videos, and what becomes of a given first frame."""
    over: dict[str, list[float]] = {"loop": [], "plain": []}
    strays, nexts = [], []
    for number, prompt in enumerate(prompts):
        for name, videos in over.items():
            video = drawn(pipeline, [prompt], cfg, number, loop=name == "loop")
            videos.append(frames_apart(video[:, -1], video[:, 0]) / statistics.mean(steps_of(video)))
        first = drawn(pipeline, [prompt], cfg, number + 100)[:, :1]
        video = drawn(pipeline, [prompt], cfg, number, first_frame=first)
        strays.append(float((video[:, :1] - first).abs().max()))
        steps = steps_of(video)
        nexts.append(steps[0] / statistics.mean(steps[1:]))
    found = {"loop_step": statistics.median(over["loop"]), "plain_step": statistics.median(over["plain"])}
    found |= {"first_frame_next_step": statistics.median(nexts)}
    return {**{k: round(v, 2) for k, v in found.items()}, "first_frame_stray": max(strays)}


def views(pipeline: Pipeline, dataset: Dataset, cfg: SampleConfig, numbers: Sequence[int]) -> dict[str, float]:
    """Cosines of neighbouring views' features."""
    features = lite0()
    train = [dataset.read(i) for i in list(dataset.splits["train"])[:12]]
    real = [pipeline.codec.decode(s.latent_CFHW).clamp(-1, 1) for s in train]

    def consistency(sets: Sequence[Tensor]) -> float:
        cosines = []
        for views_CFHW in sets:
            found_ND = features([view[:, None] for view in views_CFHW.unbind(1)])
            cosines += F.cosine_similarity(found_ND, found_ND.roll(1, 0)).tolist()
        return statistics.mean(cosines)

    figures = {"views_real": consistency(real)}
    for count in numbers:
        sets = pipeline.generate([s.caption for s in train], replace(cfg, frames=count))
        figures[f"views_{count}"] = consistency(sets)
        mixed = [torch.stack([sets[(i + k) % len(sets)][:, k] for k in range(count)], dim=1) for i in range(len(sets))]
        figures[f"views_{count}_mixed"] = consistency(mixed)
    return {name: round(value, 3) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/motion"), help="default: runs/motion")
    parser.add_argument("--pairs", type=int, default=6, help="pairs of prompts (default: 6)")
    parser.add_argument("--out", type=Path, help="also write figures and conditions to this file")
    args = parser.parse_args()
    pipeline = load_pipeline(args.run)
    sets = {d.modality: d for d in map(Dataset.open, pipeline.recipe.data.sets)}
    trained = sets["video"].shapes[0][0][1]
    captions = [sets["video"].read(i).caption for i in sets["video"].splits["train"]]
    spread = captions[:: max(len(captions) // (2 * args.pairs), 1)]
    video = replace(settings_of(pipeline.recipe, None, {"modality": "video"}), train_frames=trained, frames=3 * trained)
    clips = pipeline.of("video")
    figures = changes(clips, list(zip(spread[: args.pairs], spread[-args.pairs :], strict=True)), video)
    print(f"change of scene: {figures['change_median']}× the mean step, {figures['change_worst']}× at worst;", end=" ")
    print(f"cut together {figures['cut_median']}×")
    figures |= ends(clips, spread[: args.pairs], video)
    print(f"from the end to the start: {figures['loop_step']}× in loops, {figures['plain_step']}× else")
    print(f"first frame: strays by {figures['first_frame_stray']:.0e}, next step {figures['first_frame_next_step']}×")
    count = sets["multiview"].shapes[0][0][1]
    figures |= views(
        pipeline.of("multiview"), sets["multiview"], replace(video, modality="multiview"), (count, 2 * count)
    )
    print("cosine of neighbouring views:", ", ".join(f"{k[6:]} {v}" for k, v in figures.items() if k[:6] == "views_"))
    sounds, rate = pipeline.of("audio"), pipeline.recipe.audio.sample_rate
    prompt = sets["audio"].read(0).caption
    for seconds in SECONDS:
        (wave,) = sounds.generate([prompt], replace(video, modality="audio", frames=1, seconds=seconds))
        figures[f"seconds_{seconds:g}"] = round(wave.shape[-1] / rate, 3)
    print("seconds of sound:", ", ".join(f"{s:g} → {figures[f'seconds_{s:g}']}" for s in SECONDS))
    if args.out:
        write_result(args.out, figures, ("torch",), pairs=args.pairs, frames=video.frames, window=trained)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
