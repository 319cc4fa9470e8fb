"""Weights & Biases: offline by default, one run across restarts, silent. Imported only when it is used."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flagdit.config.keys import flatten
from flagdit.config.load import load_recipe
from flagdit.config.schema import Recipe
from flagdit.errors import RecipeError
from flagdit.train.folder import RunFolder, read_lines


class WandbLog:
    """Sends metric lines and pictures to wandb; in offline mode into the run folder's `wandb/`, without any network.

    The run's id is kept in `wandb/run_id`, so that every restart adds to the same run. Figures are placed by their own
    `step`, not by wandb's counter, which only ever rises and would refuse the steps that a killed run trains again.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder):
        # Before the import: wandb reads some of these once.
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        folder.wandb.mkdir(parents=True, exist_ok=True)
        id_file = folder.wandb / "run_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12])
        self._wandb = wandb
        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_git=True, disable_code=True)
        online = recipe.log.wandb_mode == "online"
        try:
            self._run = wandb.init(
                project=recipe.log.wandb_project,
                name=recipe.name,
                id=id_file.read_text(),
                resume="allow" if online else None,
                mode="online" if online else "offline",
                dir=str(folder.path),
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
    log.metrics({"step": logged[-1]["step"] if logged else 0, **{f"evaluate/{k}": v for k, v in figures.items()}})
    log.close()
