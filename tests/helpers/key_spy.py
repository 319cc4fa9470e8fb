"""Which recipe keys the program reads."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

from flagdit.config import schema

CONFIG_AREA = str(Path(schema.__file__).parent)
PACKAGE = str(Path(schema.__file__).parents[1])
BOOKKEEPING = ("recipe_hash", "check", "describe", "<dictcomp>", "asdict", "replace", "__eq__", "__repr__", "__hash__")
"""Functions that read all keys alike, to compare or show them: not a use."""


def spy_on(found: set[tuple[str, str]], put: Callable[[type, str, object], None]) -> None:
    """Adds (class, key) to `found` whenever code outside config/ reads a key.

    Args:
        put: sets an attribute of a class, as setattr does.
    """
    blocks = [c for c in vars(schema).values() if isinstance(c, type) and dataclasses.is_dataclass(c)]
    for block in blocks:
        names = {f.name for f in dataclasses.fields(block)}

        def spy(self, name, names=names, block=block):
            if name in names:
                code = sys._getframe(1).f_code
                ours = code.co_filename.startswith(PACKAGE) and not code.co_filename.startswith(CONFIG_AREA)
                if ours and code.co_name not in BOOKKEEPING:
                    found.add((block.__name__, name))
            return object.__getattribute__(self, name)

        put(block, "__getattribute__", spy)


if __name__ == "__main__":
    # One rank of a run: key_spy.py FILE RECIPE KEY=VALUE …
    import os

    from flagdit.config.load import load_recipe
    from flagdit.train.loop import train

    reads: set[tuple[str, str]] = set()
    spy_on(reads, setattr)
    train(load_recipe(sys.argv[2], sys.argv[3:]))
    if os.environ["RANK"] == "0":
        Path(sys.argv[1]).write_text(json.dumps(sorted(reads)))
