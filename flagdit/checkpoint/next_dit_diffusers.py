"""Next-DiT under the names of diffusers' `LuminaNextDiT2DModel`, and back.

The layout is the official one (head rows as (p, p, C), doubled). diffusers projects and norms the queries twice, once
for each attention; both copies are the same tensors here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from flagdit.checkpoint.lumina import as_official, compare, from_official, official_shapes
from flagdit.checkpoint.lumina_config import require_official
from flagdit.checkpoint.lumina_files import same_bits
from flagdit.checkpoint.tensors import Derived, TensorSource
from flagdit.config.schema import ModelConfig
from flagdit.errors import CheckpointError
from flagdit.model.sizes import resolve

CLASS = "LuminaNextDiT2DModel"
STEM = "diffusion_pytorch_model"

# Official prefix → those of diffusers, outside and inside a layer. Where there are two, both hold the same tensor.
OUTSIDE = {
    "x_embedder.": ["patch_embedder.proj."],
    "pad_token": ["pad_token"],
    "t_embedder.mlp.0.": ["time_caption_embed.timestep_embedder.linear_1."],
    "t_embedder.mlp.2.": ["time_caption_embed.timestep_embedder.linear_2."],
    "cap_embedder.": ["time_caption_embed.caption_embedder."],
    "final_layer.adaLN_modulation.1.": ["norm_out.linear_1."],
    "final_layer.linear.": ["norm_out.linear_2."],
}
INSIDE = {
    "attention.wq.": ["attn1.to_q.", "attn2.to_q."],
    "attention.q_norm.": ["attn1.norm_q.", "attn2.norm_q."],
    "attention.wk.": ["attn1.to_k."],
    "attention.wv.": ["attn1.to_v."],
    "attention.k_norm.": ["attn1.norm_k."],
    "attention.wk_y.": ["attn2.to_k."],
    "attention.wv_y.": ["attn2.to_v."],
    "attention.ky_norm.": ["attn2.norm_k."],
    "attention.wo.": ["attn2.to_out.0."],
    "attention.gate": ["gate"],
    "attention_norm1.": ["norm1.norm."],
    "attention_norm2.": ["norm2."],
    "attention_y_norm.": ["norm1_context."],
    "adaLN_modulation.1.": ["norm1.linear."],
    "feed_forward.w1.": ["feed_forward.linear_1."],
    "feed_forward.w2.": ["feed_forward.linear_2."],
    "feed_forward.w3.": ["feed_forward.linear_3."],
    "ffn_norm1.": ["ffn_norm1."],
    "ffn_norm2.": ["ffn_norm2."],
}


def diffusers_names(official: str) -> list[str]:
    """Where diffusers keeps the tensor of that official name; the first place is the one to read from."""
    prefix, rest, table = "", official, OUTSIDE
    if official.startswith("layers."):
        _, number, rest = official.split(".", 2)
        prefix, table = f"layers.{number}.", INSIDE
    old = next(old for old in table if rest.startswith(old))
    return [prefix + new + rest.removeprefix(old) for new in table[old]]


def as_diffusers(source: TensorSource, cfg: ModelConfig) -> TensorSource:
    """Our tensors as a state dict of LuminaNextDiT2DModel.

    Raises:
        CheckpointError: diffusers has no such network, or the tensors do not fit the configuration.
    """
    require_next_dit(cfg)
    official = as_official(source, cfg)
    origin = {theirs: name for name in official.entries for theirs in diffusers_names(name)}
    entries = {theirs: official.entries[name] for theirs, name in origin.items()}
    return Derived(entries, lambda theirs: official.read(origin[theirs]))


def from_diffusers(source: TensorSource, cfg: ModelConfig) -> TensorSource:
    """The inverse of `as_diffusers`.

    Raises:
        CheckpointError: the tensors do not fit the configuration, or the two copies of the queries' projection have
            become different, which ours cannot express; the second is found when the tensors are read.
    """
    places = {name: diffusers_names(name) for name in official_shapes(cfg)}
    compare(source.entries, {theirs: official_shapes(cfg)[name] for name, all_ in places.items() for theirs in all_})

    def read(name: str) -> Tensor:
        tensor = source.read(places[name][0])
        for other in places[name][1:]:
            if not same_bits(tensor, source.read(other)):
                raise CheckpointError(
                    f"{places[name][0]} and {other} differ: this model was trained with separate queries for the text",
                    fix="Only weights in which both are equal, as in every converted Lumina-Next, can be imported.",
                )
        return tensor

    entries = {name: source.entries[theirs[0]] for name, theirs in places.items()}
    return from_official(Derived(entries, read), cfg)


def require_next_dit(cfg: ModelConfig) -> None:
    """Refuses a network that LuminaNextDiT2DModel does not have.

    Raises:
        CheckpointError: lists what differs.
    """
    if cfg.block != "next" or not cfg.text_dim:
        raise CheckpointError("LuminaNextDiT2DModel is a Next-DiT with text (model.block=next, model.text_dim > 0)")
    require_official(cfg, fix="The diffusers export then carries its own modelling file.")


def diffusers_config(cfg: ModelConfig, sample_size: int) -> dict[str, Any]:
    """config.json of the model.

    Args:
        cfg: the network.
        sample_size: rows and columns of latent that it was trained on; the pipeline takes its default size from it.
    """
    cfg = resolve(cfg)
    return {
        "_class_name": CLASS,
        "sample_size": sample_size,
        "patch_size": cfg.patch_size,
        "in_channels": next(iter(cfg.modalities.values())),
        "hidden_size": cfg.dim,
        "num_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_kv_heads": cfg.num_kv_heads,
        "multiple_of": 256,
        "ffn_dim_multiplier": None,
        "norm_eps": cfg.norm_eps,
        "learn_sigma": True,
        "qk_norm": cfg.qk_norm == "layer",
        "cross_attention_dim": cfg.text_dim,
        "scaling_factor": 1.0,
    }


def model_config(config: Mapping[str, Any], source: TensorSource) -> ModelConfig:
    """The configuration of the network in a diffusers folder.

    Args:
        config: its config.json.
        source: its tensors; they tell the width of the feed-forward.

    Raises:
        CheckpointError: not such a network.
    """
    try:
        cfg = ModelConfig(
            block="next",
            dim=config["hidden_size"],
            num_layers=config["num_layers"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config["num_kv_heads"],
            ffn_dim=source.entries["layers.0.feed_forward.linear_1.weight"].shape[0],
            modalities={"image": config["in_channels"]},
            patch_size=config["patch_size"],
            text_dim=config["cross_attention_dim"],
            qk_norm="layer" if config["qk_norm"] else "none",
            norm_eps=config["norm_eps"],
            rope="axial",
            nextline=False,
            nextframe=False,
            time_scale=1.0,
        )
        return resolve(replace(cfg, cond_dim=min(cfg.dim, 1024)))
    except (KeyError, IndexError, TypeError, AssertionError) as error:
        raise CheckpointError(f"its config.json or its tensors are not those of a {CLASS}: {error}") from None
