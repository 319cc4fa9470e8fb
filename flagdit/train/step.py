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
from flagdit.train.guard import rows_of
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
        TrainingError: too many bad steps in a row.
    """
    recipe, engine = run.recipe, run.engine
    lr = learning_rate(run.step, recipe.optimizer, recipe.train.steps)
    sizes = engine.total_samples(torch.tensor([size_of(run, batch) for batch in batches], dtype=torch.float64).sum(0))
    count, samples, tokens, flops = sizes.tolist()

    total = torch.zeros((), device=engine.device)
    per_sample: list[Tensor] = []
    for i, batch in enumerate(batches):
        loss = run.objective.loss(engine.model, *draw(run, batch), denominator=count)
        engine.backward(loss.total, last=i == len(batches) - 1)
        total += loss.total.detach()
        per_sample.append(loss.per_sample_S)

    mean, norm = torch.stack([engine.total(total), engine.grad_norm().to(total)]).tolist()
    ema_seconds = None
    bad = run.guard.verdict(mean, norm) if count else "no sample of the batch can be read"
    if bad is None:
        engine.step(lr)
        ema_seconds = update_averages(run)
        run.guard.accept()
    else:
        engine.discard()
        run.guard.reject(run.step + 1, bad, mean, norm, everywhere(run, batches, per_sample))
    run.step += 1
    return StepResult(
        step=run.step,
        loss=mean,
        grad_norm=norm,
        lr=lr,
        samples=int(samples),
        tokens=int(tokens),
        flops=flops,
        seconds=time.perf_counter() - since,
        bad=bad,
        ema_seconds=ema_seconds,
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


def everywhere(run: Run, batches: Sequence[PackedBatch], per_sample: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Every sample of a step with its loss, from all ranks."""
    mesh = run.engine.mesh
    sums = [mesh.sum_tokens(loss_S).tolist() for loss_S in per_sample]
    rows = rows_of(batches, sums) if mesh.holds_first_tokens else []
    return [row for found in mesh.from_all(rows) for row in found]


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
