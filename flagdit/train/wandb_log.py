"""Weights & Biases: offline by default, one run across restarts, silent. Imported only when it is used."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from flagdit.config.keys import flatten
from flagdit.config.load import load_recipe
from flagdit.config.schema import Recipe
from flagdit.errors import CheckpointError, RecipeError
from flagdit.train.folder import RunFolder, read_lines, writing


class WandbLog:
    """Sends metric lines and pictures to wandb; in offline mode into the run folder's `wandb/`, without any network.

    The run's id is kept in `wandb/run_id`, so that every restart adds to the same run. Figures are placed by their own
    `step`, not by wandb's counter, which only ever rises and would refuse the steps that a killed run trains again.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, into: Path | None = None):
        """
        Args:
            into: folder that gets wandb's own one; None: the run folder.

        Raises:
            RecipeError: wandb cannot start.
        """
        # Before the import: wandb reads some of these once.
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        folder.wandb.mkdir(parents=True, exist_ok=True)
        id_file = folder.wandb_id
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12])
        self._wandb = wandb
        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_git=True, disable_code=True)
        online = recipe.log.wandb_mode == "online" and into is None
        try:
            self._run = wandb.init(
                project=recipe.log.wandb_project,
                name=recipe.name,
                id=id_file.read_text(),
                resume="allow" if online else None,
                mode="online" if online else "offline",
                dir=str(into or folder.path),
                config=flatten(recipe),
                settings=settings,
            )
        except wandb.Error as error:
            raise RecipeError(
                f"wandb cannot start: {error}",
                where=f"log.wandb_mode={recipe.log.wandb_mode}",
                fix="Use log.wandb_mode=offline and `wandb sync` later, or log.wandb_project=null for no wandb.",
            ) from error
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def metrics(self, line: dict[str, Any]) -> None:
        """Logs a line of metrics.jsonl; empty figures are left out."""
        self._run.log({key: value for key, value in line.items() if value is not None})

    def picture(self, file: Path, step: int, caption: str) -> None:
        """Logs a sample grid."""
        self._run.log({"step": step, "samples": self._wandb.Image(str(file), caption=caption)})

    def close(self) -> None:
        self._run.finish()


def merge_offline(run_dir: Path) -> Path:
    """Makes one offline folder of all that the starts of a run have left, for one `wandb sync`.

    A run that was queued again twenty times has twenty-one offline folders; those of killed starts lack their last
    lines and hold steps that were trained again. The run folder knows better: the merged one is written anew, under the
    same id, from its metrics, pictures and figures, every step once. The parts move to `wandb/parts/`.

    Returns:
        The merged folder.

    Raises:
        CheckpointError: no run, a run that goes on, or a disk that refuses.
        RecipeError: the run has no wandb, or wandb cannot start.
    """
    folder = RunFolder(run_dir)
    if not folder.recipe.exists():
        raise CheckpointError("there is no recipe.yaml, so this is not a run folder", where=str(run_dir))
    recipe = load_recipe(folder.recipe)
    parts = sorted(folder.wandb.glob("offline-run-*"))
    if not parts:
        raise RecipeError(
            "the run has left nothing for wandb",
            where=str(folder.wandb),
            fix="Train with log.wandb_project=NAME and log.wandb_mode=offline.",
        )
    with folder.locked(), writing(folder.wandb):
        staging = folder.wandb / "merging"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        _write_whole(WandbLog(recipe, folder, staging), recipe, folder)
        for part in parts:
            _move(part, folder.wandb / "parts")
        (made,) = staging.glob("wandb/offline-run-*")
        merged = _move(made, folder.wandb)
        shutil.rmtree(staging)
        for link in ("latest-run", "debug.log", "debug-internal.log"):
            (folder.wandb / link).unlink(missing_ok=True)  # they point to the parts
    return merged


def _move(path: Path, into: Path) -> Path:
    """Moves a folder; its name holds seconds, so that another of that name may be there."""
    into.mkdir(exist_ok=True)
    target = next(t for n in count() if not (t := into / f"{path.name}{f'-{n}' if n else ''}").exists())
    os.replace(path, target)
    return target


def _write_whole(log: WandbLog, recipe: Recipe, folder: RunFolder) -> None:
    """All that a run has logged, in its order."""
    lines = read_lines(folder.metrics) if folder.metrics.exists() else []
    caption = " · ".join(recipe.sample.prompts)
    grids = {int(file.stem.removeprefix("step_")): file for file in folder.samples.glob("step_*.png")}
    for i, line in enumerate(lines):
        step = line["step"]
        log.metrics(line)
        if step in grids and (i + 1 == len(lines) or lines[i + 1]["step"] > step):
            log.picture(grids[step], step, caption)
    figures = folder.path / "figures.json"
    if figures.exists() and lines:
        log.metrics(_evaluated(lines[-1]["step"], json.loads(figures.read_text())))
    log.close()


def _evaluated(step: int, figures: Mapping[str, Any]) -> dict[str, Any]:
    return {"step": step, **{f"evaluate/{name}": value for name, value in figures.items()}}


def log_figures(run_dir: Path, figures: Mapping[str, float]) -> None:
    """Adds figures of an evaluation to the run's wandb, at the last step that it has logged; without wandb: nothing.

    Raises:
        RecipeError: wandb cannot start.
    """
    folder = RunFolder(run_dir)
    recipe = load_recipe(folder.recipe)
    if recipe.log.wandb_project is None:
        return
    logged = read_lines(folder.metrics) if folder.metrics.exists() else []
    log = WandbLog(recipe, folder)
    log.metrics(_evaluated(logged[-1]["step"] if logged else 0, figures))
    log.close()
