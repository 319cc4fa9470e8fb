"""How the schema declares its keys."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import field
from typing import Any


def key(default: Any, doc: str, *, choices: tuple[str, ...] = (), at_least: float | None = None) -> Any:
    """A recipe key: default, one line of meaning with its unit, and the rules that one value can be held to."""
    metadata = {"doc": doc, "choices": choices, "at_least": at_least}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def block(cls: type) -> Any:
    """A nested group of keys."""
    return field(default_factory=cls, metadata={"doc": (cls.__doc__ or "").strip().splitlines()[0]})
