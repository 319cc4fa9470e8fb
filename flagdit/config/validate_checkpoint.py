"""Rules about saving."""

from __future__ import annotations

from collections.abc import Iterator

from flagdit.config.problems import Problem
from flagdit.config.schema import Recipe


def checkpoint_problems(recipe: Recipe) -> Iterator[Problem]:
    c, measured = recipe.checkpoint, recipe.validation.every
    for key in ("keep_every", "keep_best"):
        if getattr(c, key) and not c.keep:
            yield Problem(
                (f"checkpoint.{key}", "checkpoint.keep"),
                f"checkpoint.{key}={getattr(c, key)} has no effect with checkpoint.keep=0, which keeps all; set "
                "checkpoint.keep to at least 1",
            )
    if c.keep_best and (not measured or c.every % measured):
        yield Problem(
            ("checkpoint.keep_best", "checkpoint.every", "validation.every"),
            f"checkpoint.keep_best={c.keep_best} needs the held-out loss of every checkpoint, but checkpoint.every="
            f"{c.every} is no multiple of validation.every={measured}; set validation.every={c.every}",
        )
    if c.busy != "wait" and not c.asynchronous:
        yield Problem(
            ("checkpoint.busy", "checkpoint.asynchronous"),
            f"checkpoint.busy={c.busy} has no effect with checkpoint.asynchronous=false; remove it or set "
            "checkpoint.asynchronous=true",
        )
