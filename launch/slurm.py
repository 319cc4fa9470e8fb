"""`flagdit launch slurm`: a recipe's `cluster` block as an sbatch script, and its submission."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jinja2

from flagdit.config.load import load_recipe, save_recipe
from flagdit.config.schema import ClusterConfig, Recipe
from flagdit.config.validate import raise_problems
from flagdit.config.validate_cluster import cluster_problems, ranks_of
from flagdit.errors import LaunchError
from flagdit.launch.monitor import live_jobs
from flagdit.launch.scheduler import command, live_partitions, there

TEMPLATES = Path(__file__).parent / "templates"
NETWORKS = {
    "none": {},
    "ib": {"NCCL_IB_TIMEOUT": "22", "NCCL_IB_RETRY_CNT": "7", "NCCL_SOCKET_IFNAME": "^lo,docker"},
    "efa": {
        "FI_PROVIDER": "efa",
        "FI_EFA_USE_DEVICE_RDMA": "1",
        "FI_EFA_FORK_SAFE": "1",
        "NCCL_SOCKET_IFNAME": "^lo,docker",
    },
}
"""Environment of NCCL by `cluster.network`; `cluster.environment` wins."""


def checked(recipe: Recipe) -> Recipe:
    """The recipe, if its `cluster` block and the mesh on it are right.

    Raises:
        RecipeError: lists every problem with its keys.
    """
    partitions = recipe.cluster.partitions or live_partitions()
    raise_problems(cluster_problems(recipe, partitions), recipe.name)
    return recipe


def render_training(recipe: Recipe, folder: Path) -> str:
    """The sbatch script of a run.

    Args:
        recipe: checked.
        folder: the run folder, absolute.
    """
    c = recipe.cluster
    logs = _logs(recipe, folder)
    per_node = c.ranks_per_node or c.gpus_per_node or 1
    tasks = per_node if c.launcher == "srun" else 1
    directives = [
        *_common(c, recipe.name),
        f"--nodes={c.nodes}",
        f"--ntasks-per-node={tasks}",
        f"--cpus-per-task={c.cpus_per_rank * per_node // tasks}",
        f"--output={_quoted(logs / 'slurm_%j.out')}",
        f"--signal=B:USR1@{c.signal}",
        "--requeue" if c.restarts else "--no-requeue",
    ]
    if c.dependency or c.chain > 1:
        directives.append(f"--dependency={c.dependency or 'singleton'}")
    return _render(
        "train.sh.j2",
        **_environment(c, per_node),
        directives=directives,
        name=recipe.name,
        run=shlex.quote(str(folder)),
        logs=shlex.quote(str(logs)),
        restarts=c.restarts,
        python=_python(c),
        health=_health(recipe, per_node) if c.health else "",
        srun_node=_srun(c, "--ntasks-per-node=1", f"--ntasks={c.nodes}", f"--cpus-per-task={c.cpus_per_rank}"),
        srun_train=_train(recipe, folder, logs, per_node),
    )


def render_encoding(recipe: Recipe, sources: Sequence[Path], out: Path) -> str:
    """The sbatch script of an array that encodes one raw data set a task."""
    c = recipe.cluster
    directives = [
        *_common(c, f"{recipe.name}-encode"),
        "--nodes=1",
        "--ntasks-per-node=1",
        f"--cpus-per-task={c.cpus_per_rank}",
        f"--array=0-{len(sources) - 1}",
        f"--output={_quoted(out / 'logs' / 'slurm_%A_%a.out')}",
        "--requeue",
    ]
    if c.dependency:
        directives.append(f"--dependency={c.dependency}")
    recipe_file = shlex.quote(str(out / "logs" / "recipe.yaml"))
    encode = f'{_python(c)} -m flagdit.cli data encode "$source" "$out" --recipe {recipe_file}'
    return _render(
        "encode.sh.j2",
        **_environment(c, 1),
        directives=directives,
        sources=[shlex.quote(str(source)) for source in sources],
        out=shlex.quote(str(out)),
        srun_encode=f"{_srun(c, f'--cpus-per-task={c.cpus_per_rank}')} {encode}",
    )


def launch_training(
    name: str,
    overrides: Sequence[str],
    profiles: Sequence[str] = (),
    *,
    check: Callable[[Recipe, int], None] = lambda recipe, ranks: None,
    submit: bool,
    tell: Callable[[str], None],
) -> str | None:
    """Renders, and submits if asked to.

    Args:
        name, overrides, profiles: as `load_recipe` takes them.
        check: looks at the recipe and the number of its ranks; raises what is wrong.
        submit: to the queue; else `tell` gets the script.
        tell: gets lines for people.

    Returns:
        The id of the (last) job; None without submission, when `tell` got the script.

    Raises:
        RecipeError: the recipe or its cluster block is wrong.
        LaunchError: there is no SLURM here, it refuses the job, or the run has one already.
    """
    recipe = checked(load_recipe(name, overrides, profiles))
    check(recipe, ranks_of(recipe))
    folder = (Path(recipe.run_dir) / recipe.name).absolute()
    script = render_training(recipe, folder)
    if not submit:
        tell(script.rstrip())
        return None
    _need_slurm()
    # Two jobs of a run would meet in its folder, unless one waits for the other.
    if recipe.cluster.dependency is None and (live := live_jobs(folder)):
        jobs = ", ".join(f"{job} ({facts['JobState']})" for job, facts in live)
        raise LaunchError(
            f"the run {recipe.name} has jobs in the queue already: {jobs}",
            fix=f"Stop it first (flagdit stop {folder}), choose another name, or queue behind it with "
            f"cluster.dependency=afterany:{live[0][0]}.",
        )
    state = folder / "slurm"
    for made in (state, _logs(recipe, folder)):
        made.mkdir(parents=True, exist_ok=True)
    for stale in ("stop", "suspect"):
        (state / stale).unlink(missing_ok=True)
    # What was submitted stays as it was, whatever happens to the file it came from.
    save_recipe(recipe, state / "recipe.yaml")
    job = None
    for _ in range(recipe.cluster.chain):
        job = submit_script(script, state / "job.sh")
        line = {"job": job, "submitted": time.time(), "nodes": recipe.cluster.nodes, "ranks": ranks_of(recipe)}
        with (state / "jobs.jsonl").open("a") as f:
            f.write(json.dumps(line) + "\n")
        tell(f"job {job} is submitted; flagdit status {folder}")
    return job


def launch_encoding(
    name: str,
    overrides: Sequence[str],
    profiles: Sequence[str],
    sources: Sequence[Path],
    out: Path,
    *,
    submit: bool,
    tell: Callable[[str], None],
) -> str | None:
    """The same for an array of encodings. `sources` are raw data sets; `out` gets an encoded one of each's name."""
    recipe = checked(load_recipe(name, overrides, profiles))
    names = [source.name for source in sources]
    if not sources or len(set(names)) < len(names):
        raise LaunchError("give raw data sets with different folder names", fix="Each becomes OUT/its name.")
    missing = [str(source) for source in sources if not (source / "dataset.json").exists()]
    if missing:
        raise LaunchError(f"no data set is in {', '.join(missing)}", fix="Make it with `flagdit data build`.")
    out = out.absolute()
    script = render_encoding(recipe, [source.absolute() for source in sources], out)
    if not submit:
        tell(script.rstrip())
        return None
    _need_slurm()
    (out / "logs").mkdir(parents=True, exist_ok=True)
    save_recipe(recipe, out / "logs" / "recipe.yaml")
    job = submit_script(script, out / "logs" / "job.sh")
    tell(f"job {job} with {len(sources)} tasks is submitted; logs in {out / 'logs'}")
    return job


