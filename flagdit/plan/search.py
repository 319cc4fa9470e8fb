"""Other meshes: which fit, which are fastest, and the nearest that fit when the recipe's own does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from flagdit.config.schema import Recipe
from flagdit.config.validate import divisors
from flagdit.config.validate_parallel import parallel_problems
from flagdit.errors import RecipeError
from flagdit.model.sizes import resolve
from flagdit.plan.gpus import Gpu
from flagdit.plan.memory import Memory, memory_of
from flagdit.plan.parameters import Parameters
from flagdit.plan.time import Time, time_of
from flagdit.plan.workload import Workload, workload_of

CHECKPOINTING = ("none", "selective", "block")
LARGEST_TENSOR = 8
MOST = 16384
"""GPUs: of larger runs nobody would believe a formula."""


@dataclass(frozen=True)
class Fleet:
    """What a recipe is planned for.

    Attributes:
        gpu: each of the GPUs.
        gpus: ranks of the run.
        per_node: GPUs of a node.
        sample_tokens, text_tokens: as `workload_of` takes them.
    """

    gpu: Gpu
    gpus: int
    per_node: int
    sample_tokens: int = 0
    text_tokens: int = 0

    def workload(self, recipe: Recipe) -> Workload:
        """Raises RecipeError where the recipe's mesh is none of these GPUs."""
        return workload_of(recipe, self.gpus, self.sample_tokens, self.text_tokens)


@dataclass(frozen=True)
class Candidate:
    """A recipe with some keys changed.

    Attributes:
        changes: dotted key → value, as overrides.
    """

    changes: dict[str, Any]
    work: Workload
    memory: Memory
    time: Time

    def fits(self, gpu: Gpu) -> bool:
        return self.memory.total <= gpu.memory

    @property
    def overrides(self) -> str:
        """As on the command line."""
        return " ".join(f"{key}={str(value).lower()}" for key, value in self.changes.items()) or "as it is"


def candidates(recipe: Recipe, parameters: Parameters, fleet: Fleet) -> list[Candidate]:
    """Every mesh of the same GPUs that fills the batch, with every way of checkpointing."""
    # With its size applied once, not for each of thousands.
    recipe = replace(recipe, model=replace(resolve(recipe.model), size=None))
    found = []
    for changed, changes in _variants(recipe, fleet.gpus):
        try:
            work = fleet.workload(changed)
        except RecipeError:
            continue
        memory, time = memory_of(work, parameters), time_of(work, parameters, fleet.gpu, fleet.per_node)
        found.append(Candidate(changes, work, memory, time))
    return found


def enough_gpus(recipe: Recipe, parameters: Parameters, fleet: Fleet) -> int | None:
    """The fewest of these GPUs, by doubling, on which the recipe fits as it is; None: it fits on no number of them."""
    gpus = fleet.gpus
    while (gpus := 2 * gpus) <= MOST:
        try:
            work = replace(fleet, gpus=gpus).workload(recipe)
        except RecipeError:
            return None
        if memory_of(work, parameters).total <= fleet.gpu.memory:
            return gpus
    return None


def ranked(found: list[Candidate], gpu: Gpu) -> list[Candidate]:
    """Those that fit, fastest first; of equally fast ones the one with fewer changes."""
    fitting = [c for c in found if c.fits(gpu)]
    return sorted(fitting, key=lambda c: (round(c.time.step, 6), len(c.changes), c.memory.total))


def nearest_fits(found: list[Candidate], gpu: Gpu, most: int = 3) -> list[Candidate]:
    """Those that fit with the fewest keys changed, the fastest of each number of changes first."""
    return sorted((c for c in found if c.fits(gpu)), key=lambda c: (len(c.changes), c.time.step))[:most]


def _variants(recipe: Recipe, gpus: int) -> Iterator[tuple[Recipe, dict[str, Any]]]:
    tensors = [n for n in divisors(gpus) if n <= LARGEST_TENSOR]
    accumulations = sorted({1, recipe.train.accumulation, *_powers(recipe.data.batch_size)})
    parallel = recipe.parallel
    for tensor, context in product(tensors, divisors(gpus)):
        if gpus % (tensor * context):
            continue
        data = gpus // (tensor * context)
        filling = [n for n in accumulations if recipe.data.batch_size % (data * n) == 0]
        for ring, zero, offload in product(divisors(context), (1, 2, 3), (False, True)):
            if offload and not parallel.offload and zero != 2:
                continue
            for kind, accumulation in product(CHECKPOINTING, filling):
                values = {
                    "parallel.tensor": (parallel.tensor, tensor),
                    "parallel.context": (parallel.context, context),
                    "parallel.ring": (parallel.ring, ring),
                    "parallel.zero": (parallel.zero, zero),
                    "parallel.offload": (parallel.offload, offload),
                    "model.checkpointing": (recipe.model.checkpointing, kind),
                    "train.accumulation": (recipe.train.accumulation, accumulation),
                }
                changed = replace(
                    recipe,
                    parallel=replace(parallel, tensor=tensor, context=context, ring=ring, zero=zero, offload=offload),
                    model=replace(recipe.model, checkpointing=kind),
                    train=replace(recipe.train, accumulation=accumulation),
                )
                if any(parallel_problems(changed)):
                    continue
                yield changed, {key: new for key, (old, new) in values.items() if old != new}


def _powers(batch_size: int) -> list[int]:
    return [n for n in divisors(batch_size) if n & (n - 1) == 0]
