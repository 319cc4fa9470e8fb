"""The schema as a table of dotted keys: what every file of this area and the command line work with."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from flagdit.config.schema import Recipe

_MEANINGS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list[str]: "a list of texts",
    list[float]: "a list of numbers",
    dict[str, int]: "a mapping of names to whole numbers",
    dict[str, str]: "a mapping of names to texts",
    dict[str, float]: "a mapping of names to numbers",
}


@dataclass(frozen=True)
class Key:
    """One recipe key.

    Attributes:
        name: dotted, e.g. "model.dim".
        type: of its values, without Optional.
        optional: null is a value.
        doc: one line of meaning, with its unit.
        choices: the only values, or none for any.
        at_least: smallest value, for numbers.
    """

    name: str
    type: Any
    optional: bool
    doc: str
    choices: tuple[str, ...]
    at_least: float | None

    @property
    def expects(self) -> str:
        """The type in words."""
        return _MEANINGS[self.type] + (" or null" if self.optional else "")


@lru_cache(maxsize=1)
def all_keys() -> dict[str, Key]:
    """Every key of the schema by dotted name, in the order of the schema."""
    return {key.name: key for key in _keys_of(Recipe, "")}


@lru_cache(maxsize=1)
def all_blocks() -> dict[str, str]:
    """Every group of keys by name, with its line of documentation."""
    hints = get_type_hints(Recipe)
    return {f.name: f.metadata["doc"] for f in dataclasses.fields(Recipe) if dataclasses.is_dataclass(hints[f.name])}


def flatten(recipe: Recipe) -> dict[str, Any]:
    """The recipe as dotted key → value."""
    found = {}
    for name in all_keys():
        value: Any = recipe
        for part in name.split("."):
            value = getattr(value, part)
        found[name] = value
    return found


def nearest(word: str, options: Iterable[str]) -> str | None:
    """The option that was probably meant, if one is close."""
    options = list(options)
    # A right name in the wrong group is the commonest slip: `lr` for optimizer.lr, `train.seed` for seed.
    homes = [option for option in options if option.split(".")[-1] == word.split(".")[-1]]
    if homes:
        return difflib.get_close_matches(word, homes, n=1, cutoff=0.0)[0]
    close = difflib.get_close_matches(word, options, n=1)
    if close:
        return close[0]
    leaves = {option.split(".")[-1]: option for option in options}
    close = difflib.get_close_matches(word.split(".")[-1], leaves, n=1, cutoff=0.7)
    return leaves[close[0]] if close else None


def _keys_of(cls: type, prefix: str) -> Iterable[Key]:
    hints = get_type_hints(cls)
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            yield from _keys_of(hint, f"{prefix}{f.name}.")
            continue
        optional = get_origin(hint) in (Union, types.UnionType)
        if optional:
            (hint,) = (arg for arg in get_args(hint) if arg is not type(None))
        rules = f.metadata
        yield Key(prefix + f.name, hint, optional, rules["doc"], rules["choices"], rules["at_least"])
