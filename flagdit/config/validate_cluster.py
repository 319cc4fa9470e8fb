"""What a `cluster` block must satisfy before a job is submitted. Recipes that go to no cluster are not held to it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from flagdit.config.keys import nearest
from flagdit.config.schema import Recipe
from flagdit.config.validate import Problem, divisors, nearest_values

NAME = re.compile(r"[\w.+@:-]+")
NAMED = ("account", "partition", "qos", "reservation", "gpu_type")
FORMATS = {
    "memory": (r"\d+[KMGT]?", "a size such as 900G, or 0 for all of it"),
    "constraint": (r"[\w.&|!*\[\],()=-]+", "features such as a100&ib"),
    "exclude": (r"[\w.-]+(\[[\d,-]+\])?(,[\w.-]+(\[[\d,-]+\])?)*", "nodes such as node[3,7] or node3,node7"),
    "dependency": (
        r"(singleton|(after|afterany|afterok|afternotok|aftercorr):\d+(\+\d+)?(:\d+(\+\d+)?)*)([,?][a-z]+(:[\d:+]+)?)*",
        "such as afterok:1234 or singleton",
    ),
    "cache": (r"/\S+", "an absolute path without blanks"),
}
TIME = re.compile(r"(?:(?P<d>\d+)-)?(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?")


def cluster_problems(recipe: Recipe, partitions: Mapping[str, str] | None = None) -> list[Problem]:
    """All that is wrong with the `cluster` block and with the mesh on it.

    Args:
        recipe: one that validates otherwise.
        partitions: partition → longest time; None: not known.
    """
    found = [problem for rule in RULES for problem in rule(recipe)]
    wrong = {key for problem in found for key in problem.keys}
    if not wrong & {"cluster.time", "cluster.partition", "cluster.partitions"}:
        found += _limits(recipe, partitions or {})
    return found


def ranks_of(recipe: Recipe) -> int:
    """Ranks of the whole job."""
    return recipe.cluster.nodes * ranks_per_node(recipe)


def ranks_per_node(recipe: Recipe) -> int:
    c = recipe.cluster
    return c.ranks_per_node or c.gpus_per_node or 1


def seconds_of(time: str) -> int | None:
    """SLURM's formats of a time (minutes, minutes:seconds, hours:minutes:seconds, days-hours…) in seconds; None for
    another, and for no limit at all."""
    match = TIME.fullmatch(time.strip())
    if not match:
        return None
    days, a, b, c = (int(match[name] or 0) for name in "dabc")
    if match["d"] is not None or match["c"] is not None:
        hours, minutes, seconds = a, b, c
    else:
        hours, minutes, seconds = 0, a, b
    if (minutes > 59 and match["b"] is not None and match["c"] is not None) or seconds > 59:
        return None
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _names(recipe: Recipe) -> Iterator[Problem]:
    for leaf in NAMED:
        value = getattr(recipe.cluster, leaf)
        if value is not None and not NAME.fullmatch(value):
            yield Problem((f"cluster.{leaf}",), f"cluster.{leaf}={value!r} must be one name without blanks")
    for leaf, (pattern, meant) in FORMATS.items():
        value = getattr(recipe.cluster, leaf)
        if value is not None and not re.fullmatch(pattern, value):
            yield Problem((f"cluster.{leaf}",), f"cluster.{leaf}={value!r} must be {meant}")
    for leaf in ("comment", "logs", "venv", "container", "health_command"):
        value = getattr(recipe.cluster, leaf)
        if value is not None and (not value.strip() or re.search(r"[\n\r\"]", value)):
            yield Problem((f"cluster.{leaf}",), f'cluster.{leaf}={value!r} must be one line, not empty, without "')


def _times(recipe: Recipe) -> Iterator[Problem]:
    c = recipe.cluster
    seconds = seconds_of(c.time)
    if not seconds:
        yield Problem(
            ("cluster.time",), f"cluster.time={c.time} must be a time such as 1-12:00:00, 08:00:00 or 90 (minutes)"
        )
    elif c.signal >= seconds:
        yield Problem(
            ("cluster.signal", "cluster.time"),
            f"cluster.signal={c.signal} seconds must be less than cluster.time={c.time} ({seconds} seconds)",
        )
    if not 0 < recipe.checkpoint.grace < c.signal:
        yield Problem(
            ("checkpoint.grace", "cluster.signal"),
            f"checkpoint.grace={recipe.checkpoint.grace:g} must lie between 0 and cluster.signal={c.signal} seconds, "
            "after which the job is killed",
        )
    for name, limit in c.partitions.items():
        if seconds_of(limit) is None and limit not in ("infinite", "UNLIMITED"):
            yield Problem(
                ("cluster.partitions",), f"cluster.partitions.{name}={limit} must be a time, or infinite for no limit"
            )


def _limits(recipe: Recipe, partitions: Mapping[str, str]) -> Iterator[Problem]:
    c = recipe.cluster
    if not partitions or c.partition is None:
        return
    if c.partition not in partitions:
        meant = nearest(c.partition, partitions)
        fix = f"did you mean {meant}" if meant else f"there are {', '.join(partitions)}"
        yield Problem(("cluster.partition",), f"cluster.partition={c.partition} is not a partition here; {fix}")
        return
    limit, wanted = seconds_of(partitions[c.partition]), seconds_of(c.time)
    if limit and wanted and wanted > limit:
        yield Problem(
            ("cluster.time", "cluster.partition"),
            f"cluster.time={c.time} is more than cluster.partition={c.partition} allows, {partitions[c.partition]}; "
            "the run goes on by itself after each job (cluster.restarts, cluster.chain)",
        )


def _ranks(recipe: Recipe) -> Iterator[Problem]:
    c, p = recipe.cluster, recipe.parallel
    on_gpu = c.gpus_per_node > 0
    if on_gpu and c.ranks_per_node not in (None, c.gpus_per_node) and recipe.train.device != "cpu":
        yield Problem(
            ("cluster.ranks_per_node", "cluster.gpus_per_node"),
            f"cluster.ranks_per_node={c.ranks_per_node}, but a rank has one GPU and cluster.gpus_per_node="
            f"{c.gpus_per_node}; remove cluster.ranks_per_node",
        )
    if not on_gpu and recipe.train.device == "cuda":
        yield Problem(
            ("cluster.gpus_per_node", "train.device"), "train.device=cuda needs cluster.gpus_per_node, at least 1"
        )
    if c.gpu_type and not on_gpu:
        yield Problem(
            ("cluster.gpu_type", "cluster.gpus_per_node"),
            f"cluster.gpu_type={c.gpu_type} has no effect with cluster.gpus_per_node=0",
        )
    ranks, together = ranks_of(recipe), p.tensor * p.context
    if ranks % together:
        near = nearest_values(ranks, [together * n for n in range(1, ranks + 2)])
        yield Problem(
            ("cluster.nodes", "cluster.gpus_per_node", "parallel.tensor", "parallel.context"),
            f"cluster.nodes={c.nodes} × {ranks_per_node(recipe)} = {ranks} ranks are not a multiple of "
            f"parallel.tensor={p.tensor} × parallel.context={p.context}; {near} ranks",
        )
        return
    per_node = ranks_per_node(recipe)
    if p.tensor > per_node or per_node % p.tensor:
        good = nearest_values(p.tensor, [d for d in divisors(per_node)])
        yield Problem(
            ("parallel.tensor", "cluster.gpus_per_node"),
            f"parallel.tensor={p.tensor} must divide the {per_node} ranks of a node, since its ranks talk in every "
            f"block; {good}",
        )
    packs = ranks // together * recipe.train.accumulation
    if recipe.data.batch_size % packs:
        near = nearest_values(recipe.data.batch_size, [packs * n for n in range(1, recipe.data.batch_size + 2)])
        yield Problem(
            ("data.batch_size", "cluster.nodes", "train.accumulation"),
            f"data.batch_size={recipe.data.batch_size} must be a multiple of {ranks // together} data ranks × "
            f"train.accumulation={recipe.train.accumulation}; {near}",
        )


def _environment(recipe: Recipe) -> Iterator[Problem]:
    c = recipe.cluster
    for name, value in c.environment.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            yield Problem(
                ("cluster.environment",), f"cluster.environment holds {name!r}, which no variable can be named"
            )
        elif name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            yield Problem(("cluster.environment",), f"cluster.environment.{name} is set by the launcher; remove it")
        elif "\n" in value:
            yield Problem(("cluster.environment",), f"cluster.environment.{name} must be one line")
    for module in c.modules:
        if not re.fullmatch(r"[\w./+-]+", module):
            yield Problem(("cluster.modules",), f"cluster.modules holds {module!r}; write a name such as cuda/12.8")
    if c.venv and c.container:
        yield Problem(
            ("cluster.venv", "cluster.container"),
            f"cluster.venv={c.venv} and cluster.container={c.container} exclude each other; remove one",
        )
    if c.mounts and not c.container:
        yield Problem(("cluster.mounts", "cluster.container"), "cluster.mounts has no effect without cluster.container")
    for mount in c.mounts:
        if not re.fullmatch(r"[^\s:,]+:/[^\s:,]*(:[\w+,]+)?", mount):
            yield Problem(
                ("cluster.mounts",), f"cluster.mounts holds {mount!r}; write source:/target or source:/target:ro"
            )


def _queue(recipe: Recipe) -> Iterator[Problem]:
    c = recipe.cluster
    if c.chain > 1 and c.dependency == "singleton":
        yield Problem(
            ("cluster.dependency", "cluster.chain"),
            f"cluster.dependency=singleton is what cluster.chain={c.chain} uses itself; remove cluster.dependency",
        )
    if not re.fullmatch(r"[\w.+-]+", recipe.name):
        yield Problem(("name",), f"name={recipe.name!r} names the job; use letters, digits and . _ + - only")


RULES: tuple[Callable[[Recipe], Iterator[Problem]], ...] = (_names, _times, _ranks, _environment, _queue)
