"""The story of a run."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from flagdit.checkpoint import store
from flagdit.config.schema import Recipe
from flagdit.data_pipelines.loader import Loader, build_loader
from flagdit.train.display import display_for, quantity
from flagdit.train.environment import describe
from flagdit.train.folder import RunFolder, read_lines, write_lines
from flagdit.train.hooks import Hook, LogMetrics, Sample, SaveCheckpoint, Validate
from flagdit.train.report import write_report
from flagdit.train.run import Run, build
from flagdit.train.signals import Stop, stop_on_signals
from flagdit.train.step import take_step
from flagdit.train.wandb_log import WandbLog


def train(recipe: Recipe) -> Path:
    """Trains a recipe from the start, or on from the newest checkpoint in its run folder.

    SIGINT, SIGTERM and SIGUSR1 let the current step end and save it; a second signal leaves at once.

    Returns:
        The run folder.

    Raises:
        RecipeError: the folder holds another run, or the recipe cannot be run here.
        DataError: the data set cannot be read, or too many of its samples.
        CheckpointError: the run folder or a checkpoint cannot be read or written.
        TrainingError: too many bad steps in a row.
        SystemExit: stopped by a signal, after saving; the code is 128 + its number.
    """
    folder = RunFolder(Path(recipe.run_dir) / recipe.name)
    with folder.locked(), torch_settings(recipe), stop_on_signals() as stop:
        folder.check(recipe)
        display = display_for()
        done = max((step for step, _ in store.complete(folder.path)), default=0)
        if done >= recipe.train.steps:
            display.note(
                f"{folder.path} is finished: {done} of {recipe.train.steps} steps are done. "
                "Raise train.steps to train on."
            )
            return folder.path

        run = build(recipe, folder, display)
        if saved := store.load_latest(folder.path, display.note):
            run.restore(saved)
        loader = build_loader(recipe, run.step)
        hooks = hooks_of(run)
        # All that can be wrong has been found by now; only from here on does the folder change.
        open_folder(run)
        display.note(opening(run))
        with watched(run):
            go(run, loader, hooks, stop)
        write_report(folder.path)
        display.note(f"done: {folder.report}")
    return folder.path


def go(run: Run, loader: Loader, hooks: list[Hook], stop: Stop) -> None:
    """Steps until the run is done or somebody stops it."""
    since = time.perf_counter()
    for batches in loader:
        run.guard.unreadable(loader.bad, run.display.note)
        result = take_step(run, batches, since)
        for hook in hooks:
            hook.after_step(run, result)
        if run.step == run.recipe.train.steps:
            return
        if stop.signal:
            leave(run, hooks, stop.signal)
        since = time.perf_counter()


def hooks_of(run: Run) -> list[Hook]:
    """What the recipe wants to happen around the steps, in order."""
    hooks: list[Hook] = [LogMetrics()]
    if run.recipe.validation.every:
        hooks.append(Validate(run))
    if run.recipe.sample.every:
        hooks.append(Sample(run))
    return [*hooks, SaveCheckpoint(run)]


def leave(run: Run, hooks: list[Hook], number: int) -> None:
    """Saves after a signal and ends the process."""
    for hook in hooks:
        if isinstance(hook, SaveCheckpoint):
            hook.save(run)
    run.display.note(f"stopped at step {run.step} of {run.recipe.train.steps}; the same command continues")
    raise SystemExit(128 + number)


def open_folder(run: Run) -> None:
    """Writes the recipe and this start into the folder, and drops lines past the step to continue from."""
    folder = run.folder
    folder.write_recipe(run.recipe)
    folder.rewind(run.step)
    parameters = sum(p.numel() for p in run.engine.weights().values())
    starts = read_lines(folder.environment) if folder.environment.exists() else []
    write_lines(
        folder.environment, [*starts, {**describe(run.engine.device), "step": run.step, "parameters": parameters}]
    )


def opening(run: Run) -> str:
    """The first line that a person reads."""
    begin = f"continuing at step {run.step}" if run.step else "training"
    count = quantity(sum(p.numel() for p in run.engine.weights().values()))
    averages = ", ".join(f"{d:g}" for d in run.emas.decays) or "none"
    precision = f"{run.recipe.train.precision}, attention {run.attention} on {run.engine.device.type}"
    return f"{begin}: {count} parameters, {precision}, averages {averages}, in {run.folder.path}"


@contextlib.contextmanager
def watched(run: Run) -> Iterator[None]:
    """The display and wandb, open as long as the run goes."""
    if run.recipe.log.wandb_project:
        run.wandb = WandbLog(run.recipe, run.folder)
    run.display.start(run.step, run.recipe.train.steps)
    try:
        yield
    finally:
        run.display.stop()
        if run.wandb:
            run.wandb.close()


@contextlib.contextmanager
def torch_settings(recipe: Recipe) -> Iterator[None]:
    """Deterministic algorithms, if the recipe asks for them; torch is left as it was found."""
    before = torch.are_deterministic_algorithms_enabled()
    if recipe.train.deterministic:
        # cuBLAS reads this when it starts; without it torch refuses its matrix products.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
