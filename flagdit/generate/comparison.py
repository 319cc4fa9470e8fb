"""`flagdit compare`: checkpoints side by side on one page."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from flagdit.errors import RecipeError
from flagdit.generate.images import to_image
from flagdit.generate.pipeline import load_pipeline
from flagdit.generate.sample import settings_of, steps_shown

TILE = 96
"""Pixels below which pictures are enlarged on the page."""


@dataclass(frozen=True)
class Column:
    """One checkpoint.

    Attributes:
        name: run and step.
        pictures: data URIs, one per prompt.
        figures: what `flagdit evaluate` measured, of this step only.
    """

    name: str
    pictures: list[str]
    figures: Mapping[str, Any]


def write_comparison(
    runs: Sequence[Path],
    out: Path,
    *,
    prompts: Sequence[str] = (),
    preset_name: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Draws the same prompts from the same noise with every checkpoint, and writes one HTML page that needs no other
    file.

    Args:
        runs: run folders, each the newest checkpoint or RUN@STEP.
        out: the page.
        prompts: none: those of the first run's recipe.
        preset_name, settings: how to sample; see `sample.settings_of`.

    Returns:
        The page.

    Raises:
        RecipeError: nothing to draw, or the page cannot be written.
        CheckpointError: a run cannot be read.
    """
    columns: list[Column] = []
    for run in runs:
        folder, step = parse_run(str(run))
        pipeline = load_pipeline(folder, step=step)
        cfg = settings_of(pipeline.recipe, preset_name, settings)
        prompts = list(prompts) or list(cfg.prompts)
        if not prompts:
            raise RecipeError("there is nothing to draw", fix="Give --prompt.")
        if cfg.modality == "audio":
            raise RecipeError("the page shows pictures, and this run makes sounds", where=str(run))
        with steps_shown(f"drawing {run}", len(prompts), cfg.steps) as on_step:
            pixels = pipeline.generate(prompts, cfg, on_step=on_step)
        name = f"{folder.name} @ {pipeline.step:,}"
        columns.append(Column(name, [_data_uri(to_image(p)) for p in pixels], _figures(folder, pipeline.step)))
    names = sorted({name for column in columns for name in column.figures})
    env = Environment(loader=PackageLoader("flagdit.generate", "templates"), autoescape=True, undefined=StrictUndefined)
    page = env.get_template("comparison.html.j2").render(columns=columns, prompts=prompts, figures=names)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"the page cannot be written: {error.strerror}", where=str(out)) from error
    return out


def parse_run(text: str) -> tuple[Path, int | None]:
    """'RUN' or 'RUN@STEP' → folder and step."""
    folder, at, step = text.rpartition("@")
    return (Path(folder), int(step)) if at and step.isdecimal() else (Path(text), None)


def _figures(run: Path, step: int | None) -> dict[str, Any]:
    file = run / "evaluation.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    return found["figures"] if found.get("step") == step else {}


def _data_uri(image) -> str:
    zoom = max(1, TILE // max(image.size))
    stream = io.BytesIO()
    image.resize((image.width * zoom, image.height * zoom), 0).save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
