"""One optimizer step: micro-batches, then the guard, then the optimizer and the averages.

The loss of every micro-batch is divided by the count of the global batch, so the numbers do not depend on how the batch
is split into micro-batches or over ranks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flagdit.batch import PackedBatch
from flagdit.flow.objective import drop_conditions
from flagdit.flow.path import PathSample, draw_path
from flagdit.flow.timesteps import draw_timesteps
from flagdit.model.flops import training_flops
from flagdit.train.guard import Attempt, rows_of
from flagdit.train.metrics import StepResult
from flagdit.train.run import Run
from flagdit.train.schedule import learning_rate


def take_step(run: Run, batches: Sequence[PackedBatch], since: float) -> StepResult:
    """Trains on one global batch and moves `run.step` on by one, whether the step was good or bad.

    Args:
        run: what is trained.
        batches: this rank's micro-batches of the step, on the CPU; equally many on every rank.
        since: `time.perf_counter()` when the wait for the batches began.

    Raises:
        TrainingError: too many bad steps in a row, or `guard.policy=stop`.
    """
    recipe, engine = run.recipe, run.engine
    lr = learning_rate(run.step, recipe.optimizer, recipe.train.steps)
    sizes = engine.total_samples(torch.tensor([size_of(run, batch) for batch in batches], dtype=torch.float64).sum(0))
    count, samples, tokens, flops = sizes.tolist()

    first = attempt(run, batches, count)
    again = None
    if first.bad and count and recipe.guard.replay:
        engine.discard()
        again = attempt(run, batches, count)
    tried = again or first
    ema_seconds = None
    if tried.bad is None:
        engine.step(lr)
        ema_seconds = update_averages(run)
        run.guard.accept(tried.loss)
        if first.bad:
            run.guard.forgive(run.step + 1, first, tried)
    else:
        engine.discard()
        run.guard.reject(run.step + 1, first, again)
    run.step += 1
    return StepResult(
        step=run.step,
        loss=tried.loss,
        grad_norm=tried.grad_norm,
        lr=lr,
        samples=int(samples),
        tokens=int(tokens),
        flops=flops,
        seconds=time.perf_counter() - since,
        bad=tried.bad,
        accident=first.bad if tried.bad is None else None,
        ema_seconds=ema_seconds,
    )


def attempt(run: Run, batches: Sequence[PackedBatch], count: float) -> Attempt:
    """Forward and backward of a global batch, and the guard's verdict, which all ranks share: whatever one of them
    alone finds wrong, none applies.

    Args:
        count: denominator of the mean loss, over all ranks.
    """
    engine, mesh = run.engine, run.engine.mesh
    total = torch.zeros((), device=engine.device)
    per_sample: list[Tensor] = []
    for i, batch in enumerate(batches):
        loss = run.objective.loss(engine.model, *draw(run, batch), denominator=count)
        engine.backward(loss.total, last=i == len(batches) - 1)
        total += loss.total.detach()
        per_sample.append(loss.per_sample_S)
    mean, norm = torch.stack([engine.total(total), engine.grad_norm().to(total)]).tolist()
    bad = run.guard.verdict(mean, norm) if count else "no sample of the batch can be read"
    if not mesh.largest(int(bad is not None)):
        return Attempt(mean, norm)
    rows = everywhere(run, batches, per_sample)
    return Attempt(
        mean,
        norm,
        bad=next(reason for reason in mesh.from_all(bad) if reason),
        samples=[row for found in rows for row in found],
        ranks=[rank for rank, found in enumerate(rows) if any(isinstance(row["loss"], str) for row in found)],
    )


def update_averages(run: Run) -> float | None:
    """Moves the averages on; their time in seconds at steps that write a line, where a GPU is waited for to know it."""
    measured = len(run.emas) and (run.step + 1) % run.recipe.train.log_every == 0
    wait = torch.cuda.synchronize if measured and run.engine.device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    run.emas.update(run.step)
    wait()
    return time.perf_counter() - began if measured else None


def size_of(run: Run, batch: PackedBatch) -> tuple[float, float, float, float]:
    """What a pack adds to the step: to the denominator of its loss, samples, tokens and FLOPs."""
    if batch.weightless:
        return 0.0, 0.0, 0.0, 0.0
    flops = training_flops(run.model_config, batch)
    return run.objective.count(batch), len(batch.segments), batch.layout.num_tokens, flops


def everywhere(run: Run, batches: Sequence[PackedBatch], per_sample: Sequence[Tensor]) -> list[list[dict[str, Any]]]:
    """Every sample of a step with its loss, by the rank that speaks for its pack."""
    mesh = run.engine.mesh
    sums = [mesh.sum_tokens(loss_S).tolist() for loss_S in per_sample]
    return mesh.from_all(rows_of(batches, sums) if mesh.holds_first_tokens else [])


def draw(run: Run, batch: PackedBatch) -> tuple[PackedBatch, PathSample]:
    """This rank's part of a pack on the engine's device, some of its conditions dropped, and its place on the path.

    Noise, times and dropout are functions of the run's seed and the samples' ids, never of a generator's state.
    """
    recipe = run.recipe
    batch = run.engine.share(batch).to(run.engine.device)
    batch = drop_conditions(
        batch, recipe.flow, recipe.seed, null_text_LY=run.null_text_LY, null_label=recipe.model.num_classes
    )
    t_S = draw_timesteps(batch, recipe.flow, recipe.seed)
    return batch, draw_path(batch, t_S, recipe.seed, recipe.model.kernels)
