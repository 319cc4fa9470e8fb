"""`flagdit checkpoint …`: reads arguments, calls one function of checkpoint/, prints its result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from flagdit.cli.common import RunFolder
from flagdit.cli.common import group as command_group
from flagdit.errors import RecipeError

Overrides = Annotated[Optional[list[str]], typer.Argument(help="Recipe keys to change: codec.path=sdxl-vae.")]
Either = Annotated[Optional[str], typer.Option(help="ema or raw, where there are both; the average if not given.")]

app = command_group("Look at weights, bring them in and hand them out.", "flagdit checkpoint inspect runs/quickstart")


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="Folder of an official checkpoint, of diffusers, or of an export.")],
    run: Annotated[Path, typer.Argument(help="Run folder to make.")],
    overrides: Overrides = None,
    weights: Either = None,
    heads: Annotated[
        Optional[int], typer.Option(min=1, help="Query heads of an official network without text; 32 if not given.")
    ] = None,
) -> None:
    """Make a run folder out of other programs' weights.

    It samples, exports, and training starts from it with train.init_from.

    \b
    Example:
      flagdit checkpoint import Lumina-Next-T2I runs/next codec.path=sdxl-vae text.path=gemma-2b
    """
    from flagdit.checkpoint.importing import import_weights

    typer.echo(import_weights(source, run, overrides or [], weights=_ema_or_raw(weights), heads=heads))


@app.command("export")
def export(
    run: Annotated[Path, typer.Argument(help="The run folder, such as runs/quickstart.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    kind: Annotated[str, typer.Option("--format", help="diffusers, lumina or safetensors.")] = "diffusers",
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16; same: as stored.")] = "bf16",
    step: Annotated[Optional[int], typer.Option(help="Checkpoint to use; the newest if not given.")] = None,
    ema: Annotated[Optional[int], typer.Option(min=-1, help="Average to use, from 0; -1: the raw weights.")] = None,
    parts: Annotated[int, typer.Option(min=1, help="Model-parallel files of the lumina format.")] = 1,
    shard_gb: Annotated[float, typer.Option(min=0.001, help="Largest file of the other formats, in GB.")] = 5.0,
    encoders: Annotated[
        bool,
        typer.Option("--encoders/--no-encoders", help="Copy autoencoder and text encoder into a diffusers folder."),
    ] = True,
    licence: Annotated[str, typer.Option(help="Licence for the model card, such as apache-2.0.")] = "",
) -> None:
    """Write a run's weights for other programs.

    The folder holds a model card, hashes of all files and an example that runs.

    \b
    Example:
      flagdit checkpoint export runs/quickstart exported --format diffusers --dtype fp32
    """
    from flagdit.checkpoint.export import Options, export_run

    options = Options(None if dtype == "same" else dtype, step, ema, parts, shard_gb, encoders, licence)
    typer.echo(export_run(run, out, kind, options))


@app.command("inspect")
def inspect_(
    path: Annotated[Path, typer.Argument(help="A run, or any folder of weights that can be imported.")],
    step: Annotated[Optional[int], typer.Option(help="Checkpoint of a run; the newest if not given.")] = None,
    weights: Either = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="Also shape, dtype and norm of every tensor.")] = False,
) -> None:
    """Show what is in a folder of weights, as JSON.

    \b
    Example:
      flagdit checkpoint inspect runs/quickstart --tensors
    """
    from flagdit.checkpoint.inspect import inspect

    typer.echo(json.dumps(inspect(path, step=step, weights=_ema_or_raw(weights), tensors=tensors), indent=2))


@app.command("verify")
def verify_(
    run: RunFolder,
    step: Annotated[Optional[int], typer.Option(help="One checkpoint; all if not given.")] = None,
) -> None:
    """Compare every file of a run's checkpoints with its hash, as JSON; exit code 1 if one is damaged.

    \b
    Example:
      flagdit checkpoint verify runs/quickstart
    """
    from flagdit.checkpoint.convert import verify

    found = verify(run, step)
    typer.echo(json.dumps(found, indent=2))
    raise typer.Exit(1 if found["damaged"] else 0)


@app.command("convert")
def convert_(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(help="Run folder to make.")],
    step: Annotated[Optional[int], typer.Option(help="Checkpoint to take; the newest if not given.")] = None,
    group: Annotated[
        Optional[list[str]],
        typer.Option(help="Tensors to take, such as model or ema_0.9999; may be given several times; default: all."),
    ] = None,
    files: Annotated[int, typer.Option(min=1, help="Files of each group.")] = 1,
) -> None:
    """Write a checkpoint in another number of files, or some of its tensors only, as a run folder.

    Any number of ranks reads any number of files, so this is for people who move checkpoints, not for training.

    \b
    Example:
      flagdit checkpoint convert runs/quickstart runs/small --group ema_0.995
    """
    from flagdit.checkpoint.convert import convert

    typer.echo(convert(run, out, step=step, groups=group or (), files=files))


@app.command("diff")
def diff_(
    a: Annotated[Path, typer.Argument(help="A run, or any folder of weights that can be imported.")],
    b: Annotated[Path, typer.Argument(help="Another one; formats may differ.")],
    weights: Either = None,
) -> None:
    """Compare two folders of weights, as JSON; exit code 1 if values differ.

    \b
    Example:
      flagdit checkpoint diff runs/quickstart exported
    """
    from flagdit.checkpoint.inspect import diff

    found = diff(a, b, weights=_ema_or_raw(weights))
    typer.echo(json.dumps(found, indent=2))
    raise typer.Exit(0 if found["equal"] else 1)


def _ema_or_raw(weights: Optional[str]) -> Optional[str]:
    if weights not in (None, "ema", "raw"):
        raise RecipeError(f"--weights {weights} is not known", fix="Use ema or raw.")
    return weights
