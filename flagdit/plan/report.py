"""`flagdit plan`: what a recipe costs, as tables for people, JSON for programs, a plot for slides."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flagdit.config.schema import Recipe
from flagdit.errors import RecipeError
from flagdit.plan.gpus import GPUS, Gpu, gpu_named
from flagdit.plan.memory import Memory, memory_of
from flagdit.plan.parameters import Parameters, count_parameters
from flagdit.plan.search import CHECKPOINTING, Candidate, Fleet, candidates, enough_gpus, nearest_fits, ranked
from flagdit.plan.time import GPUS_PER_NODE, Operations, Time, Traffic, operations_of, time_of, traffic_of
from flagdit.plan.workload import Workload

SHOWN = 10
FAILURE_FREE = 54 * 16384 / 419 * 86400
"""GPU-seconds between unplanned interruptions of Llama 3's pretraining (arXiv 2407.21783, section 3.3.4)."""
MEMORY_ROWS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer: fp32 masters, two moments",
    "ema": "averages",
    "activations": "activations at the peak",
    "communication": "buckets and gathered weights",
    "margin": "CUDA, NCCL and fragmentation",
}


@dataclass(frozen=True)
class Plan:
    """All that is known about a recipe on so many GPUs before it runs.

    Attributes:
        others: meshes that were looked for.
        impossible: why the recipe's own mesh is none of these GPUs; the plan is then of the first of `others`.
        enough: GPUs on which it would fit as it is; None: not asked, or no number of them.
    """

    recipe: Recipe
    gpu: Gpu
    work: Workload
    parameters: Parameters
    operations: Operations
    traffic: Traffic
    memory: Memory
    time: Time
    by_checkpointing: dict[str, float]
    others: list[Candidate]
    impossible: str | None = None
    enough: int | None = None

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.gpu.memory

    @property
    def days(self) -> float:
        """Of the whole run, without interruptions."""
        return self.time.step * self.work.steps / 86400

    @property
    def between_failures(self) -> float:
        """Seconds, at Llama 3's rate."""
        return FAILURE_FREE / self.work.gpus

    @property
    def lost_by_failure(self) -> float:
        """Seconds of training that a failure undoes: half of those between two checkpoints."""
        return self.time.step * self.recipe.checkpoint.every / 2


def make_plan(
    recipe: Recipe,
    *,
    gpu: str = "h100",
    gpus: int = 0,
    per_node: int = 0,
    sample_tokens: int = 0,
    text_tokens: int = 0,
    search: bool = False,
) -> Plan:
    """Plans a recipe.

    Args:
        recipe: any that validates.
        gpu: name of a known GPU.
        gpus: ranks; 0: those of the `cluster` block, or without one as many as one pack takes.
        per_node: GPUs of a node; 0: those of the `cluster` block, or 8.
        sample_tokens, text_tokens: mean tokens of a sample and a caption; 0: as `sample.size` and `text.max_length`.
        search: look at all other meshes; without it, only where the recipe's own does not fit.

    Raises:
        RecipeError: the mesh does not fit the model, the batch or the GPUs; in a search, none does.
    """
    cluster, mesh = recipe.cluster, recipe.parallel.tensor * recipe.parallel.context
    gpus = gpus or cluster.nodes * cluster.gpus_per_node or mesh
    per_node = per_node or cluster.gpus_per_node or GPUS_PER_NODE
    fleet = Fleet(gpu_named(gpu), gpus, per_node, sample_tokens, text_tokens)
    others: list[Candidate] = []
    impossible = enough = None
    parameters = count_parameters(recipe.model)
    if search:
        others = ranked(candidates(recipe, parameters, fleet), fleet.gpu)[:SHOWN]
    try:
        work = fleet.workload(recipe)
    except RecipeError as error:
        if not search:
            raise RecipeError(str(error), fix=f"--search looks for a mesh of {gpus} GPUs.") from error
        if not others:
            raise RecipeError(f"{error}; and of all other meshes of {gpus} GPUs none fits") from error
        impossible, work = str(error), others[0].work
    memory = memory_of(work, parameters)
    if memory.total > fleet.gpu.memory:
        others = others or nearest_fits(candidates(recipe, parameters, fleet), fleet.gpu)
        enough = enough_gpus(recipe, parameters, fleet)
    return Plan(
        recipe=recipe,
        gpu=fleet.gpu,
        work=work,
        parameters=parameters,
        operations=operations_of(work),
        traffic=traffic_of(work, parameters),
        memory=memory,
        time=time_of(work, parameters, fleet.gpu, per_node),
        by_checkpointing={kind: memory_of(_checkpointed(work, kind), parameters).activations for kind in CHECKPOINTING},
        others=others,
        impossible=impossible,
        enough=enough,
    )


