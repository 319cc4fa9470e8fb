"""Names and layout of the official Lumina-T2X checkpoints, and ours.

Both ways are exact. Two things differ beyond names: the official head emits patch features as (p, p, C), ours as
(C, p, p); and the official code pads its batches with a learned `pad_token`, which packing has no use for.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flagdit.config.schema import ModelConfig
from flagdit.errors import CheckpointError
from flagdit.model.flag_dit import FlagDiT

# Official prefix → ours; `{m}` is the model's only modality. Everything else has the same name.
PREFIXES = {
    "layers.": "blocks.",
    "x_embedder.": "stems.{m}.",
    "eol_token": "nextline",
    "cap_embedder.0.": "text_pooler.norm.",
    "cap_embedder.1.": "text_pooler.proj.",
    "y_embedder.embedding_table.": "y_embedder.table.",
    "final_layer.linear.": "heads.{m}.",
    "final_layer.adaLN_modulation.": "final_adaLN_modulation.",
}
PAD_TOKEN = "pad_token"


def convert_official(state_dict: Mapping[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """An official state dict (parts already joined) with our names and layout; `pad_token` is dropped.

    Args:
        state_dict: official names → tensors.
        cfg: the configuration of the network, such as `model.sizes.official(name)`.

    Raises:
        CheckpointError: parameters are missing, unknown or of another shape than the configuration says.
    """
    modality = _only_modality(cfg)
    ours = {}
    for name, tensor in state_dict.items():
        if name == PAD_TOKEN:
            continue
        renamed = _rename(name, {old: new.format(m=modality) for old, new in PREFIXES.items()})
        ours[renamed] = _head_rows(tensor, cfg, to_ours=True) if name.startswith("final_layer.linear.") else tensor
    _compare(ours, expected_shapes(cfg))
    return ours


def to_official(state_dict: Mapping[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `convert_official`. Text models get a `pad_token` of zeros, which the official code masks.

    Raises:
        CheckpointError: the state dict does not fit the configuration, or the official code has no such network.
    """
    modality = _only_modality(cfg)
    _compare(dict(state_dict), expected_shapes(cfg))
    back = {new.format(m=modality): old for old, new in PREFIXES.items()}
    official = {}
    for name, tensor in state_dict.items():
        is_head = name.startswith(f"heads.{modality}.")
        official[_rename(name, back)] = _head_rows(tensor, cfg, to_ours=False) if is_head else tensor
    if cfg.text_dim:
        official[PAD_TOKEN] = torch.zeros_like(state_dict[f"stems.{modality}.bias"])
    return official


def expected_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our parameter names and shapes for a configuration, without allocating memory."""
    with torch.device("meta"):
        model = FlagDiT(cfg)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def _only_modality(cfg: ModelConfig) -> str:
    if len(cfg.modalities) != 1:
        raise CheckpointError(
            f"official checkpoints hold one modality, this model has {', '.join(cfg.modalities)}",
            where="model.modalities",
        )
    return next(iter(cfg.modalities))


def _rename(name: str, prefixes: Mapping[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _head_rows(tensor: Tensor, cfg: ModelConfig, *, to_ours: bool) -> Tensor:
    """Reorders the rows of the head's weight or bias: (p, p, C) → (C, p, p), or back."""
    p = cfg.patch_size
    if to_ours:
        return tensor.reshape(p * p, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)
    return tensor.reshape(-1, p * p, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)


def _compare(found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    missing = sorted(expected.keys() - found.keys())
    unknown = sorted(found.keys() - expected.keys())
    shapes = [
        f"{name} is {tuple(found[name].shape)} instead of {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if tuple(found[name].shape) != expected[name]
    ]
    problems = [f"{label} {_some(names)}" for label, names in (("missing", missing), ("unknown", unknown)) if names]
    if shapes:
        problems.append(_some(shapes))
    if problems:
        raise CheckpointError(
            f"the checkpoint does not fit the model: {'; '.join(problems)}",
            fix="Give the configuration it was trained with (size, block, modalities, text_dim, qk_norm, learn_sigma).",
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
