"""The story of a run."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from flagdit.checkpoint import store
from flagdit.checkpoint.folders import clean
from flagdit.config.schema import Recipe
from flagdit.data_pipelines.loader import BadSample, Loader, build_loader
from flagdit.errors import RecipeError
from flagdit.model.sizes import resolve
from flagdit.parallel.mesh import Launch, ParallelContext, check_mesh, mesh_of
from flagdit.train.display import SilentDisplay, display_for, quantity
from flagdit.train.environment import describe
from flagdit.train.folder import RunFolder, read_lines, write_lines
from flagdit.train.hooks import Hook, LogMetrics, PatientHook, Sample, SaveCheckpoint, Validate
from flagdit.train.report import write_report
from flagdit.train.run import Run, build
from flagdit.train.signals import Stop, stop_on_signals
from flagdit.train.step import take_step
from flagdit.train.stragglers import Stragglers
from flagdit.train.wandb_log import WandbLog
from flagdit.train.watchdog import Watchdog


def train(recipe: Recipe) -> Path:
    """Trains a recipe from the start, or on from the newest checkpoint in its run folder.

    Started by torchrun, or with its environment variables, this process is one rank of a mesh (`recipe.parallel`).

    SIGINT, SIGTERM and SIGUSR1 let the current step end and save it, within `checkpoint.grace` seconds; a second signal
    leaves at once.

    Returns:
        The run folder.

    Raises:
        RecipeError: the folder holds another run, or the recipe cannot be run here.
        DataError: the data set cannot be read, or too many of its samples.
        CheckpointError: the run folder or a checkpoint cannot be read or written.
        TrainingError: too many bad steps in a row.
        SystemExit: stopped by a signal, after saving; the code is 128 + its number.
    """
    check_mesh(replace(recipe, model=resolve(recipe.model)), Launch.from_environment().world)
    folder = RunFolder(Path(recipe.run_dir) / recipe.name)
    with (
        stop_on_signals(recipe.checkpoint.grace) as stop,
        mesh_of(recipe, device_of(recipe)) as mesh,
        folder.locked() if mesh.is_first else contextlib.nullcontext(),
        torch_settings(recipe),
    ):
        run_on(mesh, recipe, folder, stop)
    return folder.path


def run_on(mesh: ParallelContext, recipe: Recipe, folder: RunFolder, stop: Stop) -> None:
    """The part of a run that one rank plays. Rank 0 alone writes into the folder and talks to people."""
    display = display_for() if mesh.is_first else SilentDisplay()
    if mesh.is_first:
        folder.check(recipe)
    done = mesh.from_first(max((step for step, _ in store.complete(folder.path)), default=0))
    if done >= recipe.train.steps:
        display.note(
            f"{folder.path} is finished: {done} of {recipe.train.steps} steps are done. Raise train.steps to train on."
        )
        return
    run = build(recipe, folder, display, mesh)
    if saved := latest_checkpoint(run):
        run.restore(saved)
    run.saver.prepare(run.step, run.shards())
    loader = build_loader(recipe, run.step, mesh.data.rank, mesh.data.size)
    hooks = hooks_of(run)
    # All that can be wrong has been found by now; only from here on does the folder change.
    if mesh.is_first:
        open_folder(run)
    display.note(opening(run))
    with watched(run):
        go(run, loader, hooks, stop)
    if mesh.is_first:
        write_report(folder.path)
    display.note(f"done: {folder.report}")


def latest_checkpoint(run: Run) -> store.Checkpoint | None:
    """The newest checkpoint that is sound; damaged ones are set aside."""
    cfg = run.recipe.checkpoint
    run.saver.wait()
    return store.newest(
        run.folder.path, run.display.note, hashes=cfg.verify, fall_back=cfg.fall_back, ranks=run.saver.ranks
    )


def go(run: Run, loader: Loader, hooks: list[Hook], stop: Stop) -> None:
    """Steps until the run is done or somebody stops it."""
    mesh, steps = run.engine.mesh, run.recipe.train.steps
    slow = Stragglers(run)
    with Watchdog(run.folder.path / "hang", mesh.rank, mesh.world, hang_seconds(run), run.model) as watchdog:
        for hook in hooks:
            if isinstance(hook, PatientHook):
                hook.make_up(run)
        watchdog.beat(run.step, "data")
        since = time.perf_counter()
        for batches in loader:
            slow.waited(time.perf_counter() - since)
            watchdog.beat(run.step, "step")
            run.guard.unreadable(unreadable(run, loader), run.display.note)
            result = take_step(run, batches, since)
            if result.bad and run.recipe.guard.policy == "rollback":
                go_back(run, loader, result.bad)
            # A signal reaches the ranks at different moments; they leave after the same step.
            number = 0 if run.step == steps else mesh.largest(stop.signal or 0)
            for hook in [*hooks, slow]:
                watchdog.beat(run.step, "save" if isinstance(hook, SaveCheckpoint) else "hooks")
                if not (number and isinstance(hook, PatientHook)):
                    hook.after_step(run, result)
            if run.step == steps:
                return
            if number := number or mesh.largest(stop.signal or 0):  # it may have come during a long hook
                watchdog.beat(run.step, "save")
                leave(run, hooks, number)
            since = time.perf_counter()
            watchdog.beat(run.step, "data")


def go_back(run: Run, loader: Loader, why: str) -> None:
    """After a bad step: back to the newest checkpoint and on with the next batch, so that all batches since are left
    out, as in the training of PaLM (arXiv 2204.02311, section 5.1)."""
    saved = latest_checkpoint(run)
    if saved is None:
        run.display.note(f"step {run.step}: {why}; no checkpoint to return to yet, so its batch alone is left out")
        return
    run.take_weights(saved)
    left_out = {k + 1: loader.ids_of(k) for k in range(saved.step, run.step)}
    run.guard.returned(run.step, saved.step, left_out, saved.state["guard"]["recent"])
    run.display.note(
        f"step {run.step}: {why}; back to the checkpoint of step {saved.step}, and the batches since are left out"
    )


def hang_seconds(run: Run) -> float:
    """Of silence after which a run of several ranks counts as hanging; its collectives give up a little later."""
    return 0.9 * run.recipe.parallel.timeout if run.engine.mesh.world > 1 else 0


def unreadable(run: Run, loader: Loader) -> list[BadSample]:
    """Samples that the loaders of all data ranks have left out so far."""
    mesh = run.engine.mesh
    if mesh.data.size == 1 or not mesh.largest(len(loader.bad)):
        return loader.bad
    everyone = mesh.from_all(loader.bad if mesh.holds_first_tokens else [])
    return sorted((bad for found in everyone for bad in found), key=lambda bad: (bad.step, bad.sample_id))


def hooks_of(run: Run) -> list[Hook]:
    """What the recipe wants to happen around the steps, in order."""
    hooks: list[Hook] = [LogMetrics()]
    if run.recipe.validation.every:
        hooks.append(Validate(run))
    if run.recipe.sample.every:
        hooks.append(Sample(run))
    return [*hooks, SaveCheckpoint()]


def leave(run: Run, hooks: list[Hook], number: int) -> None:
    """Saves after a signal and ends the process."""
    for hook in hooks:
        if isinstance(hook, SaveCheckpoint):
            hook.save(run)
    run.display.note(f"stopped at step {run.step} of {run.recipe.train.steps}; the same command continues")
    if run.wandb:
        run.wandb.close()
        run.wandb = None
    run.engine.mesh.largest(0)  # a launcher may kill the others as soon as one rank is gone: rank 0 is done by now
    raise SystemExit(128 + number)


def open_folder(run: Run) -> None:
    """Writes the recipe and this start into the folder, and drops lines past the step to continue from."""
    folder = run.folder
    clean(folder.path)
    folder.write_recipe(run.recipe)
    folder.rewind(run.step)
    starts = read_lines(folder.environment) if folder.environment.exists() else []
    start = {**describe(run.engine.device), "step": run.step, "parameters": run.engine.num_parameters}
    write_lines(folder.environment, [*starts, start])


def opening(run: Run) -> str:
    """The first line that a person reads."""
    begin = f"continuing at step {run.step}" if run.step else "training"
    count = quantity(run.engine.num_parameters)
    averages = ", ".join(f"{d:g}" for d in run.emas.decays) or "none"
    if run.emas.decays:
        averages += f" ({run.emas.num_bytes / 1e6:,.1f} MB a rank)"
    backends = f"attention {run.attention}, kernels {run.kernels}"
    precision = f"{run.recipe.train.precision}, {backends} on {run.engine.device.type}"
    mesh = run.engine.mesh
    axes = {"tensor": mesh.tensor, "context": mesh.context, "data": mesh.data}
    ranks = " × ".join(f"{axis.size} {name}" for name, axis in axes.items() if axis.size > 1)
    spread = f", {ranks} ranks with ZeRO {run.recipe.parallel.zero}" if ranks else ""
    return f"{begin}: {count} parameters, {precision}{spread}, averages {averages}, in {run.folder.path}"


@contextlib.contextmanager
def watched(run: Run) -> Iterator[None]:
    """The display and wandb, open as long as the run goes."""
    if run.recipe.log.wandb_project and run.engine.mesh.is_first:
        run.wandb = WandbLog(run.recipe, run.folder)
    run.display.start(run.step, run.recipe.train.steps)
    try:
        yield
    finally:
        run.saver.wait()
        run.display.stop()
        if run.wandb:
            run.wandb.close()


def device_of(recipe: Recipe) -> str:
    """The kind of device that the recipe asks for: cpu or cuda.

    Raises:
        RecipeError: cuda is asked for and torch sees none.
    """
    there = torch.cuda.is_available()
    if recipe.train.device == "cuda" and not there:
        raise RecipeError(
            "train.device=cuda, but torch sees no CUDA device",
            fix="Use train.device=auto or cpu, or install the torch build of your CUDA version.",
        )
    return "cpu" if recipe.train.device == "cpu" or not there else "cuda"


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
