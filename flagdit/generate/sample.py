"""`flagdit sample`: prompts and sizes as a person gives them, pictures as files."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from flagdit.config.validate import parse_size
from flagdit.errors import RecipeError
from flagdit.generate.media import DEFAULT_NAMES, check_any_name, check_media_name, save_samples
from flagdit.generate.pipeline import Condition, Progress, load_pipeline


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
    settings: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Samples from a run and writes pictures, clips, views or sounds, as the modality is.

    Args:
        run_dir: the run folder.
        conditions: prompts, or class ids of class-conditioned models; none: the recipe's sample.prompts.
        out: the file; with `separate`, its name gets the number of each sample. None: a name by the modality.
        sizes: "WIDTHxHEIGHT", one for all or one for each; none: the recipe's sample.size.
        repeat: pictures of each condition, from different noise.
        step, ema: which weights; see `load_pipeline`.
        separate: a file for each picture, at its own size, instead of one sheet that enlarges small ones.
        captions: write each condition under its picture, on the sheet.
        settings: keys of the recipe's `sample` block that replace its values; None leaves one as it is.

    Returns:
        The files.

    Raises:
        RecipeError: prompts, sizes or settings that cannot be met, or a file that cannot be written.
        CheckpointError: the run cannot be read.
    """
    check_any_name(out)
    pipeline = load_pipeline(run_dir, step=step, ema=ema)
    model = pipeline.model.cfg
    cfg = replace(pipeline.recipe.sample, **{k: v for k, v in (settings or {}).items() if v is not None})
    pipeline = pipeline.of(cfg.modality)
    out = out or Path(DEFAULT_NAMES[cfg.modality])
    check_media_name(out, cfg.modality)
    conditions = list(conditions) or list(cfg.prompts) or ([] if model.text_dim or model.num_classes else [""])
    if not conditions:
        raise RecipeError("there is nothing to sample", fix="Give --prompt, --prompt-file or --label.")
    if len(sizes) > 1 and len(sizes) != len(conditions):
        raise RecipeError(
            f"{len(sizes)} sizes for {len(conditions)} prompts",
            where="--size",
            fix="Give one for all, or one for each.",
        )
    given = [parse_size(text) for text in sizes] or [pipeline.default_size(cfg)]
    each = given if len(given) == len(conditions) else given * len(conditions)
    conditions = [c for c in conditions for _ in range(repeat)]
    each = [size for size in each for _ in range(repeat)]
    with steps_shown("sampling", len(conditions), cfg.steps) as on_step:
        pixels = pipeline.generate(conditions, cfg, sizes=each, on_step=on_step)
    texts = [str(c) for c in conditions] if captions else None
    rate = pipeline.recipe.audio.sample_rate
    return save_samples(pixels, cfg.modality, out, rate=rate, separate=separate, captions=texts)


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
