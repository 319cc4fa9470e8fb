"""The `flagdit` command: reads arguments, calls one function of one area, prints its result.

Heavy imports stand inside the commands, so that `flagdit --help` answers at once.
"""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from flagdit import __version__
from flagdit.cli_checkpoint import checkpoint_app
from flagdit.errors import FlagDiTError, RecipeError

OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
"""Errors of the operating system that are no fault of the program."""

Overrides = Annotated[Optional[list[str]], typer.Argument(help="Recipe keys to change: model.dim=256 train.steps=500.")]
RecipeName = Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe such as quickstart.")]
MaxBad = Annotated[float, typer.Option(help="Share of unusable samples above which the command fails.")]
RunFolder = Annotated[Path, typer.Argument(help="The run folder, such as runs/quickstart.")]

PLAIN: dict[str, Any] = {"no_args_is_help": True, "rich_markup_mode": None, "pretty_exceptions_enable": False}
app = typer.Typer(
    help="Pretrain diffusion transformers of any modality.\n\n\b\nExample:\n  flagdit train quickstart",
    add_completion=False,
    **PLAIN,
)
data_app = typer.Typer(
    help="Build, encode and inspect data sets.\n\n\b\nExample:\n  flagdit data stats data/quickstart/encoded", **PLAIN
)
build_app = typer.Typer(
    help="Pack pictures and captions into a data set.\n\n\b\nExample:\n  flagdit data build emoji data/emoji --size 64",
    **PLAIN,
)
launch_app = typer.Typer(
    help="Start training on many devices.\n\n\b\nExample:\n  flagdit launch local quickstart --ranks 2", **PLAIN
)
recipe_app = typer.Typer(help="Look at recipes.\n\n\b\nExample:\n  flagdit recipe show quickstart", **PLAIN)
app.add_typer(data_app, name="data")
app.add_typer(recipe_app, name="recipe")
app.add_typer(launch_app, name="launch")
app.add_typer(checkpoint_app, name="checkpoint")
data_app.add_typer(build_app, name="build")


