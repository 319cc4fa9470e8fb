"""Held-out loss with the same samples, noise and times at every measurement, so that its curve moves with the weights
only."""

from __future__ import annotations

import time
from typing import Any

import torch

from flagdit.data_pipelines.loader import validation_batches
from flagdit.flow.path import draw_path
from flagdit.train.run import Run


class HeldOut:
    """The validation samples of a run, read once.

    Raises:
        DataError: the data set or its split cannot be read.
    """

    def __init__(self, run: Run):
        data = run.engine.mesh.data
        self._batches = validation_batches(run.recipe, data.rank, data.size)

    @torch.no_grad()
    def measure(self, run: Run) -> dict[str, Any]:
        """Mean squared error of the velocity, every sample alike, at each time of `validation.timesteps` and over all.

        From the first average of the weights if there is one; the line says which. Captions are never dropped.
        """
        began = time.perf_counter()
        times = run.recipe.validation.timesteps
        name, weights = run.averaged(0)
        engine = run.engine
        sums_T = torch.zeros(len(times), dtype=torch.float64, device=engine.device)
        with engine.using(weights) as model:
            for whole in self._batches:
                batch = engine.share(whole).to(engine.device)
                for i, t in enumerate(times):
                    t_S = torch.full((len(batch.segments),), t, device=engine.device)
                    path = draw_path(batch, t_S, run.recipe.seed, run.recipe.model.kernels)
                    loss = run.objective.loss(model, batch, path)
                    if not whole.weightless:
                        sums_T[i] += loss.per_sample_S.double().sum()
        count = sum(len(batch.segments) for batch in self._batches if not batch.weightless)
        samples = engine.total_samples(torch.tensor(float(count))).item()
        at = {str(t): total / samples for t, total in zip(times, engine.total(sums_T).tolist(), strict=True)}
        return {
            "step": run.step,
            "val_loss": sum(at.values()) / len(at),
            "val_loss_at": at,
            "val_weights": name,
            "val_seconds": time.perf_counter() - began,
        }
