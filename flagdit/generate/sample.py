"""`flagdit sample`: prompts and sizes as a person gives them, samples as files."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from flagdit.config.schema import Recipe, SampleConfig
from flagdit.config.validate import parse_size, problems_of, raise_problems
from flagdit.errors import RecipeError
from flagdit.generate.draw import Way, draw
from flagdit.generate.media import DEFAULT_NAMES, check_any_name, check_media_name, save_samples
from flagdit.generate.mesh import check_one_sample
from flagdit.generate.pipeline import Condition, Pipeline, Progress, load_pipeline
from flagdit.generate.presets import preset
from flagdit.model.modality import MODALITIES
from flagdit.parallel.mesh import ParallelContext


def sample_to_files(
    run_dir: Path,
    conditions: Sequence[Condition],
    out: Path | None = None,
    *,
    sizes: Sequence[str] = (),
    repeat: int = 1,
    step: int | None = None,
    ema: int | None = None,
    separate: bool = False,
    captions: bool = False,
    way: Way | None = None,
    preset_name: str | None = None,
    settings: Mapping[str, Any] | None = None,
    mesh: ParallelContext | None = None,
) -> list[Path]:
    """Samples from a run and writes pictures, clips, views or sounds, as the modality is.

    Args:
        run_dir: the run folder.
        conditions: prompts, or class ids of class-conditioned models; none: the recipe's sample.prompts.
        out: the file; with `separate`, its name gets the number of each sample. None: a name by the modality.
        sizes: "WIDTHxHEIGHT", one for all or one for each; none: the recipe's sample.size, or sample.seconds.
        repeat: pictures of each condition, from different noise.
        step, ema: which weights; see `load_pipeline`.
        separate: a file for each picture, at its own size, instead of one sheet that enlarges small ones.
        captions: write each condition under its picture, on the sheet.
        way: how they are drawn; None: each by itself.
        preset_name: settings by name; see `presets`.
        settings: keys of the recipe's `sample` block that replace its values; None leaves one as it is.
        mesh: ranks that draw together; all of them call this, and the first writes. None: this process alone.

    Returns:
        The files.

    Raises:
        RecipeError: prompts, sizes or settings that cannot be met, or a file that cannot be written.
        CheckpointError: the run cannot be read.
    """
    check_any_name(out)
    way = way or Way()
    way.check()
    mesh = mesh or ParallelContext()
    check_one_sample(mesh)
    pipeline = load_pipeline(run_dir, step=step, ema=ema, mesh=mesh)
    cfg = settings_of(pipeline.recipe, preset_name, settings)
    pipeline = pipeline.of(cfg.modality)
    out = out or Path(DEFAULT_NAMES[cfg.modality])
    check_media_name(out, cfg.modality)
    conditions = _conditions(pipeline, conditions, cfg, way)
    each = _sizes([parse_size(text) for text in sizes] or [pipeline.default_size(cfg)], len(conditions))
    if way.one_picture or way.share is not None:  # a repetition is another picture or set of all conditions
        rounds = [(conditions, each, i * len(conditions)) for i in range(repeat)]
    else:
        rounds = [([c for c in conditions for _ in range(repeat)], [s for s in each for _ in range(repeat)], 0)]
    pixels: list[Tensor] = []
    with steps_shown("sampling", sum(len(c) or 1 for c, _, _ in rounds), cfg.steps) as on_step:
        for round_conditions, round_sizes, first_id in rounds:
            told = on_step and partial(_after, on_step, len(pixels))
            pixels += draw(pipeline, round_conditions, cfg, way, sizes=round_sizes, first_id=first_id, on_step=told)
    # A picture of several conditions has them all under it.
    texts = [str(c) for r in rounds for c in r[0]]
    if way.one_picture:
        texts = [" · ".join(map(str, r[0])) for r in rounds]
    if not mesh.is_first:
        return []
    rate = pipeline.recipe.audio.sample_rate
    return save_samples(pixels, cfg.modality, out, rate=rate, separate=separate, captions=texts if captions else None)


def settings_of(recipe: Recipe, preset_name: str | None, settings: Mapping[str, Any] | None) -> SampleConfig:
    """The recipe's `sample` block with a preset over it and given settings over both.

    Raises:
        RecipeError: an unknown preset, or values that the recipe could not hold either.
    """
    given = {k: v for k, v in (settings or {}).items() if v is not None}
    if isinstance(given.get("train_size"), str) and given["train_size"].isdecimal():
        given["train_size"] = "x".join([given["train_size"]] * 2)
    modality = MODALITIES.get(given.get("modality", ""))
    if modality is not None and not modality.has_frames:
        given.setdefault("frames", 1)  # the recipe's frames are of the modality that it names
    changed = replace(recipe.sample, **{**(preset(preset_name) if preset_name else {}), **given})
    # What the run was trained with may be against a rule that came later: only what the settings change counts.
    before = {str(problem) for problem in problems_of(recipe)}
    raise_problems([p for p in problems_of(replace(recipe, sample=changed)) if str(p) not in before], recipe.name)
    return changed


def _conditions(
    pipeline: Pipeline, conditions: Sequence[Condition], cfg: SampleConfig, way: Way
) -> Sequence[Condition]:
    model = pipeline.model.cfg
    if conditions or way.regions:
        return list(conditions)
    found: list[Condition] = list(cfg.prompts) or ([] if model.text_dim or model.num_classes else [""])
    if not found:
        raise RecipeError("there is nothing to sample", fix="Give --prompt, --prompt-file or --label.")
    return found


def _sizes(given: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    if len(given) > 1 and len(given) != count:
        raise RecipeError(
            f"{len(given)} sizes for {count} prompts",
            where="--size",
            fix="Give one for all, or one for each.",
        )
    return given if len(given) == count else given * max(count, 1)


def _after(on_step: Progress, before: int, step: int, *, finished: int) -> None:
    on_step(step, finished=before + finished)


def read_prompts(file: Path) -> list[str]:
    """One prompt per line; empty lines are left out.

    Raises:
        RecipeError: no such file, not UTF-8, or no prompt in it.
    """
    try:
        prompts = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(f"the prompt file cannot be read: {why}", where=str(file)) from error
    if not prompts:
        raise RecipeError("the prompt file is empty", where=str(file), fix="Write one prompt per line.")
    return prompts


@contextmanager
def steps_shown(what: str, samples: int, steps: int) -> Iterator[Progress | None]:
    """A progress bar on a terminal; elsewhere nothing is shown and nothing is yielded to call."""
    if not sys.stdout.isatty():
        yield None
        return
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    with Bar(*columns, transient=True) as bar:
        task = bar.add_task(what, total=samples * steps, text="")

        def on_step(step: int, *, finished: int) -> None:
            bar.update(task, completed=finished * steps + step, text=f"{finished}/{samples}, step {step}")

        yield on_step
