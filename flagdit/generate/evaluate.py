"""How well a model draws what it is asked for, on a data set whose pictures are known.

Shape legend: B pictures of one size, Z values of one picture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flagdit.batch import PackedText, Segment
from flagdit.config.schema import SampleConfig
from flagdit.data_pipelines.index import Dataset, Encoded
from flagdit.data_pipelines.mixture import mixture_of
from flagdit.errors import CheckpointError, DataError, RecipeError
from flagdit.flow.objective import FlowMatching
from flagdit.flow.path import draw_path
from flagdit.generate.images import grid, save_image, to_image
from flagdit.generate.pipeline import Condition, Pipeline, Progress, load_pipeline
from flagdit.generate.resolution import resize
from flagdit.generate.sample import settings_of, steps_shown
from flagdit.generate.scores import Drawn, Scores
from flagdit.model.tokens import pack

SHEET_COLUMNS, MOST_ON_SHEET = 20, 200
TIME_BINS = 10


@dataclass(frozen=True)
class Retrieval:
    """What was generated and found, by split, in the order of the data set.

    Attributes:
        top1: share of generated pictures whose nearest neighbour has the caption (or class) that was asked for.
        drawn: what was generated, asked for and to be found.
        real: all pictures of the data set, (3, F, H, W).
        said: the caption (or class) of each.
    """

    top1: dict[str, float]
    drawn: dict[str, Drawn]
    real: list[Tensor]
    said: list[Condition]


def nearest(generated: Sequence[Tensor], references: Sequence[Tensor]) -> list[int]:
    """For each picture the index of the reference with the least L2 distance in pixels, among those of its size.

    A picture without a reference of its size gets −1.
    """
    by_shape: dict[torch.Size, list[int]] = {}
    for i, reference in enumerate(references):
        by_shape.setdefault(reference.shape, []).append(i)
    known_BZ = {shape: torch.stack([references[i].flatten() for i in ids]) for shape, ids in by_shape.items()}
    found = []
    for picture in generated:
        ids = by_shape.get(picture.shape)
        if ids is None:
            found.append(-1)
        else:
            distance_B = (known_BZ[picture.shape] - picture.flatten()).square().sum(1)
            found.append(ids[int(distance_B.argmin())])
    return found


def evaluate_retrieval(
    pipeline: Pipeline,
    dataset: Dataset,
    *,
    cfg: SampleConfig | None = None,
    scale: float = 1.0,
    most: int | None = None,
    on_step: Progress | None = None,
) -> Retrieval:
    """Draws a picture for every caption of a data set at its reference's size, and looks for it among all its pictures.

    The references of all splits compete, whichever split the caption is of.

    Args:
        dataset: encoded with the pipeline's codec.
        cfg: how to sample; None: the recipe's `sample` block.
        scale: times the reference's size, to the nearest that the model can make; compared at the reference's size.
        most: captions of each split to draw, spread evenly over it; None: all.
        on_step: as in `Pipeline.generate`.

    Raises:
        DataError: the data set was encoded otherwise, or a sample cannot be read.
        RecipeError: the model follows no condition.
    """
    if pipeline.text_encoder is None and not pipeline.model.cfg.num_classes:
        raise RecipeError("this model follows neither captions nor classes, so there is nothing to look for")
    if dataset.codec != pipeline.codec.spec():
        raise DataError(
            f"was encoded with {dataset.codec}, and the run has {pipeline.codec.spec()}",
            where=str(dataset.path),
            fix="Give the data set that the run was trained on (--data).",
        )
    cfg = replace(cfg or pipeline.recipe.sample, modality=dataset.modality)
    samples = [dataset.read(i) for i in range(len(dataset))]
    real = [pipeline.codec.decode(s.latent_CFHW).clamp(-1, 1) for s in samples]
    said = [_condition(s, pipeline) for s in samples]
    chosen = {name: _spread(ids, most) for name, ids in dataset.splits.items() if len(ids)}
    order = [i for ids in chosen.values() for i in ids]
    drawn = _draw(pipeline, cfg, order, real, said, scale, on_step)
    compared = [drawn[i] if scale == 1 else resize(drawn[i], (real[i].shape[3], real[i].shape[2])) for i in order]
    # Where captions repeat, and with classes, any picture of the same caption or class is the right one.
    right = {i: said[i] == said[found] for i, found in zip(order, nearest(compared, real), strict=True)}
    return Retrieval(
        top1={name: sum(right[i] for i in ids) / len(ids) for name, ids in chosen.items()},
        drawn={
            name: Drawn([drawn[i] for i in ids], [said[i] for i in ids], [real[i] for i in ids])
            for name, ids in chosen.items()
        },
        real=real,
        said=said,
    )


def _draw(
    pipeline: Pipeline,
    cfg: SampleConfig,
    order: Sequence[int],
    real: Sequence[Tensor],
    said: Sequence[Condition],
    scale: float,
    on_step: Progress | None,
) -> dict[int, Tensor]:
    """Pixels for each sample of the order, of its reference's frames and `scale` times its size.

    The noise of the k-th sample of the order is that of id k.
    """
    unit = pipeline.codec.factor * pipeline.spec.patch_size
    place = {i: k for k, i in enumerate(order)}
    drawn: dict[int, Tensor] = {}
    for frames in dict.fromkeys(real[i].shape[1] for i in order):
        same = [i for i in order if real[i].shape[1] == frames]
        sizes = [(scaled(real[i].shape[3], scale, unit), scaled(real[i].shape[2], scale, unit)) for i in same]
        pixels = pipeline.generate(
            [said[i] for i in same],
            replace(cfg, frames=frames),
            sizes=sizes,
            ids=[place[i] for i in same],
            on_step=on_step,
        )
        drawn |= dict(zip(same, pixels, strict=True))
    return drawn


@torch.no_grad()
def flow_losses(
    pipeline: Pipeline, dataset: Dataset, split_name: str, *, most: int | None = 64, bins: int = TIME_BINS
) -> dict[str, dict[str, float]]:
    """Mean squared error of the velocity by size and time: size ("24×24") → middle of a bin of t → loss.

    Noise belongs to the sample, so that checkpoints are compared at the same points.
    """
    objective = FlowMatching(pipeline.recipe.flow)
    sums: dict[str, dict[str, list[float]]] = {}
    times = [(k + 0.5) / bins for k in range(bins)]
    device = next(pipeline.model.parameters()).device
    t_S = torch.tensor(times, device=device)
    for i in _spread(dataset.splits[split_name], most):
        sample = dataset.read(i)
        condition = _condition(sample, pipeline)
        features, labels = pipeline.features([condition]), pipeline.labels([condition] * bins)
        text = None if features is None else PackedText.pack(features * bins)
        c, f, h, w = sample.latent_CFHW.shape
        # One pack holds the sample at all times.
        segments = [Segment(i, dataset.modality, (c, f, h, w))] * bins
        batch = pack(segments, [sample.latent_CFHW.float()] * bins, pipeline.spec, text=text, labels=labels).to(device)
        loss = objective.loss(pipeline.model, batch, draw_path(batch, t_S, pipeline.recipe.seed))
        at = sums.setdefault(f"{w * pipeline.codec.factor}×{h * pipeline.codec.factor}", {})
        for t, value in zip(times, loss.per_sample_S.tolist(), strict=True):
            at.setdefault(f"{t:.2f}", []).append(value)
    return {size: {t: sum(v) / len(v) for t, v in at.items()} for size, at in sums.items()}


def evaluate_run(
    run_dir: Path,
    *,
    data: str | None = None,
    most: int | None = None,
    scales: Sequence[float] = (1.0,),
    step: int | None = None,
    ema: int | None = None,
    fid: Path | None = None,
    clip: Path | None = None,
    preset_name: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Retrieval, flow loss, scores and feature distances of a run on the data that it was trained on.

    Writes the figures into the run folder's figures.json, more of them into evaluation.json, and for each split a sheet
    of generated pictures, each above the one that its caption belongs to. Of sounds, only the flow loss is measured.

    Args:
        run_dir: the run folder.
        data: folder of a data set; None: those of the recipe.
        most: captions of each split to draw; None: all.
        scales: times the references' sizes to draw at; figures of others than 1 have it in their name.
        step, ema: which weights; see `load_pipeline`.
        fid: weights of torch-fidelity's Inception network, for FID.
        clip: folder of a CLIP model, for CLIP scores.
        preset_name, settings: how to sample; see `sample.settings_of`.

    Returns:
        retrieval_top1 and prompts of the training split, the same with the split's name for others, and what the
        networks of `Scores` measure. Where a run has several data sets, their modality stands before each name.

    Raises:
        CheckpointError, RecipeError: the run cannot be sampled, or its folder not written.
        DataError: its data set cannot be read.
    """
    pipeline = load_pipeline(run_dir, step=step, ema=ema)
    cfg = settings_of(pipeline.recipe, preset_name, settings)
    paths = [data] if data else list(pipeline.recipe.data.sets) or [pipeline.recipe.data.path]
    datasets = [m.dataset for m in mixture_of(pipeline.recipe, dict.fromkeys(paths, 1.0)).members]
    scores = Scores(fid, clip)
    figures: dict[str, float] = {}
    losses: dict[str, Any] = {}
    for dataset in datasets:
        of = f"{dataset.modality}_" if len(datasets) > 1 else ""
        suited = pipeline.of(dataset.modality)
        for scale in scales if dataset.modality != "audio" else ():
            suffix = "" if scale == 1 else f"_at_{scale:g}x"
            count = sum(len(_spread(ids, most)) for ids in dataset.splits.values())
            with steps_shown("evaluating", count, cfg.steps) as on_step:
                found = evaluate_retrieval(suited, dataset, cfg=cfg, scale=scale, most=most, on_step=on_step)
            for split in found.top1:
                measured = _figures_of(found, split, split == pipeline.recipe.data.split, scores, suffix)
                figures |= {of + name: value for name, value in measured.items()}
                save_image(_sheet(found.drawn[split]), run_dir / f"retrieval_{of}{split}{suffix}.png")
        losses |= {of + split: flow_losses(suited, dataset, split) for split, ids in dataset.splits.items() if len(ids)}
    about = {"step": pipeline.step, "figures": figures, "loss_by_size_and_time": losses, "sample": asdict(cfg)}
    try:
        (run_dir / "figures.json").write_text(json.dumps(figures) + "\n")
        (run_dir / "evaluation.json").write_text(json.dumps(about, ensure_ascii=False, indent=1) + "\n")
    except OSError as error:
        raise CheckpointError(f"figures.json cannot be written: {error.strerror}", where=str(run_dir)) from error
    return figures


