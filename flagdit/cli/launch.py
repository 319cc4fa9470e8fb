"""`flagdit launch`, and looking after what was launched: status, logs, stop."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from flagdit.cli.common import PLAIN, Overrides, RecipeName, RunFolder, group
from flagdit.errors import RecipeError

app = typer.Typer(**PLAIN)
launches = group("Start training on many devices.", "flagdit launch local quickstart --ranks 2")
app.add_typer(launches, name="launch")


@launches.command("local")
def launch_local(
    recipe: RecipeName,
    overrides: Overrides = None,
    ranks: Annotated[
        Optional[int], typer.Option(min=1, help="Processes; all GPUs of this machine if not given, or the mesh's size.")
    ] = None,
) -> None:
    """Train a recipe with several processes on this machine.

    Rank 0 writes to the terminal, the others into logs/ of the run folder. Ctrl-C saves and ends the run; the same
    command continues it.

    \b
    Example:
      flagdit launch local quickstart name=two data.batch_size=32 --ranks 2
    """
    from flagdit.launch.local import train_locally

    sys.exit(train_locally(recipe, overrides or [], ranks, typer.echo))


@launches.command("slurm")
def launch_slurm(
    recipe: RecipeName,
    overrides: Overrides = None,
    profile: Annotated[
        Optional[list[str]], typer.Option(help="A cluster's recipe, such as clusters/h100_ib; may be repeated.")
    ] = None,
    submit: Annotated[
        bool, typer.Option("--submit/--dry-run", help="Submit the job, or print its script and stop.")
    ] = False,
) -> None:
    """Write the sbatch script of a recipe's `cluster` block, and submit it.

    Everything is checked first, and SLURM is asked with --test-only. Without --submit the script is printed.

    \b
    Example:
      flagdit launch slurm t2i/5b --profile clusters/h100_ib cluster.account=vision --dry-run
    """
    from dataclasses import replace

    from flagdit.launch.slurm import launch_training
    from flagdit.model.sizes import resolve
    from flagdit.parallel.mesh import check_mesh

    def check(loaded: Any, ranks: int) -> None:
        check_mesh(replace(loaded, model=resolve(loaded.model)), ranks)

    launch_training(recipe, overrides or [], profile or [], check=check, submit=submit, tell=typer.echo)


@launches.command("encode")
def launch_encode(
    sources: Annotated[list[Path], typer.Argument(help="Raw data sets, one array task each.")],
    recipe: Annotated[str, typer.Option(help="Its codec, text and cluster blocks say how and where.")],
    out: Annotated[Path, typer.Option(help="Folder that gets an encoded data set of each source's name.")],
    override: Annotated[Optional[list[str]], typer.Option(help="A recipe key to change; may be repeated.")] = None,
    profile: Annotated[Optional[list[str]], typer.Option(help="A cluster's recipe; may be repeated.")] = None,
    submit: Annotated[
        bool, typer.Option("--submit/--dry-run", help="Submit the array, or print its script and stop.")
    ] = False,
) -> None:
    """Encode data sets as a SLURM array.

    A task that is preempted continues where it was.

    \b
    Example:
      flagdit launch encode raw/part-00 raw/part-01 --recipe t2i/5b --out encoded --dry-run
    """
    from flagdit.launch.slurm import launch_encoding

    launch_encoding(recipe, override or [], profile or [], sources, out, submit=submit, tell=typer.echo)


@app.command()
def status(
    runs: Annotated[Optional[list[Path]], typer.Argument(help="Run folders.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All runs of --run-dir.")] = False,
    run_dir: Annotated[Path, typer.Option(help="Folder of runs, for --all.")] = Path("runs"),
    watch: Annotated[bool, typer.Option("--watch", help="Stay and refresh every few seconds.")] = False,
) -> None:
    """Show how runs are doing: queue, restarts, step, throughput, checkpoint, time left, last error.

    \b
    Example:
      flagdit status runs/quickstart --watch
    """
    import time

    from rich.console import Console
    from rich.live import Live

    from flagdit.launch.monitor import all_runs, table_of

    def table() -> Any:
        return table_of(all_runs(run_dir) if everything else runs or [])

    if not everything and not runs:
        raise RecipeError("flagdit status needs run folders or --all")
    if everything and not all_runs(run_dir):
        raise RecipeError(f"there are no runs in {run_dir}", fix="Give the folder of runs with --run-dir.")
    if not watch:
        Console().print(table(), highlight=False)
        return
    with Live(table(), auto_refresh=False) as live:
        while True:
            time.sleep(5)
            live.update(table(), refresh=True)


@app.command()
def logs(
    run: RunFolder,
    rank: Annotated[Optional[int], typer.Option(min=0, help="Rank; the job's own log if not given.")] = None,
    lines: Annotated[int, typer.Option(min=1, help="Last lines to show.")] = 50,
    on: Annotated[bool, typer.Option("--follow", help="Show new lines as they come.")] = False,
) -> None:
    """Show what a rank, or the job's script, wrote.

    \b
    Example:
      flagdit logs runs/quickstart --rank 3 --follow
    """
    from flagdit.launch.monitor import follow, log_files

    for file in log_files(run, rank):
        follow(file, lines, on, typer.echo)


@app.command()
def stop(
    run: RunFolder,
    seconds: Annotated[float, typer.Option(min=0, help="Wait so long for the job to leave.")] = 600,
) -> None:
    """Stop a run's SLURM job: it saves first and is not queued again.

    \b
    Example:
      flagdit stop runs/quickstart
    """
    from flagdit.launch import monitor

    monitor.stop(run, seconds, typer.echo)
