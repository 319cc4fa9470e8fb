"""Named sizes, and the completion of a recipe's `model` block."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any

from flagdit.config.schema import ModelConfig
from flagdit.errors import RecipeError


@dataclass(frozen=True)
class Size:
    """The shape of a network; the keys of `ModelConfig` that `model.size` sets."""

    block: str
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_dim: int


SIZES: dict[str, Size] = {
    # Small ones for laptops and tests of recipes.
    "tiny": Size("flag", 128, 4, 4, 4, 384),
    "small": Size("flag", 384, 12, 6, 6, 1024),
    # The published ones (arXiv 2405.05945, table 1, and its code; Next-DiT: arXiv 2406.18583).
    "600m": Size("flag", 1536, 16, 32, 32, 4096),
    "3b": Size("flag", 3072, 32, 32, 32, 8192),
    "5b": Size("flag", 3072, 32, 32, 32, 8192),
    "7b": Size("flag", 4096, 32, 32, 32, 11008),
    "next_2b": Size("next", 2304, 24, 32, 32, 6144),
    "next_2b_gqa": Size("next", 2304, 24, 32, 8, 6144),
}

CLASS_CONDITIONAL = ("600m", "3b", "7b")
"""Published sizes trained on ImageNet classes; the others read text."""


def official(name: str) -> ModelConfig:
    """The configuration of a published network, for importing its checkpoints.

    Those that read text have one parameter more in the official code, `pad_token` of `dim` numbers: packing has no use
    for it.

    Raises:
        RecipeError: no published network has that name.
    """
    published = [size for size in SIZES if size not in ("tiny", "small")]
    if name not in published:
        raise RecipeError(f"no published network is called {name!r}", fix=f"Known ones: {', '.join(published)}.")
    is_next = SIZES[name].block == "next"
    classes = name in CLASS_CONDITIONAL
    cfg = ModelConfig(
        size=name,
        modalities={"image": 4},
        patch_size=2,
        text_dim=0 if classes else 2048 if is_next else 4096,
        num_classes=1000 if classes else 0,
        qk_norm="layer",
        rope="axial" if is_next else "raster",
        nextline=not (is_next or classes),
        time_scale=1.0,
        learn_sigma=True,
    )
    return resolve(cfg)


def resolve(cfg: ModelConfig) -> ModelConfig:
    """The configuration with its size applied and every null filled in. Resolving twice changes nothing.

    Raises:
        RecipeError: an unknown size, or a key that contradicts the size.
    """
    if cfg.size is not None:
        cfg = _apply_size(cfg, cfg.size)
    filled: dict[str, Any] = {
        "num_kv_heads": cfg.num_kv_heads or cfg.num_heads,
        "ffn_dim": cfg.ffn_dim or -(-8 * cfg.dim // (3 * 256)) * 256,
        "cond_dim": cfg.cond_dim or min(cfg.dim, 1024),
        "final_shift": cfg.block == "flag" if cfg.final_shift is None else cfg.final_shift,
    }
    if any(getattr(cfg, key) != value for key, value in filled.items()):
        cfg = replace(cfg, **filled)
    # config/validate.py tells users; this guards code that builds its own configuration.
    assert cfg.dim % (2 * cfg.num_heads) == 0, "heads must divide the width into even sizes"
    assert cfg.num_heads % (cfg.num_kv_heads or 1) == 0, "key/value heads must divide the query heads"
    assert not (cfg.text_dim and cfg.num_classes), "text and classes exclude each other"
    return cfg


def _apply_size(cfg: ModelConfig, name: str) -> ModelConfig:
    if name not in SIZES:
        raise RecipeError(f"model.size={name} is not known", fix=f"Known sizes: {', '.join(SIZES)}.")
    defaults = {f.name: f.default for f in fields(ModelConfig) if f.default is not MISSING}
    for key, value in asdict(SIZES[name]).items():
        given = getattr(cfg, key)
        if given not in (defaults[key], value):
            raise RecipeError(
                f"model.{key}={given} contradicts model.size={name}, which sets it to {value}",
                fix=f"Remove model.{key}, or set model.size=null and write the whole shape.",
            )
    return replace(cfg, **asdict(SIZES[name]))
