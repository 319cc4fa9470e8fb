"""Named ways to solve the flow, from fast to accurate."""

from __future__ import annotations

from typing import Any

from flagdit.errors import RecipeError

PRESETS: dict[str, dict[str, Any]] = {
    "draft": {"solver": "midpoint", "steps": 5, "schedule": "sigmoid", "guidance_reuse": 2},
    "fast": {"solver": "midpoint", "steps": 10, "schedule": "sigmoid", "guidance_reuse": 2},
    "standard": {"solver": "euler", "steps": 60, "schedule": "linear", "guidance_reuse": 1},
    "fine": {"solver": "midpoint", "steps": 60, "schedule": "linear", "guidance_reuse": 1},
}
"""Keys of the recipe's `sample` block. Evaluations of the velocity, and passes of one sample through the network with
guidance: draft 10 and 15, fast 20 and 30, standard 60 and 120, fine 120 and 240."""


def preset(name: str) -> dict[str, Any]:
    """The settings of that name.

    Raises:
        RecipeError: there is none.
    """
    if name not in PRESETS:
        raise RecipeError(f"there is no preset {name!r}", where="--preset", fix=f"Use one of {', '.join(PRESETS)}.")
    return dict(PRESETS[name])
