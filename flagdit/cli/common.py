"""What the commands share: arguments and the look of help pages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

Overrides = Annotated[Optional[list[str]], typer.Argument(help="Recipe keys to change: model.dim=256 train.steps=500.")]
RecipeName = Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe such as quickstart.")]
RunFolder = Annotated[Path, typer.Argument(help="The run folder, such as runs/quickstart.")]

PLAIN: dict[str, Any] = {"no_args_is_help": True, "rich_markup_mode": None, "pretty_exceptions_enable": False}


def group(help: str, example: str) -> typer.Typer:
    """A group of commands, with an example on its help page."""
    return typer.Typer(help=f"{help}\n\n\b\nExample:\n  {example}", **PLAIN)
