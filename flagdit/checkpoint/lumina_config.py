"""What network an official checkpoint holds, and whether the official code has a network of ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from flagdit.checkpoint.lumina import HEAD
from flagdit.checkpoint.tensors import Entry
from flagdit.config.schema import ModelConfig
from flagdit.errors import CheckpointError
from flagdit.model.sizes import resolve

HEADS = 32
"""Query heads of every published network; only networks with text tell them in their shapes."""
PATCH = 2

VAES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse", "sdxl": "stabilityai/sdxl-vae"}


def infer_config(entries: Mapping[str, Entry], arguments: Mapping[str, Any], heads: int | None = None) -> ModelConfig:
    """The configuration of the network that whole official tensors belong to.

    Args:
        entries: official names and whole shapes.
        arguments: of model_args.pth, or {}; its `model` tells patch size and key/value heads where shapes do not.
        heads: query heads, for networks without text; None: 32 as all published ones.

    Raises:
        CheckpointError: the tensors are not those of an official network.
    """
    try:
        return _infer(entries, str(arguments.get("model", "")), heads)
    except (KeyError, IndexError, ZeroDivisionError, AssertionError) as error:
        raise CheckpointError(
            f"these are not the tensors of an official Flag-DiT or Next-DiT: {error} is missing or of a strange shape",
            fix="Give the folder that the official code saved or that its authors published.",
        ) from None


def _infer(entries: Mapping[str, Entry], model: str, heads: int | None) -> ModelConfig:
    dim, features = entries["x_embedder.weight"].shape
    patch = int(named[1]) if (named := re.search(r"patch(\d+)", model)) else PATCH
    layers = {int(match[1]) for name in entries if (match := re.match(r"layers\.(\d+)\.", name))}
    chunks = entries["layers.0.adaLN_modulation.1.weight"].shape[0] // dim
    if chunks not in (4, 6):
        raise CheckpointError(f"its adaLN has {chunks} parts; Flag-DiT has 6 and Next-DiT 4")
    is_next = chunks == 4
    has_text = "layers.0.attention.wk_y.weight" in entries
    if has_text:
        heads = entries["layers.0.attention.gate"].shape[0]
    heads = heads or HEADS
    kv_heads = entries["layers.0.attention.wk.weight"].shape[0] // (dim // heads)
    channels = features // patch**2
    if features % patch**2 or entries[HEAD + "bias"].shape[0] not in (features, 2 * features):
        raise CheckpointError(f"{HEAD}bias of {entries[HEAD + 'bias'].shape} does not fit patches of {features}")
    return resolve(
        ModelConfig(
            block="next" if is_next else "flag",
            dim=dim,
            num_layers=len(layers),
            num_heads=heads,
            num_kv_heads=kv_heads,
            ffn_dim=entries["layers.0.feed_forward.w1.weight"].shape[0],
            cond_dim=entries["t_embedder.mlp.0.weight"].shape[0],
            modalities={"image": channels},
            patch_size=patch,
            text_dim=entries["layers.0.attention.wk_y.weight"].shape[1] if has_text else 0,
            num_classes=0 if has_text else entries["y_embedder.embedding_table.weight"].shape[0] - 1,
            qk_norm="layer" if "layers.0.attention.q_norm.weight" in entries else "none",
            rope="axial" if is_next else "raster",
            nextline="eol_token" in entries,
            nextframe=False,
            time_scale=1.0,
            final_shift=entries["final_layer.adaLN_modulation.1.bias"].shape[0] == 2 * dim,
        )
    )


def obstacles(cfg: ModelConfig) -> list[str]:
    """Why the official code has no such network; none: it has."""
    cfg = resolve(cfg)
    is_next, text = cfg.block == "next", bool(cfg.text_dim)
    official_ffn = 256 * -(-int(8 * cfg.dim / 3) // 256)
    wanted: list[tuple[str, Any, Any]] = [
        ("modalities", list(cfg.modalities), ["image"]),
        ("qk_norm", cfg.qk_norm, cfg.qk_norm if cfg.qk_norm in ("layer", "none") else "layer or none"),
        ("rope", cfg.rope, "axial" if is_next else "raster"),
        ("rope_theta", cfg.rope_theta, 10000.0),
        ("nextline", cfg.nextline, text and not is_next),
        ("time_scale", cfg.time_scale, 1.0),
        ("norm_eps", cfg.norm_eps, 1e-5),
        ("cond_dim", cfg.cond_dim, min(cfg.dim, 1024)),
        ("ffn_dim", cfg.ffn_dim, official_ffn),
    ]
    wanted.append(("final_shift", cfg.final_shift, not (is_next and text)))
    if is_next:
        wanted.append(("rope_axes", cfg.rope_axes, 2))
    if not text:
        wanted.append(("num_classes", cfg.num_classes, cfg.num_classes or "more than 0"))
    return [f"model.{key} is {ours}, there it is {theirs}" for key, ours, theirs in wanted if ours != theirs]


def require_official(cfg: ModelConfig, fix: str) -> None:
    """Refuses a network that the official code does not have.

    Raises:
        CheckpointError: lists what differs.
    """
    if found := obstacles(cfg):
        raise CheckpointError(f"the official code has no such network: {'; '.join(found)}", fix=fix)


def arguments_of(cfg: ModelConfig, image_size: int, vae: str, text_encoder: str, parts: int) -> dict[str, Any]:
    """What the official code wants to find in model_args.pth."""
    cfg = resolve(cfg)
    names = {
        ("flag", 3072): "DiT_Llama_5B_patch2" if cfg.text_dim else "DiT_Llama_3B_patch2",
        ("flag", 1536): "DiT_Llama_600M_patch2",
        ("flag", 4096): "DiT_Llama_7B_patch2",
        ("next", 2304): "NextDiT_2B_patch2" if cfg.num_kv_heads == cfg.num_heads else "NextDiT_2B_GQA_patch2",
    }
    family = "NextDiT" if cfg.block == "next" else "DiT_Llama"
    return {
        "model": names.get((cfg.block, cfg.dim), f"{family}_patch{cfg.patch_size}"),
        "image_size": image_size,
        "qk_norm": cfg.qk_norm == "layer",
        "vae": next((short for short, name in VAES.items() if name == vae), "sdxl"),
        "lm": text_encoder,
        "tokenizer_path": text_encoder,
        "num_classes": cfg.num_classes,
        "model_parallel_size": parts,
        "precision": "bf16",
    }
