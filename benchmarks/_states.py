"""What a rank keeps beside activations, by count: weights, gradients, masters, moments, averages, buckets."""

from __future__ import annotations

from flagdit.config.schema import Recipe
from flagdit.parallel.deepspeed import BUCKET


def states(recipe: Recipe, local: int, shards: int) -> dict[str, int]:
    """Bytes by what they are for, at the end of the last backward of a step, when they stand together.

    Args:
        local: elements of this tensor rank's parts of all parameters.
        shards: ranks over which ZeRO splits them.
    """
    stage, bf16 = recipe.parallel.zero, recipe.train.precision == "bf16"
    width, part = 2 if bf16 else 4, -(-local // shards)
    found = {"weights": (part if stage == 3 else local) * width}
    if stage == 3:
        # DeepSpeed lets go of a weight only when it is not read again within stage3_max_reuse_distance elements, and
        # forward and backward of one tensor rank's part of a model lie closer than that.
        found["weights, gathered for their use"] = min(local, 1_000_000_000) * width
    # Stage 1 accumulates whole gradients and splits them at the end of the step.
    found["gradients, fp32"] = (local if stage == 1 else part) * 4
    if stage == 1:
        found["gradients, this rank's part"] = part * 4
    on_gpu = 0 if recipe.parallel.offload else 1
    found["masters, fp32"] = part * 4 * on_gpu
    found["AdamW's moments, fp32"] = 2 * part * 4 * on_gpu
    found["averages, fp32"] = len(recipe.train.ema_decays) * part * 4 * on_gpu
    found["bucket of gradients, fp32"] = min(BUCKET, local) * 4
    return found
