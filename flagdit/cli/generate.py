"""Commands that use a trained model: `flagdit sample`, `edit`, `evaluate`, `compare` and `serve`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from flagdit.cli.common import PLAIN, RunFolder
from flagdit.errors import RecipeError

app = typer.Typer(**PLAIN)

Prompts = Annotated[Optional[list[str]], typer.Option("--prompt", help="What to draw; may be repeated.")]
Labels = Annotated[Optional[list[int]], typer.Option("--label", help="Class id, for class-conditioned models.")]
Steps = Annotated[Optional[int], typer.Option(min=1, help="Solver steps.")]
Solver = Annotated[Optional[str], typer.Option(help="euler, midpoint, heun, rk4 or dopri5.")]
Preset = Annotated[Optional[str], typer.Option(help="Solver, steps and schedule by name: draft, fast, standard, fine.")]
Guidance = Annotated[Optional[float], typer.Option(min=0, help="Guidance scale; 1: off.")]
Shift = Annotated[Optional[float], typer.Option(min=1e-6, help="Shift of the time grid towards noise.")]
Schedule = Annotated[Optional[str], typer.Option(help="Time grid: linear or sigmoid.")]
Interval = Annotated[
    Optional[tuple[float, float]], typer.Option(help="Times from which to which there is guidance, such as 0.1 0.8.")
]
Rescale = Annotated[Optional[float], typer.Option(min=0, max=1, help="Against overexposure by guidance: a share.")]
Reuse = Annotated[Optional[int], typer.Option(min=1, help="Evaluations that share one unconditional half.")]
Seed = Annotated[Optional[int], typer.Option(min=0, help="Seed of the noise.")]
Ema = Annotated[Optional[int], typer.Option(min=-1, help="Average to use, from 0; -1: the raw weights.")]
Step = Annotated[Optional[int], typer.Option(help="Checkpoint to use; the newest if not given.")]
TrainSize = Annotated[
    Optional[str], typer.Option(help="Largest size of training, as 1024 or 1024x512; larger ones are scaled.")
]
Scaling = Annotated[
    Optional[str], typer.Option(help="Of positions beyond --train-size: none, linear, ntk, time_aware, time_switch.")
]


@app.command()
def sample(
    run: RunFolder,
    prompt: Prompts = None,
    prompt_file: Annotated[Optional[Path], typer.Option(help="A text file with one prompt per line.")] = None,
    label: Labels = None,
    size: Annotated[Optional[list[str]], typer.Option(help="WIDTHxHEIGHT in pixels; once, or once per prompt.")] = None,
    preset: Preset = None,
    steps: Steps = None,
    solver: Solver = None,
    schedule: Schedule = None,
    guidance: Guidance = None,
    guidance_interval: Interval = None,
    guidance_rescale: Rescale = None,
    guidance_reuse: Reuse = None,
    shift: Shift = None,
    seed: Seed = None,
    ema: Ema = None,
    step: Step = None,
    modality: Annotated[
        Optional[str], typer.Option(help="image, video, multiview or audio, of those the model has.")
    ] = None,
    frames: Annotated[
        Optional[int], typer.Option(min=1, help="Frames or views, for modalities that have them.")
    ] = None,
    seconds: Annotated[Optional[float], typer.Option(min=0.01, help="Seconds of sound.")] = None,
    train_size: TrainSize = None,
    scaling: Scaling = None,
    upscale: Annotated[
        Optional[float], typer.Option(min=0, max=1, help="In stages from --train-size; the share drawn anew, as 0.6.")
    ] = None,
    share: Annotated[
        Optional[float],
        typer.Option(min=0, max=1, help="One style for all prompts, which see each other until t."),
    ] = None,
    region: Annotated[
        Optional[list[str]], typer.Option(help="'WIDTHxHEIGHT+LEFT+TOP PROMPT'; may be repeated. --prompt: the rest.")
    ] = None,
    window: Annotated[
        Optional[str], typer.Option(help="Panorama: WIDTHxHEIGHT of overlapping windows; prompts from left to right.")
    ] = None,
    wrap: Annotated[bool, typer.Option("--wrap", help="The panorama's right edge joins its left one.")] = False,
    scenes: Annotated[bool, typer.Option("--scenes", help="One video whose scenes are the prompts.")] = False,
    window_frames: Annotated[Optional[int], typer.Option(min=1, help="Frames of a scene drawn at once.")] = None,
    loop: Annotated[bool, typer.Option("--loop", help="The video's end leads back to its start.")] = False,
    first_frame: Annotated[Optional[Path], typer.Option(help="A picture that the video starts from.")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Pictures of each prompt, from different noise.")] = 1,
    out: Annotated[
        Optional[Path], typer.Option(help="File to write: a picture, .mp4 or .gif, .wav; by default in this folder.")
    ] = None,
    out_dir: Annotated[
        Optional[Path], typer.Option(help="Folder for one file per prompt; resumable, on any number of ranks.")
    ] = None,
    tensor: Annotated[int, typer.Option(min=1, help="Ranks that split the model, under torchrun.")] = 1,
    context: Annotated[int, typer.Option(min=1, help="Ranks that split every sample's tokens, under torchrun.")] = 1,
    separate: Annotated[bool, typer.Option("--separate", help="A file for each picture instead of one sheet.")] = False,
    captions: Annotated[bool, typer.Option("--captions", help="Write each prompt under its picture.")] = False,
) -> None:
    """Sample pictures, clips, views or sounds from a run. What is not given is as the recipe's `sample` block says.

    \b
    Example:
      flagdit sample runs/quickstart --prompt "a Twemoji emoji of trophy" --size 48x32 --steps 20 --out grid.png
    """
    from flagdit.checkpoint.weights import load_run_recipe
    from flagdit.generate.draw import Way
    from flagdit.generate.many import sample_many
    from flagdit.generate.media import check_any_name
    from flagdit.generate.mesh import sampling_mesh
    from flagdit.generate.sample import read_prompts, sample_to_files

    prompts = [*(prompt or []), *(read_prompts(prompt_file) if prompt_file else [])]
    if prompts and label:
        raise RecipeError("--prompt and --label exclude each other", fix="A model follows text or classes.")
    settings: dict[str, Any] = {
        "steps": steps,
        "solver": solver,
        "schedule": schedule,
        "guidance": guidance,
        "guidance_interval": list(guidance_interval) if guidance_interval else None,
        "guidance_rescale": guidance_rescale,
        "guidance_reuse": guidance_reuse,
        "shift": shift,
        "seed": seed,
        "modality": modality,
        "frames": frames,
        "seconds": seconds,
        "train_size": train_size,
        "scaling": scaling,
    }
    way = Way.of(
        upscale=upscale,
        share=share,
        regions=region or [],
        window=window,
        scenes=scenes,
        wrap=wrap,
        loop=loop,
        window_frames=window_frames,
        first_frame=first_frame,
    )
    common: dict[str, Any] = {"sizes": size or [], "repeat": repeat, "step": step, "ema": ema}
    common |= {"preset_name": preset, "settings": settings}
    if out_dir is not None and way != Way():
        raise RecipeError("--out-dir draws every prompt by itself", fix="Leave out --upscale, --share, --region, …")
    if out_dir is None:
        check_any_name(out)
    conditions = prompts or label or []
    with sampling_mesh(load_run_recipe(run), tensor=tensor, context=context) as mesh:
        if out_dir is not None:
            typer.echo(sample_many(run, conditions, out_dir, mesh=mesh, **common))
            return
        files = sample_to_files(
            run, conditions, out, way=way, separate=separate, captions=captions, mesh=mesh, **common
        )
    typer.echo("\n".join(str(file) for file in files))


@app.command()
def edit(
    run: RunFolder,
    picture: Annotated[Path, typer.Argument(help="A PNG, JPEG or WebP file.")],
    prompt: Annotated[str, typer.Option(help="What it shall become; a class id for class-conditioned models.")] = "",
    strength: Annotated[
        float, typer.Option(min=0, max=1, help="Share drawn anew: 0.3 keeps the layout, 1 keeps nothing.")
    ] = 0.6,
    mask: Annotated[
        Optional[Path], typer.Option(help="A picture that is white where to draw; the rest stays as it is.")
    ] = None,
    style: Annotated[Optional[Path], typer.Option(help="A picture whose palette and contrast to take.")] = None,
    size: Annotated[Optional[str], typer.Option(help="WIDTHxHEIGHT in pixels; the picture's own if not given.")] = None,
    preset: Preset = None,
    steps: Steps = None,
    solver: Solver = None,
    schedule: Schedule = None,
    guidance: Guidance = None,
    seed: Seed = None,
    ema: Ema = None,
    step: Step = None,
    train_size: TrainSize = None,
    scaling: Scaling = None,
    repeat: Annotated[int, typer.Option(min=1, help="Versions, from different noise.")] = 1,
    out: Annotated[Path, typer.Option(help="Picture file to write.")] = Path("edited.png"),
    separate: Annotated[bool, typer.Option("--separate", help="A file for each version instead of one sheet.")] = False,
) -> None:
    """Draw a picture anew: by a prompt, inside a mask, or in another picture's style.

    \b
    Example:
      flagdit edit runs/quickstart trophy.png --prompt "a Twemoji emoji of dog face" --strength 0.7 --out dog.png
    """
    from flagdit.generate.edit import edit_file

    settings: dict[str, Any] = {
        "steps": steps,
        "solver": solver,
        "schedule": schedule,
        "guidance": guidance,
        "seed": seed,
        "train_size": train_size,
        "scaling": scaling,
    }
    files = edit_file(
        run,
        picture,
        prompt,
        out,
        strength=strength,
        mask=mask,
        style=style,
        size=size,
        repeat=repeat,
        step=step,
        ema=ema,
        separate=separate,
        preset_name=preset,
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
    scale: Annotated[
        Optional[list[float]], typer.Option(min=0.1, help="Draw at so many times the size; may be repeated.")
    ] = None,
    preset: Preset = None,
    train_size: TrainSize = None,
    scaling: Scaling = None,
    ema: Ema = None,
    step: Step = None,
    fid: Annotated[Optional[Path], typer.Option(help="Inception weights of torch-fidelity, for FID.")] = None,
    clip: Annotated[Optional[Path], typer.Option(help="Folder of a transformers CLIP model, for CLIP scores.")] = None,
) -> None:
    """Measure whether pictures are what was asked for, and how they compare with real ones.

    Draws every caption of the run's data set and looks for the nearest real picture, by L2 in pixels, among all of
    them: is it the one that the caption belongs to? Measures the flow loss by time and size, and distances of feature
    statistics where a feature network is installed or given. Writes figures.json and sheets into the run folder.

    \b
    Example:
      flagdit evaluate runs/quickstart
    """
    from flagdit.generate.evaluate import evaluate_run
    from flagdit.train.wandb_log import log_figures

    figures = evaluate_run(
        run,
        data=data,
        most=limit,
        scales=scale or [1.0],
        step=step,
        ema=ema,
        fid=fid,
        clip=clip,
        preset_name=preset,
        settings={"train_size": train_size, "scaling": scaling},
    )
    log_figures(run, figures)
    typer.echo(json.dumps(figures))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or RUN@STEP for one checkpoint of a run.")],
    prompt: Prompts = None,
    preset: Preset = None,
    steps: Steps = None,
    seed: Seed = None,
    out: Annotated[Path, typer.Option(help="HTML page to write.")] = Path("compare.html"),
) -> None:
    """Show checkpoints side by side on one page: the same prompts and noise, and what was measured.

    \b
    Example:
      flagdit compare runs/quickstart@750 runs/quickstart@1000 --out compare.html
    """
    from flagdit.generate.comparison import write_comparison

    settings = {"steps": steps, "seed": seed}
    typer.echo(str(write_comparison(runs, out, prompts=prompt or [], preset_name=preset, settings=settings)))


@app.command()
def serve(
    run: RunFolder,
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback let anyone in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any that is free.")] = 8000,
    ema: Ema = None,
    step: Step = None,
) -> None:
    """Serve a page to play with a model.

    It has no users and no passwords: it listens on this machine alone unless told otherwise.

    \b
    Example:
      flagdit serve runs/quickstart --port 8000
    """
    from flagdit.generate.serve import serve_run

    serve_run(run, host=host, port=port, step=step, ema=ema)
