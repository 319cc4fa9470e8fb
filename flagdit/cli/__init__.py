"""The `flagdit` command: reads arguments, calls one function of one area, prints its result.

One module for each group of commands. Heavy imports stand inside the commands, so that `flagdit --help` answers at
once.
"""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from flagdit import __version__
from flagdit.cli.checkpoint import app as checkpoint
from flagdit.cli.common import PLAIN
from flagdit.cli.data import app as data
from flagdit.cli.generate import app as generate
from flagdit.cli.launch import app as launch
from flagdit.cli.train import app as train
from flagdit.errors import FlagDiTError, RecipeError

OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
"""Errors of the operating system that are no fault of the program."""

app = typer.Typer(
    help="Pretrain diffusion transformers of any modality.\n\n\b\nExample:\n  flagdit train quickstart",
    add_completion=False,
    **PLAIN,
)
app.add_typer(train)
app.add_typer(generate)
app.add_typer(data, name="data")
app.add_typer(checkpoint, name="checkpoint")
app.add_typer(launch)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context, name: Annotated[str, typer.Argument(help="A script of benchmarks/.")]) -> None:
    """Run a benchmark of a source checkout.

    Its last line is one JSON object.

    \b
    Example:
      flagdit bench model_cpu
    """
    scripts = {p.stem: p for p in (Path(__file__).resolve().parents[2] / "benchmarks").glob("[!_]*.py")}
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
