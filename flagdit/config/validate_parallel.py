"""Rules about the mesh that need neither the model's size nor the number of ranks; the others stand in
`parallel/mesh.py`."""

from __future__ import annotations

from collections.abc import Iterator

from flagdit.config.problems import Problem, divisors, nearest_values
from flagdit.config.schema import Recipe


def parallel_problems(recipe: Recipe) -> Iterator[Problem]:
    p = recipe.parallel
    if p.context % p.ring:
        yield Problem(
            ("parallel.ring", "parallel.context"),
            f"parallel.ring={p.ring} must divide parallel.context={p.context}; "
            f"{nearest_values(p.ring, divisors(p.context))}",
        )
    if p.zero not in (1, 2, 3):
        yield Problem(
            ("parallel.zero",),
            f"parallel.zero={p.zero} must be 1, 2 or 3"
            + (
                "; with bf16, unsharded states give wrong gradients without an error, and 1 gives the same numbers in "
                "less memory"
                if p.zero == 0
                else ""
            ),
        )
    if p.zero == 3 and p.offload:
        yield Problem(
            ("parallel.offload", "parallel.zero"),
            "parallel.offload=true keeps optimizer states of ZeRO 1 and 2 in host memory; use parallel.zero=2, or "
            "parallel.offload=false",
        )
    if p.zero == 3 and recipe.model.checkpointing == "selective":
        yield Problem(
            ("model.checkpointing", "parallel.zero"),
            "model.checkpointing=selective cannot replay the weights that parallel.zero=3 gathers on the way; use "
            "model.checkpointing=block, or parallel.zero=2",
        )
    if p.zero == 3 and recipe.train.compile:
        yield Problem(
            ("train.compile", "parallel.zero"),
            "train.compile=true cannot trace the weights that parallel.zero=3 gathers on the way; use parallel.zero=2, "
            "or train.compile=false",
        )