def _figures_of(found: Retrieval, split: str, is_train: bool, scores: Scores, suffix: str) -> dict[str, float]:
    """What was found of one split, by name."""
    name, prompts = ("retrieval_top1", "prompts") if is_train else (f"{split}_top1", f"{split}_prompts")
    drawn, of = found.drawn[split], "" if is_train else f"{split}_"
    measured = scores.captions(drawn, found.real, found.said) | scores.distances(drawn)
    return {
        name + suffix: round(found.top1[split], 4),
        prompts: len(drawn.pictures),
        **{f"{of}{key}{suffix}": value for key, value in measured.items()},
    }


def scaled(side: int, scale: float, unit: int) -> int:
    """The multiple of `unit` nearest to side · scale, at least one."""
    return max(round(side * scale / unit), 1) * unit


def _condition(sample: Encoded, pipeline: Pipeline) -> Condition:
    return sample.caption if pipeline.text_encoder else sample.label


def _spread(ids: range, most: int | None) -> list[int]:
    count = len(ids) if most is None else min(most, len(ids))
    return [ids[i * len(ids) // count] for i in range(count)]


def _sheet(drawn: Drawn) -> Image.Image:
    """Each generated picture above its reference."""
    pairs = list(zip(drawn.pictures, drawn.references, strict=True))[:MOST_ON_SHEET]
    cells = [grid([to_image(new), to_image(real)], columns=1, gap=0) for new, real in pairs]
    return grid(cells, columns=SHEET_COLUMNS, zoom=max(1, 48 // max(cell.width for cell in cells)), gap=4)
