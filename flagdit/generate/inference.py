"""The model's inference settings, from the recipe's `sample` block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from flagdit.config.schema import ModelConfig, SampleConfig
from flagdit.model.flag_dit import Inference
from flagdit.model.rope import RopeScaling
from flagdit.model.tokens import Shape, TokenSpec, grid, num_tokens

InferenceAt = Callable[[float], Inference]
"""Time → settings."""


def inference_for(model: ModelConfig, cfg: SampleConfig, trained: Shape | None) -> Inference:
    """How the network is read for sizes beyond a trained one.

    Args:
        model: resolved.
        cfg: says which scaling.
        trained: latent shape of the largest samples of training; None: everything as trained.
    """
    if trained is None:
        return Inference()
    tokens = num_tokens(trained, cfg.modality, TokenSpec.from_model(model))
    axes = (tokens,) if model.rope == "raster" else grid(trained, cfg.modality, model.patch_size)[-model.rope_axes :]
    rope = None if cfg.scaling == "none" else RopeScaling(cfg.scaling, trained=axes, watershed=cfg.watershed)
    return Inference(rope, proportional_base=tokens if cfg.proportional else None)


def shared(base: Inference, count: int, until: float = 1.0) -> InferenceAt:
    """Settings under which `count` neighbouring samples draw as one set: their tokens see each other's until a time.

    What is decided early (palette, manner of drawing) then agrees between them; each finishes alone what its prompt
    says (arXiv 2312.02133).
    """
    together = replace(base, sets=(count,))
    return lambda t: together if t < until else base
