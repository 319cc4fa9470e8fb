"""Commands that use a trained model: `flagdit sample`, `edit`, `evaluate`, `compare` and `serve`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from flagdit.cli.common import PLAIN, RunFolder
from flagdit.cli.options import Medium, Solving, Together, Weights, grouped
from flagdit.errors import RecipeError

app = typer.Typer(**PLAIN)

Prompts = Annotated[Optional[list[str]], typer.Option("--prompt", help="What to draw; may be repeated.")]


@app.command()
@grouped
def sample(
    run: RunFolder,
    *,
    prompt: Prompts = None,
    prompt_file: Annotated[Optional[Path], typer.Option(help="A text file with one prompt per line.")] = None,
    label: Annotated[Optional[list[int]], typer.Option(help="Class id, for class-conditioned models.")] = None,
    size: Annotated[Optional[list[str]], typer.Option(help="WIDTHxHEIGHT in pixels; once, or once per prompt.")] = None,
    medium: Medium,
    solving: Solving,
    together: Together,
    weights: Weights,
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
    way = together.way()
    if out_dir is not None and way != Way():
        raise RecipeError("--out-dir draws every prompt by itself", fix="Leave out --upscale, --share, --region, …")
    if out_dir is None:
        check_any_name(out)
    conditions = prompts or label or []
    common: dict[str, Any] = {"sizes": size or [], "repeat": repeat, **asdict(weights), "preset_name": solving.preset}
    common["settings"] = solving.settings() | asdict(medium)
    with sampling_mesh(load_run_recipe(run), tensor=tensor, context=context) as mesh:
        if out_dir is not None:
            typer.echo(sample_many(run, conditions, out_dir, mesh=mesh, **common))
            return
        files = sample_to_files(
            run, conditions, out, way=way, separate=separate, captions=captions, mesh=mesh, **common
        )
    typer.echo("\n".join(str(file) for file in files))


@app.command()
@grouped
def edit(
    run: RunFolder,
    file: Annotated[Path, typer.Argument(help="A picture, a clip, or a sound.")],
    *,
    prompt: Annotated[str, typer.Option(help="What it shall become; a class id for class-conditioned models.")] = "",
    strength: Annotated[
        float, typer.Option(min=0, max=1, help="Share drawn anew: 0.3 keeps the layout, 1 keeps nothing.")
    ] = 0.6,
    mask: Annotated[
        Optional[Path], typer.Option(help="A picture or clip, white where to draw; the rest stays as it is.")
    ] = None,
    between: Annotated[
        Optional[tuple[float, float]], typer.Option(help="Draw between these seconds of a clip or sound, as 0.5 1.5.")
    ] = None,
    style: Annotated[Optional[Path], typer.Option(help="A file whose palette and contrast to take.")] = None,
    size: Annotated[Optional[str], typer.Option(help="WIDTHxHEIGHT in pixels; the file's own if not given.")] = None,
    medium: Medium,
    solving: Solving,
    weights: Weights,
    repeat: Annotated[int, typer.Option(min=1, help="Versions, from different noise.")] = 1,
    out: Annotated[
        Optional[Path], typer.Option(help="File to write; by default edited.png, .mp4 or .wav in this folder.")
    ] = None,
    tensor: Annotated[int, typer.Option(min=1, help="Ranks that split the model, under torchrun.")] = 1,
    context: Annotated[int, typer.Option(min=1, help="Ranks that split the sample's tokens, under torchrun.")] = 1,
    separate: Annotated[bool, typer.Option("--separate", help="A file for each version instead of one sheet.")] = False,
) -> None:
    """Draw a picture, clip, strip of views or sound anew: by a prompt, inside a mask, or in another one's style.

    The file's ending says what it is; --modality where that is not it. --frames takes the first frames of a clip, or
    says how many views stand in a picture; --seconds takes the first seconds of a sound.

    \b
    Example:
      flagdit edit runs/quickstart trophy.png --prompt "a Twemoji emoji of dog face" --strength 0.7 --out dog.png
      flagdit edit runs/joint violin.wav --prompt "flute playing C4" --between 0.5 1
    """
    from flagdit.checkpoint.weights import load_run_recipe
    from flagdit.generate.edit import edit_file
    from flagdit.generate.media import check_any_name
    from flagdit.generate.mesh import sampling_mesh

    check_any_name(out)
    with sampling_mesh(load_run_recipe(run), tensor=tensor, context=context) as mesh:
        files = edit_file(
            run,
            file,
            prompt,
            out,
            strength=strength,
            mask=mask,
            between=between,
            style=style,
            size=size,
            repeat=repeat,
            separate=separate,
            preset_name=solving.preset,
            settings=solving.settings() | asdict(medium),
            mesh=mesh,
            **asdict(weights),
        )
    typer.echo("\n".join(str(f) for f in files))


@app.command()
@grouped
def evaluate(
    run: RunFolder,
    *,
    data: Annotated[Optional[str], typer.Option(help="Data set; the one of the run if not given.")] = None,
    limit: Annotated[
        Optional[int], typer.Option(min=1, help="Captions of each split to draw; all if not given.")
    ] = None,
    scale: Annotated[
        Optional[list[float]], typer.Option(min=0.1, help="Draw at so many times the size; may be repeated.")
    ] = None,
    solving: Solving,
    weights: Weights,
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
        fid=fid,
        clip=clip,
        preset_name=solving.preset,
        settings=solving.settings(),
        **asdict(weights),
    )
    log_figures(run, figures)
    typer.echo(json.dumps(figures))


@app.command()
@grouped
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or RUN@STEP for one checkpoint of a run.")],
    *,
    prompt: Prompts = None,
    solving: Solving,
    out: Annotated[Path, typer.Option(help="HTML page to write.")] = Path("compare.html"),
) -> None:
    """Show checkpoints side by side on one page: the same prompts and noise, and what was measured.

    \b
    Example:
      flagdit compare runs/quickstart@600 runs/quickstart@800 --out compare.html
    """
    from flagdit.generate.comparison import write_comparison

    page = write_comparison(runs, out, prompts=prompt or [], preset_name=solving.preset, settings=solving.settings())
    typer.echo(str(page))


@app.command()
@grouped
def serve(
    run: RunFolder,
    *,
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback let anyone in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any that is free.")] = 8000,
    weights: Weights,
) -> None:
    """Serve a page to play with a model.

    It has no users and no passwords: it listens on this machine alone unless told otherwise.

    \b
    Example:
      flagdit serve runs/quickstart --port 8000
    """
    from flagdit.generate.serve import serve_run

    serve_run(run, host=host, port=port, **asdict(weights))
