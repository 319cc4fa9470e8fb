"""How well a model draws what it is asked for, on a data set whose pictures are known.

Shape legend: B pictures of one size, Z values of one picture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flagdit.batch import PackedText, Segment
from flagdit.config.schema import SampleConfig
from flagdit.data_pipelines.index import Dataset, Encoded
from flagdit.errors import CheckpointError, DataError, RecipeError
from flagdit.flow.objective import FlowMatching
from flagdit.flow.path import draw_path
from flagdit.generate.features import ClipScores, frechet, inception, lite0, lite0_installed
from flagdit.generate.images import grid, save_image, to_image
from flagdit.generate.pipeline import Condition, Pipeline, Progress, load_pipeline
from flagdit.generate.resolution import resize
from flagdit.generate.sample import settings_of, steps_shown
from flagdit.model.tokens import pack

SHEET_COLUMNS, MOST_ON_SHEET = 20, 200
TIME_BINS = 10


@dataclass(frozen=True)
class Retrieval:
    """What was generated and found, by split, in the order of the data set.

    Attributes:
        top1: share of generated pictures whose nearest neighbour has the caption (or class) that was asked for.
        generated, references: pixels (3, F, H, W).
        captions: what was asked for.
    """

    top1: dict[str, float]
    generated: dict[str, list[Tensor]]
    references: dict[str, list[Tensor]]
    captions: dict[str, list[str]]


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
    samples = [dataset.read(i) for i in range(len(dataset))]
    pictures = [pipeline.codec.decode(s.latent_CFHW).clamp(-1, 1) for s in samples]
    chosen = {name: _spread(ids, most) for name, ids in dataset.splits.items() if len(ids)}
    order = [i for ids in chosen.values() for i in ids]
    unit = pipeline.codec.factor * pipeline.spec.patch_size
    own_sizes = [(pictures[i].shape[3], pictures[i].shape[2]) for i in order]
    drawn = pipeline.generate(
        [_condition(samples[i], pipeline) for i in order],
        cfg or pipeline.recipe.sample,
        sizes=[(scaled(w, scale, unit), scaled(h, scale, unit)) for w, h in own_sizes],
        on_step=on_step,
    )
    generated = dict(zip(order, drawn, strict=True))
    compared = drawn if scale == 1 else [resize(p, size) for p, size in zip(drawn, own_sizes, strict=True)]
    # Where captions repeat, and with classes, any picture of the same caption or class is the right one.
    found = dict(zip(order, nearest(compared, pictures), strict=True))
    right = {i: _condition(samples[i], pipeline) == _condition(samples[found[i]], pipeline) for i in order}
    return Retrieval(
        top1={name: sum(right[i] for i in ids) / len(ids) for name, ids in chosen.items()},
        generated={name: [generated[i] for i in ids] for name, ids in chosen.items()},
        references={name: [pictures[i] for i in ids] for name, ids in chosen.items()},
        captions={name: [str(_condition(samples[i], pipeline)) for i in ids] for name, ids in chosen.items()},
    )


@torch.no_grad()
def flow_losses(
    pipeline: Pipeline, dataset: Dataset, split_name: str, *, most: int | None = 64, bins: int = TIME_BINS
) -> dict[str, dict[str, float]]:
    """Mean squared error of the velocity by size and time: size ("24×24") → middle of a bin of t → loss.

    Noise belongs to the sample, so that checkpoints are compared at the same points.
    """
    objective = FlowMatching(pipeline.recipe.flow)
    sums: dict[str, dict[str, list[float]]] = {}
    for i in _spread(dataset.splits[split_name], most):
        sample = dataset.read(i)
        condition = _condition(sample, pipeline)
        features, labels = pipeline.features([condition]), pipeline.labels([condition])
        text = None if features is None else PackedText.pack(features)
        c, f, h, w = sample.latent_CFHW.shape
        segment = Segment(i, pipeline.recipe.sample.modality, (c, f, h, w))
        batch = pack([segment], [sample.latent_CFHW.float()], pipeline.spec, text=text, labels=labels)
        batch = batch.to(next(pipeline.model.parameters()).device)
        at = sums.setdefault(f"{w * pipeline.codec.factor}×{h * pipeline.codec.factor}", {})
        for k in range(bins):
            t = (k + 0.5) / bins
            t_S = torch.full((1,), t, device=batch.layout.cu_seqlens.device)
            loss = objective.loss(pipeline.model, batch, draw_path(batch, t_S, pipeline.recipe.seed))
            at.setdefault(f"{t:.2f}", []).append(float(loss.per_sample_S[0]))
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
    """Retrieval, flow loss and feature distances of a run on the data set that it was trained on.

    Writes the figures into the run folder's figures.json, more of them into evaluation.json, and for each split a sheet
    of generated pictures, each above the one that its caption belongs to.

    Args:
        run_dir: the run folder.
        data: folder of the data set; None: the recipe's data.path.
        most: captions of each split to draw; None: all.
        scales: times the references' sizes to draw at; figures of others than 1 have it in their name.
        step, ema: which weights; see `load_pipeline`.
        fid: weights of torch-fidelity's Inception network, for FID.
        clip: folder of a CLIP model, for CLIP scores.
        preset_name, settings: how to sample; see `sample.settings_of`.

    Returns:
        retrieval_top1 and prompts of the training split; heldout_top1 and heldout_prompts, where there is one; fd_lite0
        of each split where that network is installed; and what the given networks measure.

    Raises:
        CheckpointError, RecipeError: the run cannot be sampled, or its folder not written.
        DataError: its data set cannot be read.
    """
    pipeline = load_pipeline(run_dir, step=step, ema=ema)
    cfg = settings_of(pipeline.recipe, preset_name, settings)
    dataset = Dataset.open(data or pipeline.recipe.data.path)
    networks = {"fd_lite0": lite0()} if lite0_installed() else {}
    networks |= {"fid": inception(fid)} if fid else {}
    clip_scores = ClipScores(clip) if clip else None
    count = sum(len(_spread(ids, most)) for ids in dataset.splits.values())
    figures: dict[str, float] = {}
    for scale in scales:
        suffix = "" if scale == 1 else f"_at_{scale:g}x"
        with steps_shown("evaluating", count, cfg.steps) as on_step:
            found = evaluate_retrieval(pipeline, dataset, cfg=cfg, scale=scale, most=most, on_step=on_step)
        for split, share in found.top1.items():
            is_train = split == pipeline.recipe.data.split
            name, prompts = ("retrieval_top1", "prompts") if is_train else (f"{split}_top1", f"{split}_prompts")
            figures |= {name + suffix: round(share, 4), prompts: len(found.generated[split])}
            of = "" if is_train else f"{split}_"
            for network, features in networks.items():
                distance = frechet(features(found.generated[split]), features(found.references[split]))
                figures[of + network + suffix] = round(distance, 3)
            if clip_scores:
                scores = clip_scores(found.generated[split], found.captions[split])
                figures |= {of + k + suffix: round(v, 4) for k, v in scores.items()}
            sheet = _sheet(found.generated[split], found.references[split])
            save_image(sheet, run_dir / f"retrieval_{split}{suffix}.png")
    losses = {split: flow_losses(pipeline, dataset, split) for split, ids in dataset.splits.items() if len(ids)}
    about = {"step": pipeline.step, "figures": figures, "loss_by_size_and_time": losses, "sample": asdict(cfg)}
    try:
        (run_dir / "figures.json").write_text(json.dumps(figures) + "\n")
        (run_dir / "evaluation.json").write_text(json.dumps(about, ensure_ascii=False, indent=1) + "\n")
    except OSError as error:
        raise CheckpointError(f"figures.json cannot be written: {error.strerror}", where=str(run_dir)) from error
    return figures


def scaled(side: int, scale: float, unit: int) -> int:
    """The multiple of `unit` nearest to side · scale, at least one."""
    return max(round(side * scale / unit), 1) * unit


def _condition(sample: Encoded, pipeline: Pipeline) -> Condition:
    return sample.caption if pipeline.text_encoder else sample.label


def _spread(ids: range, most: int | None) -> list[int]:
    count = len(ids) if most is None else min(most, len(ids))
    return [ids[i * len(ids) // count] for i in range(count)]


def _sheet(generated: Sequence[Tensor], references: Sequence[Tensor]) -> Image.Image:
    """Each generated picture above its reference."""
    pairs = list(zip(generated, references, strict=True))[:MOST_ON_SHEET]
    cells = [grid([to_image(drawn), to_image(real)], columns=1, gap=0) for drawn, real in pairs]
    return grid(cells, columns=SHEET_COLUMNS, zoom=max(1, 48 // max(cell.width for cell in cells)), gap=4)
