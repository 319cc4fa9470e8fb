"""What is wrong with a recipe, and the words for it."""

from __future__ import annotations

from dataclasses import dataclass

from flagdit.errors import RecipeError


@dataclass(frozen=True)
class Problem:
    """Something wrong with a recipe.

    Attributes:
        keys: the dotted keys at fault, the first one most.
        text: what is wrong and what to do, as one sentence without its full stop.
        where: file and line that gave the key, when known.
    """

    keys: tuple[str, ...]
    text: str
    where: str = ""

    def __str__(self) -> str:
        return f"{self.text} ({self.where})" if self.where else self.text


def raise_problems(problems: list[Problem], name: str) -> None:
    """Raises one RecipeError for all problems, if there are any."""
    if len(problems) == 1:
        raise RecipeError(str(problems[0]))
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise RecipeError(f"recipe {name} has {len(problems)} problems:{lines}")


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def nearest_values(value: int, good: list[int]) -> str:
    """ "try …" with the nearest good values below and above."""
    near = [max((g for g in good if g < value), default=0), min((g for g in good if g > value), default=0)]
    named = [str(g) for g in near if g]
    return f"try {' or '.join(named)}" if named else "no other value fits"


def either(options: tuple[str, ...]) -> str:
    """ "a, b or c"."""
    return ", ".join(options[:-1]) + f" or {options[-1]}"
