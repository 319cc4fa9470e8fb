"""Groups of options that several commands share, each a dataclass whose fields are the options.

A command takes a group as one parameter; `grouped` spreads it out for typer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, get_type_hints

import typer

if TYPE_CHECKING:
    from flagdit.generate.draw import Way


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the fields of its dataclass parameters as parameters of its own."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {p.name: p.annotation for p in signature.parameters.values() if is_dataclass(p.annotation)}
    flat: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        if parameter.name not in groups:
            flat.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        group = groups[parameter.name]
        hints = get_type_hints(group, include_extras=True)
        flat += [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
            for f in fields(group)
        ]

    @wraps(command)
    def flattened(**given: Any) -> None:
        built = {name: group(**{f.name: given.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        command(**given, **built)

    flattened.__signature__ = signature.replace(parameters=flat)  # type: ignore[attr-defined]
    flattened.__annotations__ = {p.name: p.annotation for p in flat}
    return flattened


@dataclass(frozen=True)
class Weights:
    """Which weights of a run."""

    ema: Annotated[Optional[int], typer.Option(min=-1, help="Average to use, from 0; -1: the raw weights.")] = None
    step: Annotated[Optional[int], typer.Option(help="Checkpoint to use; the newest if not given.")] = None


@dataclass(frozen=True)
class Solving:
    """How the flow is solved. All but the preset are keys of the recipe's `sample` block."""

    preset: Annotated[
        Optional[str], typer.Option(help="Solver, steps and schedule by name: draft, fast, standard, fine.")
    ] = None
    steps: Annotated[Optional[int], typer.Option(min=1, help="Solver steps.")] = None
    solver: Annotated[Optional[str], typer.Option(help="euler, midpoint, heun, rk4 or dopri5.")] = None
    schedule: Annotated[Optional[str], typer.Option(help="Time grid: linear or sigmoid.")] = None
    shift: Annotated[Optional[float], typer.Option(min=1e-6, help="Shift of the time grid towards noise.")] = None
    guidance: Annotated[Optional[float], typer.Option(min=0, help="Guidance scale; 1: off.")] = None
    guidance_interval: Annotated[
        Optional[tuple[float, float]], typer.Option(help="Times from which to which there is guidance, as 0.1 0.8.")
    ] = None
    guidance_rescale: Annotated[
        Optional[float], typer.Option(min=0, max=1, help="Against overexposure by guidance: a share.")
    ] = None
    guidance_reuse: Annotated[
        Optional[int], typer.Option(min=1, help="Evaluations that share one unconditional half.")
    ] = None
    seed: Annotated[Optional[int], typer.Option(min=0, help="Seed of the noise.")] = None
    train_size: Annotated[
        Optional[str], typer.Option(help="Largest size of training, as 1024 or 1024x512; larger ones are scaled.")
    ] = None
    scaling: Annotated[
        Optional[str],
        typer.Option(help="Of positions beyond --train-size: none, linear, ntk, time_aware, time_switch."),
    ] = None

    def settings(self) -> dict[str, Any]:
        """What is given, as the recipe's `sample` block holds it."""
        given = {k: v for k, v in asdict(self).items() if v is not None and k != "preset"}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}


@dataclass(frozen=True)
class Medium:
    """What kind of sample, and how long. Keys of the recipe's `sample` block."""

    modality: Annotated[
        Optional[str], typer.Option(help="image, video, multiview or audio, of those the model has.")
    ] = None
    frames: Annotated[Optional[int], typer.Option(min=1, help="Frames or views, for modalities that have them.")] = None
    seconds: Annotated[Optional[float], typer.Option(min=0.01, help="Seconds of sound.")] = None


@dataclass(frozen=True)
class Together:
    """Other ways to draw than each prompt by itself; `generate.draw.Way` as text and files."""

    upscale: Annotated[
        Optional[float], typer.Option(min=0, max=1, help="In stages from --train-size; the share drawn anew, as 0.6.")
    ] = None
    share: Annotated[
        Optional[float], typer.Option(min=0, max=1, help="One style for all prompts, which see each other until t.")
    ] = None
    region: Annotated[
        Optional[list[str]], typer.Option(help="'WIDTHxHEIGHT+LEFT+TOP PROMPT'; may be repeated. --prompt: the rest.")
    ] = None
    window: Annotated[
        Optional[str], typer.Option(help="Panorama: WIDTHxHEIGHT of overlapping windows; prompts from left to right.")
    ] = None
    wrap: Annotated[bool, typer.Option("--wrap", help="The panorama's right edge joins its left one.")] = False
    scenes: Annotated[bool, typer.Option("--scenes", help="One video whose scenes are the prompts.")] = False
    window_frames: Annotated[Optional[int], typer.Option(min=1, help="Frames of a scene drawn at once.")] = None
    loop: Annotated[bool, typer.Option("--loop", help="The video's end leads back to its start.")] = False
    first_frame: Annotated[Optional[Path], typer.Option(help="A picture that the video starts from.")] = None

    def way(self) -> Way:
        """As the functions of `generate` take it.

        Raises:
            RecipeError: what cannot be read, or ways that exclude each other.
        """
        from flagdit.generate.draw import Way

        given = asdict(self)
        return Way.of(regions=given.pop("region") or [], **given)
