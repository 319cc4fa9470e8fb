"""Rules of the `sample` block; `validate.py` lists them with the others."""

from __future__ import annotations

from collections.abc import Iterator

from flagdit.config.problems import Problem
from flagdit.config.schema import Recipe


def guidance_problems(recipe: Recipe) -> Iterator[Problem]:
    """Guidance whose times, shares or solver do not fit."""
    s = recipe.sample
    if len(s.guidance_interval) != 2 or not 0 <= s.guidance_interval[0] <= s.guidance_interval[1] <= 1:
        yield Problem(
            ("sample.guidance_interval",),
            f"sample.guidance_interval={s.guidance_interval} must be two rising times from 0 to 1",
        )
    if s.guidance_rescale > 1:
        yield Problem(
            ("sample.guidance_rescale",),
            f"sample.guidance_rescale={s.guidance_rescale:g} must be a share up to 1",
        )
    if s.guidance_reuse > 1 and s.solver == "dopri5":
        yield Problem(
            ("sample.guidance_reuse", "sample.solver"),
            f"sample.guidance_reuse={s.guidance_reuse} does not go with sample.solver=dopri5, whose steps it would "
            "mislead; set it to 1 or use midpoint",
        )