@app.command()
def train(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Train a recipe, or continue its run.

    The same command continues a run that was stopped or killed.

    \b
    Example:
      flagdit train quickstart name=wider model.dim=192
    """
    from flagdit.config.load import load_recipe
    from flagdit.train.loop import train as run

    run(load_recipe(recipe, overrides or []))


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
    repeat: Annotated[int, typer.Option(min=1, help="Pictures of each prompt, from different noise.")] = 1,
    out: Annotated[Path, typer.Option(help="Picture file to write.")] = Path("grid.png"),
    separate: Annotated[bool, typer.Option("--separate", help="A file for each picture instead of one sheet.")] = False,
    captions: Annotated[bool, typer.Option("--captions", help="Write each prompt under its picture.")] = False,
) -> None:
    """Sample pictures from a run. What is not given is as the recipe's `sample` block says.

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


@app.command()
def report(run: RunFolder) -> None:
    """Write RUN/report.html, one page about a run.

    It holds curves, pictures over time, figures, the recipe and the environment, and needs no other file.

    \b
    Example:
      flagdit report runs/quickstart
    """
    from flagdit.train.report import write_report

    typer.echo(str(write_report(run)))


@build_app.command("emoji")
def build_emoji(
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    size: Annotated[int, typer.Option(help="Side in pixels; other shapes have about the same area.")] = 32,
    multiple: Annotated[int, typer.Option(help="Rows and columns are multiples of this; 0: by the size.")] = 0,
    styles: Annotated[str, typer.Option(help="Drawing styles, comma-separated: twemoji, openmoji.")] = "twemoji",
    limit: Annotated[int, typer.Option(help="Subjects; 0: all.")] = 0,
    holdout: Annotated[float, typer.Option(help="Share of (subject, style) pairs that training never sees.")] = 0.0,
    aspects: Annotated[str, typer.Option(help="Shapes of the canvas, comma-separated: 1:1, 3:2, 2:3.")] = "1:1",
    seed: Annotated[int, typer.Option(help="Chooses subjects and held-out pairs.")] = 0,
    max_bad: MaxBad = 0.1,
    shard_samples: Annotated[int, typer.Option(help="Samples per shard.")] = 1000,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a data set of other settings.")] = False,
) -> None:
    """Pack emoji, with their names as captions.

    They come from installed packages, in one or two drawing styles.

    \b
    Example:
      flagdit data build emoji data/emoji --size 64 --styles twemoji,openmoji --aspects 1:1,3:2,2:3
    """
    from flagdit.data_pipelines.build import build_dataset

    options: dict[str, Any] = {"size": size, "multiple": multiple, "limit": limit, "holdout": holdout, "seed": seed}
    options |= {"styles": styles.split(","), "aspects": aspects.split(",")}
    build_dataset("emoji", out, shard_samples=shard_samples, max_bad=max_bad, overwrite=overwrite, **options)


@build_app.command("folder")
def build_folder(
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    source: Annotated[
        Path, typer.Option("--from", help="Folder of pictures with NAME.txt, NAME.json or captions.jsonl.")
    ],
    size: Annotated[int, typer.Option(help="Side in pixels of the square whose area no picture exceeds.")] = 256,
    multiple: Annotated[int, typer.Option(help="Rows and columns are multiples of this; 0: by the size.")] = 0,
    holdout: Annotated[float, typer.Option(help="Share of pictures that training never sees.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Chooses the held-out pictures.")] = 0,
    max_bad: MaxBad = 0.1,
    shard_samples: Annotated[int, typer.Option(help="Samples per shard.")] = 1000,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a data set of other settings.")] = False,
) -> None:
    """Pack your own pictures and captions.

    Aspect ratios are kept.

    \b
    Example:
      flagdit data build folder data/mine --from ~/pictures --size 256
    """
    from flagdit.data_pipelines.build import build_dataset

    options: dict[str, Any] = {"src": source, "size": size, "multiple": multiple, "holdout": holdout, "seed": seed}
    build_dataset("folder", out, shard_samples=shard_samples, max_bad=max_bad, overwrite=overwrite, **options)


@data_app.command("encode")
def encode(
    src: Annotated[Path, typer.Argument(help="A raw data set.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    recipe: Annotated[str, typer.Option(help="Its codec and text blocks say how.")],
    overrides: Overrides = None,
    dtype: Annotated[
        str, typer.Option(help="On disk: fp32, fp16; auto: fp16 for what a folder's model makes.")
    ] = "auto",
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: this one. Each holds the models.")] = 0,
    device: Annotated[str, typer.Option(help="Of the models: cpu, cuda; auto: cuda where there is one.")] = "auto",
    max_bad: MaxBad = 0.01,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a data set of other settings.")] = False,
) -> None:
    """Encode pictures and captions for training.

    Pictures become latents and captions text features, as the recipe says. A stopped encode continues.

    \b
    Example:
      flagdit data encode data/emoji data/emoji_encoded --recipe quickstart
    """
    from flagdit.config.load import load_recipe
    from flagdit.data_pipelines.encode import encode_dataset

    encode_dataset(
        src,
        out,
        load_recipe(recipe, overrides or []),
        dtype=dtype,
        workers=workers,
        device=device,
        max_bad=max_bad,
        overwrite=overwrite,
    )


@data_app.command("stats")
def stats(path: Annotated[Path, typer.Argument(help="A raw or encoded data set.")]) -> None:
    """Show what is in a data set, as JSON.

    \b
    Example:
      flagdit data stats data/emoji_encoded
    """
    from flagdit.data_pipelines.stats import describe

    typer.echo(json.dumps(describe(path), indent=2, ensure_ascii=False))


@launch_app.command("local")
def launch_local(
    recipe: RecipeName,
    overrides: Overrides = None,
    ranks: Annotated[
        Optional[int], typer.Option(min=1, help="Processes; all GPUs of this machine if not given, or the mesh's size.")
    ] = None,
) -> None:
    """Train a recipe with several processes on this machine.

    Rank 0 writes to the terminal, the others into logs/ of the run folder. Ctrl-C saves and ends the run; the same
    command continues it.

    \b
    Example:
      flagdit launch local quickstart name=two data.batch_size=32 --ranks 2
    """
    from flagdit.launch.local import train_locally

    sys.exit(train_locally(recipe, overrides or [], ranks, typer.echo))


@recipe_app.command("show")
def show(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Print every key of a recipe with its meaning.

    Bases and overrides are applied.

    \b
    Example:
      flagdit recipe show quickstart model.dim=256
    """
    from flagdit.config.load import load_recipe, to_yaml

    typer.echo(to_yaml(load_recipe(recipe, overrides or [])))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context, name: Annotated[str, typer.Argument(help="A script of benchmarks/.")]) -> None:
    """Run a benchmark of a source checkout.

    Its last line is one JSON object.

    \b
    Example:
      flagdit bench model_cpu
    """
    scripts = {p.stem: p for p in (Path(__file__).resolve().parents[1] / "benchmarks").glob("[!_]*.py")}
    if name not in scripts:
        known = ", ".join(sorted(scripts))
        fix = f"There are: {known}." if known else "Run this from a source checkout (pip install --editable .)."
        raise RecipeError(f"there is no benchmark {name!r}", fix=fix)
    sys.exit(subprocess.run([sys.executable, scripts[name], *context.args]).returncode)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"flagdit {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point: a user's mistake or a full disk is one paragraph and exit code 2, not a traceback."""
    try:
        app()
    except FlagDiTError as error:
        fail(str(error), error.exit_code)
    except OSError as error:
        if error.errno not in OF_THE_MACHINE:
            raise
        fail(f"{error.filename or 'a file'} cannot be written or read: {error.strerror}.")
    except KeyboardInterrupt:
        sys.exit(130)


def fail(text: str, code: int = 2) -> None:
    typer.secho(f"error: {text}", fg=typer.colors.RED, err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