def _checkpointed(work: Workload, kind: str) -> Workload:
    return replace(work, model=replace(work.model, checkpointing=kind))


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values; bytes, seconds and FLOPs."""
    work = plan.work
    return {
        "recipe": plan.recipe.name,
        "gpu": plan.gpu.name,
        "gpus": work.gpus,
        "mesh": {**asdict(work.parallel), "data": work.data, "accumulation": work.accumulation},
        "parameters": {"total": plan.parameters.total, **plan.parameters.by_part},
        "pack": {"samples": len(work.seqlens), "tokens": work.tokens, "text_tokens": work.text_tokens},
        "tokens_per_step": work.tokens_per_step,
        "flops_per_step": plan.operations.model,
        "attention_share": plan.operations.attention / plan.operations.model,
        "memory": {**asdict(plan.memory), "total": plan.memory.total},
        "activations_by_checkpointing": plan.by_checkpointing,
        "traffic": asdict(plan.traffic),
        "seconds": {**asdict(plan.time), "step": plan.time.step},
        "mfu": plan.time.mfu,
        "days": plan.days,
        "gpu_hours": plan.days * 24 * work.gpus,
        "seconds_between_failures": plan.between_failures,
        "seconds_lost_by_failure": plan.lost_by_failure,
        "fits": plan.fits,
        "impossible": plan.impossible,
        "enough_gpus": plan.enough,
        "fits_on": [gpu.name for gpu in GPUS.values() if plan.memory.total <= gpu.memory],
        "others": [
            {"changes": c.changes, "memory": c.memory.total, "seconds": c.time.step, "mfu": c.time.mfu}
            for c in plan.others
        ],
    }


def show(plan: Plan, console: Console, *, searched: bool) -> None:
    """Prints the plan as tables."""
    work, p = plan.work, plan.work.parallel
    mesh = f"tensor {p.tensor} × context {p.context} (ring {p.ring}) × data {work.data}, ZeRO {p.zero}"
    if plan.impossible:
        fastest = plan.others[0].overrides
        console.print(f"not as it is: {plan.impossible}\nThis is the fastest mesh: {fastest}\n", highlight=False)
    console.print(f"[bold]{plan.recipe.name}[/] on {work.gpus} × {plan.gpu.name}: {mesh}", highlight=False)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for label, value in _facts(plan):
        table.add_row(label, value)
    console.print(table, highlight=False)
    table = Table("memory of one GPU", "GB", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for kind, label in MEMORY_ROWS.items():
        table.add_row(label, f"{getattr(plan.memory, kind) / 1e9:.2f}")
    table.add_row("[bold]together", f"[bold]{plan.memory.total / 1e9:.2f}")
    if plan.memory.host:
        table.add_row("on the host, per GPU", f"{plan.memory.host / 1e9:.2f}")
    console.print()
    console.print(table, highlight=False)
    modes = ", ".join(f"{kind} {value / 1e9:.1f}" for kind, value in plan.by_checkpointing.items())
    console.print(f"activations by model.checkpointing: {modes} GB", highlight=False)
    console.print(f"\n{verdict(plan)}", highlight=False)
    if plan.others:
        console.print(_others(plan, searched), highlight=False)


def verdict(plan: Plan) -> str:
    """Fits or not, and on what else."""
    need, have = plan.memory.total / 1e9, plan.gpu.memory / 1e9
    where = [gpu.name for gpu in GPUS.values() if plan.memory.total <= gpu.memory]
    also = f"Fits on: {', '.join(where)}." if where else "It fits on no known GPU."
    if plan.fits:
        return f"fits: {need:.1f} of {have:.0f} GB. {also}"
    more = f" As it is, it fits on {plan.enough} × {plan.gpu.name}." if plan.enough else ""
    return f"does not fit: {need:.1f} of {have:.0f} GB. {also}{more}" + (
        " The nearest changes that make it fit:" if plan.others else " No mesh of these GPUs fits: take more of them."
    )


def _facts(plan: Plan) -> list[tuple[str, str]]:
    work, ops, time = plan.work, plan.operations, plan.time
    parts = ", ".join(f"{part} {count / 1e6:,.1f}M" for part, count in plan.parameters.by_part.items())
    t = plan.traffic
    axes = {"tensor": t.tensor, "heads": t.ulysses, "ring": t.ring, "ZeRO": t.shards}
    sent = ", ".join(f"{axis} {value / 1e9:.2f}" for axis, value in axes.items() if value) or "none"
    kinds = {
        "products": time.matmul,
        "attention": time.attention,
        "memory-bound": time.memory,
        "waiting": time.communication,
        "optimizer": time.optimizer,
    }
    spent = ", ".join(f"{kind} {seconds / time.step:.0%}" for kind, seconds in kinds.items())
    return [
        ("parameters", f"{plan.parameters.total:,} ({parts})"),
        ("a pack", f"{len(work.seqlens)} × {work.seqlens[0]} tokens, {work.text_tokens} text tokens"),
        ("tokens per step", f"{work.tokens_per_step:,}"),
        (
            "FLOPs per step",
            f"{ops.model:.3g}, {ops.attention / ops.model:.0%} of them bidirectional attention",
        ),
        ("sent per GPU and step", f"{sent} GB" if sent != "none" else sent),
        ("a step", f"{span(time.step)}: {spent}"),
        ("MFU", f"{time.mfu:.0%} (predicted)"),
        ("the run", f"{work.steps:,} steps: {span(86400 * plan.days)}, {plan.days * 24 * work.gpus:,.0f} GPU-hours"),
        (
            "failures",
            f"one in {span(plan.between_failures)} at Llama 3's rate; by checkpoint.every="
            f"{plan.recipe.checkpoint.every} it undoes {span(plan.lost_by_failure)}, "
            f"{plan.lost_by_failure / plan.between_failures:.2%} of the time",
        ),
    ]


def span(seconds: float) -> str:
    """A time in the unit that suits it."""
    # 90 minutes read better as minutes, 1.5 s as seconds.
    units = (("days", 86400, 2), ("hours", 3600, 2), ("minutes", 60, 2), ("s", 1, 1), ("ms", 1e-3, 0))
    unit, size = next((unit, size) for unit, size, least in units if seconds >= least * size)
    number = seconds / size
    return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"


def _others(plan: Plan, searched: bool) -> Table:
    table = Table("GB", "s/step", "MFU", "changes" if not searched else "mesh, fastest first", box=None, pad_edge=False)
    for c in plan.others:
        table.add_row(f"{c.memory.total / 1e9:.1f}", f"{c.time.step:.3g}", f"{c.time.mfu:.0%}", c.overrides)
    return table


def plot(plan: Plan, file: Path) -> None:
    """Draws memory by kind and time by kind of the recipe's mesh and the others.

    Raises:
        RecipeError: not a name of a picture file.
    """
    if file.suffix not in (".png", ".svg", ".pdf"):
        raise RecipeError(f"--plot {file} is not a picture file", fix="Give a name that ends in .png, .svg or .pdf.")
    from matplotlib.figure import Figure

    own = [] if plan.impossible else [("this recipe", plan.memory, plan.time)]
    rows = own + [(c.overrides, c.memory, c.time) for c in plan.others]
    names = [name.replace(" ", "\n") for name, _, _ in rows]
    figure = Figure(figsize=(2 + 1.6 * len(rows), 8), layout="constrained")
    above, below = figure.subplots(2)
    kinds = {kind: [getattr(memory, kind) / 1e9 for _, memory, _ in rows] for kind in MEMORY_ROWS}
    spent = ("matmul", "attention", "memory", "communication", "optimizer")
    seconds = {kind: [getattr(time, kind) for _, _, time in rows] for kind in spent}
    for axes, stacks, unit in ((above, kinds, "GB per GPU"), (below, seconds, "seconds per step")):
        bottom = [0.0] * len(rows)
        for kind, values in stacks.items():
            axes.bar(range(len(rows)), values, bottom=bottom, label=kind, width=0.7)
            bottom = [b + v for b, v in zip(bottom, values, strict=True)]
        axes.set_ylabel(unit)
        axes.set_xticks(range(len(rows)), names, fontsize=7)
        axes.legend(fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    above.axhline(plan.gpu.memory / 1e9, color="black", linewidth=1, linestyle="--")
    above.set_title(f"{plan.recipe.name} on {plan.work.gpus} × {plan.gpu.name}")
    figure.savefig(file, dpi=150)
