"""The model card and the example of an exported folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flagdit.checkpoint.tensors import TensorSource
from flagdit.checkpoint.weights import ORIGIN, Weights
from flagdit.config.schema import Recipe
from flagdit.model.sizes import resolve

HERE = Path(__file__).parent
FIGURES = "figures.json"


@dataclass(frozen=True)
class Card:
    """What a format has to say in the card.

    Attributes:
        library: that reads the folder.
        title: what the folder is, in few words.
        example: file of `standalone/` that becomes example.py.
        use: how to open the folder, Markdown.
        notes: more sentences.
    """

    library: str
    title: str
    example: str
    use: str
    notes: tuple[str, ...] = ()


def write_card(folder: Path, card: Card, weights: Weights, tensors: TensorSource, run_dir: Path, licence: str) -> None:
    """Writes README.md and example.py."""
    import jinja2

    recipe = weights.recipe
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string((HERE / "templates" / "card.md.j2").read_text(encoding="utf-8"))
    text = template.render(
        name=recipe.name,
        model=resolve(recipe.model),
        modalities=", ".join(f"{name} ({channels} channels)" for name, channels in recipe.model.modalities.items()),
        parameters=f"{sum(entry.numel for entry in weights.tensors.entries.values()):,}",
        library=card.library,
        weights="raw" if weights.group == "model" else f"average, decay {weights.group.removeprefix('ema_')}",
        dtype=", ".join(sorted({str(e.dtype).removeprefix("torch.") for e in tensors.entries.values()})),
        step=weights.step,
        data=_data(weights),
        codec=_folder(recipe.codec.kind, recipe.codec.path),
        text=_folder(recipe.text.kind, recipe.text.path) if recipe.model.text_dim else "none",
        base=_name(recipe.train.init_from),
        adapters=f"rank {recipe.lora.rank}, alpha {recipe.lora.alpha:g}, on {', '.join(recipe.lora.targets)}"
        if recipe.lora.rank
        else "",
        licence=licence,
        use=card.use,
        sampling=_sampling(recipe),
        notes=card.notes,
        figures=_figures(run_dir),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    shutil.copyfile(HERE / "standalone" / card.example, folder / "example.py")


def _data(weights: Weights) -> str:
    """Every data set by its name and weight, and what is in them; for imported weights, where they come from."""
    if origin := weights.state.get(ORIGIN):
        return f"as trained by others ({origin['format']} {origin['name']})"
    data = weights.recipe.data
    names = _told_apart(list(data.sets) or [data.path])
    shares = [f" (weight {weight:g})" for weight in data.sets.values()] or [""]
    named = ", ".join(name + share for name, share in zip(names, shares, strict=True))
    return f"{named}, content {weights.state['data']}, split {data.split}"


def _told_apart(paths: list[str]) -> list[str]:
    """Folders by as many of their last parts as it takes to tell them apart."""
    parts = [Path(path).parts for path in paths]
    for count in range(1, max(map(len, parts))):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return paths


def _folder(kind: str, path: str | None) -> str:
    return f"{kind} {_name(path)}".strip()


def _name(path: str | None) -> str:
    """A hub name as it is, a folder by its last part: other machines' paths are nobody's business."""
    if not path:
        return ""
    return path if path.count("/") == 1 and not path.startswith((".", "/", "~")) else Path(path).name


def _sampling(recipe: Recipe) -> str:
    s = recipe.sample
    guided = f", the first {s.guidance_channels} channels" if s.guidance_channels else ""
    return f"{s.size} px, {s.solver}, {s.steps} steps, shift {s.shift:g}, guidance {s.guidance:g}{guided}"


def _figures(run_dir: Path) -> dict[str, Any]:
    """What was measured on the run, where it was."""
    file = run_dir / FIGURES
    if not file.is_file():
        return {}
    found = json.loads(file.read_text())
    return {name: value for name, value in found.items() if isinstance(value, (int, float, str))}
