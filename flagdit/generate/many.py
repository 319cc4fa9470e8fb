"""A file of prompts, drawn by as many ranks as there are: resumable, no picture twice, the same on any topology."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from flagdit.config.schema import SampleConfig
from flagdit.errors import RecipeError
from flagdit.generate.media import DEFAULT_NAMES, save_samples
from flagdit.generate.mesh import speaks
from flagdit.generate.pipeline import Condition, Pipeline, load_pipeline
from flagdit.generate.sample import settings_of, steps_shown
from flagdit.parallel.mesh import ParallelContext

SETTINGS = "settings.json"
DIGITS = 6


def draw_many(
    pipeline: Pipeline,
    prompts: Sequence[str],
    out: Path,
    cfg: SampleConfig,
    *,
    repeat: int = 1,
    rank: int = 0,
    size: int = 1,
    writes: bool = True,
    chunk: int = 16,
    on_chunk: Callable[[int, int], None] | None = None,
) -> int:
    """Draws `repeat` samples of every prompt into OUT/000000.png, …, leaving out those that are there.

    Picture i is of prompt i // repeat, and its noise a function of (cfg.seed, i) alone; so it is the same whichever
    rank draws it, beside whatever else, and after however many interruptions. Rank r of n draws the pictures i with
    i mod n = r. A file appears when it is whole.

    Args:
        pipeline: of the model.
        prompts: or class ids as text.
        out: a folder, made here. Its settings.json says what the pictures are of.
        cfg: the recipe's `sample` block.
        repeat: pictures of each prompt.
        rank, size: this process among those that draw different pictures.
        writes: whether this process writes; of ranks that draw one picture together, one does.
        chunk: pictures between two looks at the folder.
        on_chunk: told how many pictures are done, and of how many of this rank.

    Returns:
        Pictures drawn now by this rank.

    Raises:
        RecipeError: the folder holds pictures of other prompts, settings or weights, or cannot be written.
    """
    _claim(out, _request(pipeline, prompts, repeat, cfg), writes and rank == 0)
    mine = range(rank, len(prompts) * repeat, size)
    files = {i: out / f"{i:0{DIGITS}d}{Path(DEFAULT_NAMES[cfg.modality]).suffix}" for i in mine}
    missing = [i for i in mine if not files[i].exists()]
    done = len(mine) - len(missing)
    for start in range(0, len(missing), chunk):
        ids = missing[start : start + chunk]
        drawn = pipeline.generate([prompts[i // repeat] for i in ids], cfg, ids=ids)
        for i, sample in zip(ids, drawn, strict=True):
            if writes:
                _write(files[i], sample, cfg.modality, pipeline.recipe.audio.sample_rate)
        if on_chunk:
            on_chunk(done + start + len(ids), len(mine))
    return len(missing)


def sample_many(
    run_dir: Path,
    conditions: Sequence[Condition],
    out: Path,
    *,
    sizes: Sequence[str] = (),
    repeat: int = 1,
    step: int | None = None,
    ema: int | None = None,
    preset_name: str | None = None,
    settings: Mapping[str, Any] | None = None,
    mesh: ParallelContext | None = None,
) -> str:
    """`flagdit sample --out-dir`: see `draw_many` and, for the arguments, `sample.sample_to_files`.

    Returns:
        A line that says what was done.

    Raises:
        RecipeError, CheckpointError: as those.
    """
    mesh = mesh or ParallelContext()
    if len(sizes) > 1:
        raise RecipeError("--out-dir draws one size", where="--size", fix="Give one.")
    given = dict(settings or {}) | ({"size": sizes[0]} if sizes else {}) | ({} if ema is None else {"ema": ema})
    pipeline = load_pipeline(run_dir, step=step, ema=ema, mesh=mesh)
    cfg = settings_of(pipeline.recipe, preset_name, given)
    pipeline = pipeline.of(cfg.modality)
    prompts = [str(c) for c in conditions or cfg.prompts]
    count = len(prompts) * repeat
    if mesh.is_first:
        _claim(out, _request(pipeline, prompts, repeat, cfg), writes=True)
    mesh.from_first(None)  # nobody writes into a folder that is not claimed yet
    with steps_shown("sampling", count, 1) as on_step:
        drawn = draw_many(
            pipeline,
            prompts,
            out,
            cfg,
            repeat=repeat,
            rank=mesh.data.rank,
            size=mesh.data.size,
            writes=speaks(mesh),
            on_chunk=None if on_step is None or not mesh.is_first else lambda done, _: on_step(0, finished=done),
        )
    share = f" on rank {mesh.rank}" if mesh.world > 1 else ""
    return f"{out}: {drawn} of {count} pictures drawn now{share}"


def _write(file: Path, sample: Tensor, modality: str, rate: int) -> None:
    (staged,) = save_samples([sample], modality, file.with_stem(f"{file.stem}.tmp"), rate=rate, separate=True)
    try:
        os.replace(staged, file)
    except OSError as error:
        raise RecipeError(f"the sample cannot be written: {error.strerror or error}", where=str(file)) from error


def _request(pipeline: Pipeline, prompts: Sequence[str], repeat: int, cfg: SampleConfig) -> dict:
    """What the folder's pictures are of, and by which weights."""
    return {"prompts": list(prompts), "repeat": repeat, "sample": asdict(cfg), "step": pipeline.step}


def _claim(out: Path, settings: dict, writes: bool) -> None:
    """Makes the folder, or finds that it holds pictures of the same request."""
    file = out / SETTINGS
    try:
        out.mkdir(parents=True, exist_ok=True)
        if file.exists():
            if json.loads(file.read_text()) != json.loads(json.dumps(settings)):
                raise RecipeError(
                    "the folder holds pictures of other prompts or settings, or of another checkpoint",
                    where=str(out),
                    fix="Give another folder; or, to go on, the same prompts, settings and --step.",
                )
        elif writes:
            if any(out.iterdir()):
                raise RecipeError(
                    "the folder is not empty and holds no request", where=str(out), fix="Give another one."
                )
            staged = file.with_suffix(".tmp")
            staged.write_text(json.dumps(settings))
            os.replace(staged, file)
    except json.JSONDecodeError as error:
        raise RecipeError(f"it is damaged: {error.msg}", where=str(file), fix="Remove the folder.") from error
    except OSError as error:
        raise RecipeError(f"the folder cannot be written: {error.strerror}", where=str(out)) from error
