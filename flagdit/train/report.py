"""One self-contained HTML page about a run: curves, pictures over time, figures, recipe, environment."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from flagdit.config.keys import flatten
from flagdit.config.load import load_recipe
from flagdit.config.schema import Recipe
from flagdit.errors import CheckpointError
from flagdit.train.charts import Series, line_chart, smoothed
from flagdit.train.display import duration, quantity
from flagdit.train.folder import RunFolder, read_lines, write_atomically

MOST_STEPS = 8
MOST_PROMPTS = 12
MOST_PICTURES = 6
MOST_EVENTS = 20
MOST_SIZES = 40
BIG_PICTURE = 60_000
"""Bytes of a PNG above which the page holds a JPEG of it."""


def write_report(run_dir: Path | str) -> Path:
    """Writes `report.html` into a run folder, from what the run has logged so far.

    What `flagdit evaluate` left in the folder is shown if it is there: `figures.json`, a flat object, as a table, the
    losses in `evaluation.json` as another, and the pictures at the top of the folder.

    Raises:
        CheckpointError: the folder holds no run.
    """
    folder = RunFolder(Path(run_dir))
    if not folder.recipe.exists():
        raise CheckpointError(
            "there is no recipe.yaml, so this is not a run folder",
            where=str(run_dir),
            fix="Give the folder that `flagdit train` made: runs/NAME.",
        )
    recipe = load_recipe(folder.recipe)
    logged = read_lines(folder.metrics) if folder.metrics.exists() else []
    training = [line for line in logged if "loss" in line]
    validation = [line for line in logged if "val_loss" in line]
    starts = read_lines(folder.environment) if folder.environment.exists() else []
    bad = read_lines(folder.ledger) if folder.ledger.exists() else []
    page = _template().render(
        recipe=recipe,
        tiles=_tiles(recipe, training, validation, starts),
        finished=bool(training) and training[-1]["step"] >= recipe.train.steps,
        step=training[-1]["step"] if training else 0,
        charts=_charts(training, validation),
        grids=_grids(folder),
        figures=_figures(folder),
        losses=_losses(folder),
        pictures=_pictures(folder),
        events=bad[-MOST_EVENTS:],
        event_count=len(bad),
        blocks=_recipe_blocks(recipe),
        starts=starts,
    )
    write_atomically(folder.report, page)
    return folder.report


def _template():
    env = Environment(
        loader=PackageLoader("flagdit.train", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return env.get_template("report.html.j2")


def _tiles(
    recipe: Recipe, training: list[dict], validation: list[dict], starts: list[dict]
) -> list[tuple[str, str, str]]:
    """The figures at the top: (name, value, remark)."""
    tiles = []
    if training:
        last = training[-1]
        tiles.append(("Steps", f"{last['step']:,}", f"of {recipe.train.steps:,}"))
    if starts:
        tiles.append(("Parameters", quantity(starts[-1]["parameters"]), ""))
    if training:
        tiles.append(("Tokens seen", quantity(last["tokens"]), f"{last['samples']:,} samples"))
        again = f"{len(starts)} starts" if len(starts) > 1 else ""
        tiles.append(("Wall time", duration(last["seconds"]), again))
        curve = _curve(training, "loss")
        if curve:
            tiles.append(("Loss", f"{smoothed(curve)[-1][1]:.4f}", f"from {curve[0][1]:.3f}"))
    if validation:
        best = min(validation, key=lambda line: line["val_loss"])
        tiles.append(
            ("Held-out loss", f"{validation[-1]['val_loss']:.4f}", f"best {best['val_loss']:.4f} at {best['step']:,}")
        )
    if training:
        rates = sorted(line["tokens_per_s"] for line in training)
        mfu = f"MFU {last['mfu']:.1%}" if last["mfu"] is not None else ""
        tiles.append(("Throughput", f"{quantity(rates[len(rates) // 2])} tok/s", mfu))
        tiles.append(("Bad steps", str(last["bad_steps"]), "skipped by the guard" if last["bad_steps"] else ""))
    return tiles


def _curve(lines: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(line["step"], line[name]) for line in lines if line[name] is not None]


def _charts(training: list[dict], validation: list[dict]) -> list[tuple[str, list[Series], Markup]]:
    """(title, series with a name, SVG) of every chart that has something to show."""
    loss, norm, rate = (_curve(training, name) for name in ("loss", "grad_norm", "tokens_per_s"))
    held_out = _curve(validation, "val_loss")
    times = list(validation[-1]["val_loss_at"]) if validation else []
    at = {t: [(v["step"], v["val_loss_at"][t]) for v in validation if t in v["val_loss_at"]] for t in times}
    weights = validation[-1]["val_weights"] if validation else ""
    drawn: list[tuple[str, list[Series], str]] = [
        ("Training loss", [Series("", loss, 1, faint=True), Series("smoothed", smoothed(loss), 1)], ""),
        ("Held-out loss", [Series(f"mean over t, {weights}", held_out, 2, dots=True)], ""),
        ("Held-out loss by t", [Series(f"t = {t}", points, i % 6 + 1) for i, (t, points) in enumerate(at.items())], ""),
        ("Gradient norm", [Series("", norm, 3, faint=True), Series("smoothed", smoothed(norm), 3)], ""),
        ("Throughput", [Series("tokens per second", rate, 4)], " tokens/s"),
        ("MFU", [Series("share of peak", _curve(training, "mfu"), 5)], ""),
        ("Learning rate", [Series("learning rate", _curve(training, "lr"), 6)], ""),
    ]
    from_zero = {"Throughput", "MFU", "Learning rate"}
    charts = []
    for title, series, unit in drawn:
        svg = line_chart(series, zero=title in from_zero, unit=unit)
        if svg:
            charts.append((title, [s for s in series if s.name], svg))
    return charts


def _grids(folder: RunFolder) -> dict[str, Any] | None:
    """Sample grids cut into pictures: one row a prompt, one column a step, evenly chosen where there are many."""
    found = [(json.loads(file.read_text()), file.with_suffix(".png")) for file in sorted(folder.samples.glob("*.json"))]
    if not found:
        return None
    about = found[-1][0]
    # Prompts and sizes may have been changed between two starts; one table holds pictures of one kind.
    files = [file for other, file in found if other == about and file.exists()]
    last = len(files) - 1
    chosen = list(range(last + 1))
    if last >= MOST_STEPS:
        chosen = sorted({round(i * last / (MOST_STEPS - 1)) for i in range(MOST_STEPS)})
    columns = [_tiles_of(files[i], about) for i in chosen]
    prompts = about["prompts"][:MOST_PROMPTS]
    return {
        "steps": [int(files[i].stem.removeprefix("step_")) for i in chosen],
        "rows": [(prompt, [column[i] for column in columns]) for i, prompt in enumerate(prompts)],
        "weights": about["weights"],
        "left_out": len(files) - len(columns) + len(about["prompts"]) - len(prompts),
        "tiny": about["zoom"] > 1,
        "wide": about["tile"][0] > 2 * about["tile"][1],
    }


def _tiles_of(file: Path, about: dict[str, Any]) -> list[str]:
    """The pictures of a grid, at their own size, as data URIs."""
    from PIL import Image

    width, height = (side * about["zoom"] for side in about["tile"])
    tiles = []
    with Image.open(file) as sheet:
        for i in range(min(len(about["prompts"]), MOST_PROMPTS)):
            x = i % about["columns"] * (width + about["gap"])
            y = i // about["columns"] * (height + about["gap"])
            tile = sheet.crop((x, y, x + width, y + height)).resize(about["tile"], Image.Resampling.NEAREST)
            buffer = io.BytesIO()
            tile.save(buffer, "PNG")
            tiles.append(_data_uri(buffer.getvalue()))
    return tiles


def _data_uri(png: bytes) -> str:
    """A picture for the page, as JPEG where a PNG would be big."""
    if len(png) < BIG_PICTURE:
        return f"data:image/png;base64,{base64.b64encode(png).decode()}"
    from PIL import Image

    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(buffer, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _pictures(folder: RunFolder) -> list[tuple[str, str]]:
    """(name, data URI) of the pictures at the top of the run folder."""
    files = sorted(folder.path.glob("*.png"))[:MOST_PICTURES]
    return [(file.stem.replace("_", " "), _data_uri(file.read_bytes())) for file in files]


def _figures(folder: RunFolder) -> list[tuple[str, str]]:
    file = folder.path / "figures.json"
    if not file.exists():
        return []
    found = json.loads(file.read_text())
    return [(name.replace("_", " "), _figure(name, value)) for name, value in found.items()]


def _losses(folder: RunFolder) -> list[tuple[str, dict[str, float]]]:
    """(split and size, time → loss) of the flow loss by size and time."""
    file = folder.path / "evaluation.json"
    found = json.loads(file.read_text())["loss_by_size_and_time"] if file.exists() else {}
    rows = [(f"{split}, {size}", losses) for split, sizes in found.items() for size, losses in sizes.items()]
    return rows[:MOST_SIZES]


def _figure(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1%}" if "_top1" in name or name.endswith("_share") else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _recipe_blocks(recipe: Recipe) -> dict[str, list[tuple[str, str, bool]]]:
    """Block → (key, value, whether it differs from the default), the top-level keys under the empty name."""
    defaults = flatten(Recipe())
    blocks: dict[str, list[tuple[str, str, bool]]] = {}
    for dotted, value in flatten(recipe).items():
        block, _, name = dotted.rpartition(".")
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        blocks.setdefault(block, []).append((name, text, value != defaults[dotted]))
    return blocks
