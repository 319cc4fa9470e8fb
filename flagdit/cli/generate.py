"""Using a trained model: sample, evaluate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from flagdit.cli.common import PLAIN, RunFolder
from flagdit.errors import RecipeError

app = typer.Typer(**PLAIN)


@app.command()
def sample(
    run: RunFolder,
    prompt: Annotated[Optional[list[str]], typer.Option(help="What to draw; may be repeated.")] = None,
    prompt_file: Annotated[Optional[Path], typer.Option(help="A text file with one prompt per line.")] = None,
    label: Annotated[Optional[list[int]], typer.Option(help="Class id, for class-conditioned models.")] = None,
    size: Annotated[Optional[list[str]], typer.Option(help="WIDTHxHEIGHT in pixels; once, or once per prompt.")] = None,
    steps: Annotated[Optional[int], typer.Option(min=1, help="Solver steps.")] = None,
    solver: Annotated[Optional[str], typer.Option(help="euler, midpoint, heun, rk4 or dopri5.")] = None,
    guidance: Annotated[Optional[float], typer.Option(min=0, help="Guidance scale; 1: off.")] = None,
    shift: Annotated[Optional[float], typer.Option(min=1e-6, help="Shift of the time grid towards noise.")] = None,
    seed: Annotated[Optional[int], typer.Option(min=0, help="Seed of the noise.")] = None,
    ema: Annotated[Optional[int], typer.Option(min=-1, help="Average to use, from 0; -1: the raw weights.")] = None,
    step: Annotated[Optional[int], typer.Option(help="Checkpoint to use; the newest if not given.")] = None,
    frames: Annotated[
        Optional[int], typer.Option(min=1, help="Frames or views, for modalities that have them.")
    ] = None,
    modality: Annotated[
        Optional[str], typer.Option(help="image, video, multiview or audio, of those the model has.")
    ] = None,
    seconds: Annotated[Optional[float], typer.Option(min=0.01, help="Seconds of sound.")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Pictures of each prompt, from different noise.")] = 1,
    out: Annotated[
        Optional[Path], typer.Option(help="File to write: a picture, .mp4 or .gif, .wav; by default in this folder.")
    ] = None,
    separate: Annotated[bool, typer.Option("--separate", help="A file for each picture instead of one sheet.")] = False,
    captions: Annotated[bool, typer.Option("--captions", help="Write each prompt under its picture.")] = False,
) -> None:
    """Sample pictures, clips, views or sounds from a run. What is not given is as the recipe's `sample` block says.

    \b
    Example:
      flagdit sample runs/quickstart --prompt "a Twemoji emoji of trophy" --size 48x32 --steps 20 --out grid.png
    """
    from flagdit.generate.sample import read_prompts, sample_to_files

    prompts = [*(prompt or []), *(read_prompts(prompt_file) if prompt_file else [])]
    if prompts and label:
        raise RecipeError("--prompt and --label exclude each other", fix="A model follows text or classes.")
    settings = {
        "steps": steps,
        "solver": solver,
        "guidance": guidance,
        "shift": shift,
        "seed": seed,
        "frames": frames,
        "modality": modality,
        "seconds": seconds,
    }
    files = sample_to_files(
        run,
        prompts or label or [],
        out,
        sizes=size or [],
        repeat=repeat,
        step=step,
        ema=ema,
        separate=separate,
        captions=captions,
        settings=settings,
    )
    typer.echo("\n".join(str(file) for file in files))


@app.command()
def evaluate(
    run: RunFolder,
    data: Annotated[Optional[str], typer.Option(help="Data set; the one of the run if not given.")] = None,
    limit: Annotated[
        Optional[int], typer.Option(min=1, help="Captions of each split to draw; all if not given.")
    ] = None,
) -> None:
    """Measure whether pictures are what was asked for.

    Draws every caption of the run's data set and looks for the nearest real picture, by L2 in pixels, among all of
    them: is it the one that the caption belongs to? Writes figures.json and side-by-side sheets into the run folder.

    \b
    Example:
      flagdit evaluate runs/quickstart
    """
    from flagdit.generate.evaluate import evaluate_run

    typer.echo(json.dumps(evaluate_run(run, data=data, most=limit)))
