"""A source's options as the command line gives them: read from the signature and docstring of its function.

So a new source is one file in `sources/`: its `source` function is found by the file's name, its keyword arguments are
the options of `flagdit data build NAME`, and its docstring is their help.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from flagdit.data_pipelines.records import Source
from flagdit.errors import RecipeError

PACKAGE = "flagdit.data_pipelines.sources"
FLAGS = {"src": "--from"}  # `from` is no name in Python


def kinds() -> list[str]:
    """Names of all sources."""
    return sorted(p.stem for p in (Path(__file__).parent / "sources").glob("[!_]*.py"))


def source_function(kind: str) -> Callable[..., Source]:
    """The `source` function of `sources/KIND.py`.

    Raises:
        RecipeError: there is none.
    """
    if kind not in kinds():
        raise RecipeError(f"there is no source {kind!r}", fix=f"Known ones: {', '.join(kinds())}.")
    return import_module(f"{PACKAGE}.{kind}").source


def flag(name: str) -> str:
    """The command-line name of an option."""
    return FLAGS.get(name, f"--{name.replace('_', '-')}")


def options_of(function: Callable[..., Source]) -> dict[str, inspect.Parameter]:
    """The options of a source that a person can give, by name."""
    parameters = inspect.signature(function).parameters
    return {name: p for name, p in parameters.items() if name != "limits"}


def parse(function: Callable[..., Source], words: Sequence[str]) -> dict[str, Any]:
    """`--name value` and `--name=value` pairs as keyword arguments of a source.

    Raises:
        RecipeError: an unknown option, one without a value, or a value of the wrong type.
    """
    known = {flag(name): p for name, p in options_of(function).items()}
    found: dict[str, Any] = {}
    waiting = list(words)
    while waiting:
        word, equals, value = waiting.pop(0).partition("=")
        if word not in known:
            raise RecipeError(f"there is no option {word}", fix=f"Options: {', '.join(known)}.")
        parameter = known[word]
        if not equals:
            if str(parameter.annotation) == "bool":
                value = "true"
            elif not waiting:
                raise RecipeError(f"{word} needs a value")
            else:
                value = waiting.pop(0)
        found[parameter.name] = _value(word, value, str(parameter.annotation))
    return found


def _value(word: str, text: str, kind: str) -> Any:
    try:
        if kind == "int":
            return int(text)
        if kind == "float":
            return float(text)
    except ValueError:
        raise RecipeError(f"{word} {text} is not a number") from None
    if kind == "bool":
        if text not in ("true", "false"):
            raise RecipeError(f"{word} {text} is neither true nor false")
        return text == "true"
    return tuple(text.split(",")) if kind.startswith("Sequence") else text


def help_of(kind: str) -> str:
    """What `flagdit data build KIND --help` shows."""
    function = source_function(kind)
    doc = inspect.getdoc(function) or ""
    meanings = dict(re.findall(r"^    (\w+): ((?:.+\n?)(?: {8}.+\n?)*)", doc, flags=re.MULTILINE))
    lines = [f"flagdit data build {kind} OUT [OPTIONS]", "", doc.partition("\n\nArgs:")[0], "", "Options:"]
    for name, p in options_of(function).items():
        needed = p.default is inspect.Parameter.empty
        default = "required" if needed else ",".join(p.default) if isinstance(p.default, tuple) else p.default
        lines.append(f"  {flag(name):<16} {' '.join(meanings.get(name, '').split())} [{default}]")
    return "\n".join(lines)
