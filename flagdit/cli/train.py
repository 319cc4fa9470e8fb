"""Training and what goes before and after it: plan, doctor, report, recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from flagdit.cli.common import PLAIN, Overrides, RecipeName, RunFolder, group

app = typer.Typer(**PLAIN)
recipes = group("Look at recipes.", "flagdit recipe show quickstart")
app.add_typer(recipes, name="recipe")


@app.command()
def train(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Train a recipe, or continue its run.

    The same command continues a run that was stopped or killed.

    \b
    Example:
      flagdit train quickstart name=wider model.dim=192
    """
    from flagdit.config.load import load_recipe
    from flagdit.train.loop import train as run

    run(load_recipe(recipe, overrides or []))


@app.command()
def report(run: RunFolder) -> None:
    """Write RUN/report.html, one page about a run.

    It holds curves, pictures over time, figures, the recipe and the environment, and needs no other file.

    \b
    Example:
      flagdit report runs/quickstart
    """
    from flagdit.train.report import write_report

    typer.echo(str(write_report(run)))


@app.command()
def wandb(run: RunFolder) -> None:
    """Merge what all starts of a run have left for Weights & Biases into one offline run.

    It is written from the run's own metrics and pictures, every step once; nothing is uploaded.

    \b
    Example:
      flagdit wandb runs/quickstart
    """
    from flagdit.train.wandb_log import merge_offline

    typer.echo(f"wandb sync {merge_offline(run)}")


@app.command()
def doctor(
    folder: Annotated[Path, typer.Argument(help="Where runs will be; its file system is measured.")] = Path("runs"),
) -> None:
    """Look at this machine: versions, GPUs, NCCL, attention backends, compilers, disk; say what is wrong.

    \b
    Example:
      flagdit doctor /scratch/runs
    """
    import torch
    from rich.console import Console

    from flagdit.launch.doctor import examine, table_of, verdict
    from flagdit.model.attention_backends.choose import BACKENDS

    def backends() -> dict[str, Optional[str]]:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return {backend.name: backend.refusal(device, dtype, 128, lse=False) for backend in BACKENDS}

    findings = examine(folder, backends)
    console = Console()
    console.print(table_of(findings), highlight=False)
    console.print(f"\n{verdict(findings)}", highlight=False)
    if any(finding.state == "bad" for finding in findings):
        raise typer.Exit(1)


@app.command()
def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    gpus: Annotated[
        Optional[int],
        typer.Option(min=1, help="GPUs of the run; if not given, the cluster's, or one mesh."),
    ] = None,
    gpu: Annotated[str, typer.Option(help="a100-40, a100-80, h100, h200 or b200.")] = "h100",
    sample_tokens: Annotated[int, typer.Option(min=0, help="Tokens of a sample; 0: by the size in `sample`.")] = 0,
    text_tokens: Annotated[int, typer.Option(min=0, help="Tokens of a caption; 0: text.max_length.")] = 0,
    search: Annotated[bool, typer.Option("--search", help="Rank all meshes of these GPUs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    plot: Annotated[Optional[Path], typer.Option(help="Also draw memory and time by mesh into this file.")] = None,
) -> None:
    """Say what a recipe costs before it runs.

    Parameters, FLOPs, memory by kind, traffic, time and MFU, and whether it fits; without a GPU. docs/plan.md has the
    formulas.

    \b
    Example:
      flagdit plan t2v/7b_128k --gpus 64 --gpu h100 --search
    """
    from rich.console import Console

    from flagdit.config.load import load_recipe
    from flagdit.plan import report

    loaded = load_recipe(recipe, overrides or [])
    made = report.make_plan(
        loaded, gpu=gpu, gpus=gpus or 0, sample_tokens=sample_tokens, text_tokens=text_tokens, search=search
    )
    if plot:
        report.plot(made, plot)
    if as_json:
        typer.echo(json.dumps(report.as_json(made)))
    else:
        report.show(made, Console(), searched=search)


@recipes.command("show")
def show(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Print every key of a recipe with its meaning.

    Bases and overrides are applied.

    \b
    Example:
      flagdit recipe show quickstart model.dim=256
    """
    from flagdit.config.load import load_recipe, to_yaml

    typer.echo(to_yaml(load_recipe(recipe, overrides or [])))