def submit_script(script: str, file: Path) -> str:
    """Submits a script after `sbatch --test-only` has looked at it.

    Returns:
        The job's id.

    Raises:
        LaunchError: SLURM refuses it; the message is SLURM's.
    """
    file.write_text(script)
    for arguments in (["--test-only"], ["--parsable"]):
        done = command(["sbatch", *arguments, str(file)])
        if done.returncode:
            why = done.stderr.strip().replace("sbatch: error: ", "").replace("allocation failure: ", "")
            raise LaunchError(
                f"SLURM refuses the job: {why}", where=str(file), fix="Change the recipe's cluster block."
            )
    return done.stdout.strip().split(";")[0]


def _common(c: ClusterConfig, name: str) -> list[str]:
    """Directives that every job has: who pays, where, how long."""
    options = {
        "account": c.account,
        "partition": c.partition,
        "qos": c.qos,
        "reservation": c.reservation,
        "time": c.time,
        "mem": c.memory,
        "constraint": c.constraint and _quoted(c.constraint),
        "exclude": c.exclude,
        "comment": c.comment and _quoted(c.comment),
    }
    lines = [f"--job-name={name}", *(f"--{option}={value}" for option, value in options.items() if value is not None)]
    if c.gpus_per_node:
        lines.append(f"--gres=gpu:{c.gpu_type + ':' if c.gpu_type else ''}{c.gpus_per_node}")
    if c.exclusive:
        lines.append("--exclusive")
    return [*lines, f"--chdir={_quoted(Path.cwd())}", "--open-mode=append"]


