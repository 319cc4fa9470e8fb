"""Learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from flagdit.config.schema import OptimizerConfig


def learning_rate(step: int, cfg: OptimizerConfig, steps: int) -> float:
    """The learning rate of one optimizer step.

    Warm-up rises linearly and reaches the peak at its last step. `cosine` and `wsd` (constant, then linear) fall to
    `final_lr` of the peak at the end of the run, that is one step after the last: no step is spent at a rate of zero.

    Args:
        step: optimizer steps already done, so 0 is the first one.
        cfg: peak, schedule and lengths.
        steps: steps of the whole run.
    """
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "cosine":
        done = min(1.0, (step - cfg.warmup_steps) / max(1, steps - cfg.warmup_steps))
        return cfg.lr * (cfg.final_lr + (1 - cfg.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))
    if cfg.schedule == "wsd" and cfg.decay_steps > 0:
        done = min(1.0, max(0.0, (step - (steps - cfg.decay_steps)) / cfg.decay_steps))
        return cfg.lr * (1 - (1 - cfg.final_lr) * done)
    return cfg.lr
