"""`flagdit data`: build, encode and inspect data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from flagdit.cli.common import Overrides, group

MaxBad = Annotated[float, typer.Option(help="Share of unusable samples above which the command fails.")]
DataFolder = Annotated[Path, typer.Argument(help="A raw or encoded data set.")]

app = group("Build, encode and inspect data sets.", "flagdit data stats data/quickstart/encoded")


@app.command(
    "build",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def build(
    context: typer.Context,
    kind: Annotated[str, typer.Argument(help="What to pack; --help lists the kinds.")] = "",
    recipe: Annotated[Optional[str], typer.Option(help="Its limits block says what a sample may be.")] = None,
    max_bad: MaxBad = 0.1,
    shard_samples: Annotated[int, typer.Option(help="Samples per shard.")] = 1000,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a data set of other settings.")] = False,
) -> None:
    """Pack media and captions into a data set. `--help` lists the kinds, `KIND --help` their options.

    \b
    Example:
      flagdit data build emoji data/emoji --size 64 --styles twemoji,openmoji --aspects 1:1,3:2,2:3
    """
    from flagdit.data_pipelines.build import build_from_words

    rest: dict[str, Any] = {"shard_samples": shard_samples, "max_bad": max_bad, "overwrite": overwrite}
    if recipe:
        from flagdit.config.load import load_recipe

        rest["limits"] = load_recipe(recipe).limits
    build_from_words(kind, context.args, **rest)


@app.command("encode")
def encode(
    src: Annotated[Path, typer.Argument(help="A raw data set.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    recipe: Annotated[str, typer.Option(help="Its codec and text blocks say how.")],
    overrides: Overrides = None,
    dtype: Annotated[
        str, typer.Option(help="On disk: fp32, fp16, bf16; auto: fp16 for what a folder's model makes.")
    ] = "auto",
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: this one. Each holds the models.")] = 0,
    device: Annotated[str, typer.Option(help="Of the models: cpu, cuda; auto: cuda where there is one.")] = "auto",
    max_bad: MaxBad = 0.01,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a data set of other settings.")] = False,
    task: Annotated[
        Optional[str], typer.Option(help="i/n: this part of n that run at once; auto: by the SLURM array.")
    ] = None,
) -> None:
    """Encode media and captions for training.

    Media become latents and captions text features, as the recipe says. A stopped encode continues.

    \b
    Example:
      flagdit data encode data/emoji data/emoji_encoded --recipe quickstart
    """
    from flagdit.config.load import load_recipe
    from flagdit.data_pipelines.encode import array_task, encode_dataset

    encode_dataset(
        src,
        out,
        load_recipe(recipe, overrides or []),
        dtype=dtype,
        workers=workers,
        device=device,
        max_bad=max_bad,
        overwrite=overwrite,
        task=array_task(task),
    )


@app.command("stats")
def stats(
    path: DataFolder,
    plots: Annotated[Optional[Path], typer.Option(help="Also draw the distributions into this picture.")] = None,
    patch_size: Annotated[int, typer.Option(min=1, help="Rows and columns of latent per token.")] = 2,
) -> None:
    """Show what is in a data set, as JSON.

    \b
    Example:
      flagdit data stats data/emoji_encoded --plots stats.png
    """
    from flagdit.data_pipelines.stats import describe, write_plots

    described = describe(path, patch_size)
    typer.echo(json.dumps(described, indent=2, ensure_ascii=False))
    if plots:
        write_plots(described, plots)


@app.command("lint")
def lint(path: DataFolder) -> None:
    """Look for everything that can be wrong with a data set.

    Reads every sample. Ends with 1 where it finds something.

    \b
    Example:
      flagdit data lint data/emoji_encoded
    """
    from flagdit.data_pipelines.lint import lint as look

    findings = look(path)
    for finding in findings:
        typer.echo(f"{finding.where}: {finding.what}")
    if findings:
        raise typer.Exit(1)


@app.command("show")
def show_data(
    path: DataFolder,
    out: Annotated[Path, typer.Option(help="Page to write.")] = Path("data.html"),
    limit: Annotated[int, typer.Option(min=1, help="Samples to show, spread over the data set.")] = 60,
) -> None:
    """Write a page to look at samples of a data set and listen to them.

    \b
    Example:
      flagdit data show data/emoji --out emoji.html
    """
    from flagdit.data_pipelines.show import write_page

    typer.echo(str(write_page(path, out, limit)))