def _environment(c: ClusterConfig, per_node: int) -> dict:
    cache = f"{c.cache}/$UID"
    variables = {
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "OMP_NUM_THREADS": str(max(c.cpus_per_rank // 2, 1)),
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        **NETWORKS[c.network],
        **c.environment,
    }
    quoted = [(name, shlex.quote(value)) for name, value in variables.items()]
    # On the node's own disk: thousands of ranks that compile into one shared folder wait for each other.
    caches = [("TRITON_CACHE_DIR", f'"{cache}/triton"'), ("TORCHINDUCTOR_CACHE_DIR", f'"{cache}/inductor"')]
    return {
        "environment": [*quoted, *(pair for pair in caches if pair[0] not in c.environment)],
        "setup": c.setup,
        "modules": c.modules,
        "venv": c.venv and shlex.quote(c.venv),
    }


def _train(recipe: Recipe, folder: Path, logs: Path, per_node: int) -> str:
    c = recipe.cluster
    train = f"-m flagdit.cli train {shlex.quote(str(folder / 'slurm' / 'recipe.yaml'))}"
    kind = "node" if c.launcher == "torchrun" else "rank"
    output = f"--output={shlex.quote(str(logs / f'{kind}_%t.log'))}"
    if c.launcher == "torchrun":
        rendezvous = f"--nnodes={c.nodes} --nproc-per-node={per_node} --rdzv-backend=c10d --max-restarts=0"
        where = '--rdzv-id="$SLURM_JOB_ID.$restart" --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT"'
        run = f"torch.distributed.run {rendezvous} {where} --signals-to-handle=SIGTERM,SIGINT,SIGUSR1"
        tasks = _srun(c, "--kill-on-bad-exit=1", f"--cpus-per-task={c.cpus_per_rank * per_node}", output)
        return f"{tasks} \\\n    {_python(c)} -m {run} {train.replace('-m ', '-m ', 1)}"
    ranks = _srun(c, "--kill-on-bad-exit=1", f"--cpus-per-task={c.cpus_per_rank}", output)
    inner = (
        "export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS "
        f"LOCAL_WORLD_SIZE={per_node}; exec {_python(c)} {train}"
    )
    return f"{ranks} \\\n    bash -c {shlex.quote(inner)}"


def _srun(c: ClusterConfig, *options: str) -> str:
    parts = ["srun", *options]
    if c.container:
        parts.append(f"--container-image={shlex.quote(c.container)}")
        parts += [f"--container-mounts={shlex.quote(','.join(c.mounts))}"] if c.mounts else []
        parts += [f"--container-workdir={shlex.quote(str(Path.cwd()))}"]
    return " ".join(parts)


def _health(recipe: Recipe, per_node: int) -> str:
    c = recipe.cluster
    options = [
        f"--gpus {c.gpus_per_node}",
        f"--min-disk {c.min_disk:g}",
        f"--min-bandwidth {c.min_bandwidth:g}",
        f'--folder "$state/health" --cache {shlex.quote(c.cache)}',
    ]
    if c.health_command:
        options.append(f"--command {shlex.quote(c.health_command)}")
    return f"{_python(c)} -m flagdit.launch.health {' '.join(options)}"


def _python(c: ClusterConfig) -> str:
    """The interpreter of the environment that the job sets up; else the one that runs now."""
    return "python" if c.venv or c.container or c.modules else shlex.quote(sys.executable)


def _logs(recipe: Recipe, folder: Path) -> Path:
    return Path(recipe.cluster.logs).absolute() if recipe.cluster.logs else folder / "logs"


def _quoted(value: object) -> str:
    """As sbatch reads the values of its directives."""
    return f'"{value}"' if any(blank in str(value) for blank in " &|*()") else str(value)


def _need_slurm() -> None:
    if not there():
        raise LaunchError(
            "this machine has no sbatch, so nothing can be submitted from here",
            fix="Run this on a login node of the cluster, or look at the script with --dry-run.",
        )


def _render(template: str, **values: object) -> str:
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.get_template(template).render(**values)
