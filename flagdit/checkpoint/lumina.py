"""Names and layout of the official Lumina-T2X checkpoints, and ours.

Both ways are exact. Beyond names, four things differ: the official head emits patch features as (p, p, C), ours as
(C, p, p); it emits twice as many channels (`learn_sigma`) and nobody reads the second half, so ours has it only where
model.learn_sigma keeps it; the official code pads its batches with a learned `pad_token`, which packing has no use for;
and its class-conditional Next-DiT has no weights in the first norms of a block, where ours are ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Protocol

import torch
from torch import Tensor

from flagdit.checkpoint.tensors import Derived, Entry, InMemory, TensorSource
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
# The class-conditional Next-DiT gives the names of Flag-DiT's norms to those after attention and feed-forward.
SECOND_NORMS = {".attention_norm2.": ".attention_norm.", ".ffn_norm2.": ".ffn_norm."}
FIRST_NORMS = (".attention_norm1.weight", ".ffn_norm1.weight")
PAD_TOKEN = "pad_token"
HEAD = "final_layer.linear."
LISTED = 12

# The dim along which the official model parallelism splits a tensor, by name; first match wins, others are replicated.
SPLITS: list[tuple[str, int]] = [
    ("layers.*.attention.wo.weight", 1),
    ("layers.*.feed_forward.w2.weight", 1),
    ("t_embedder.mlp.2.weight", 1),
    ("y_embedder.embedding_table.weight", 1),
    ("x_embedder.*", 0),
    ("t_embedder.mlp.0.*", 0),
    ("cap_embedder.1.*", 0),
    ("layers.*.attention.*", 0),
    ("layers.*.feed_forward.*", 0),
    ("*adaLN_modulation.1.*", 0),
    (HEAD + "*", 0),
]


class Shaped(Protocol):
    """A tensor, or an entry that stands for one."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def split_dim(name: str) -> int | None:
    """The dim along which model parallelism splits the tensor of that official name; None: every rank has all of it."""
    return next((dim for pattern, dim in SPLITS if fnmatch(name, pattern)), None)


def official_shapes(cfg: ModelConfig, *, doubled: bool = True) -> dict[str, tuple[int, ...]]:
    """Official names and shapes of a network.

    Args:
        cfg: the network.
        doubled: with the dead half of the head, as the official code builds it.
    """
    shapes = {}
    for name, shape in expected_shapes(cfg).items():
        if is_constant(name, cfg):
            continue
        official = official_name(name, cfg)
        if official.startswith(HEAD) and doubled and not cfg.learn_sigma:
            shape = (2 * shape[0], *shape[1:])
        shapes[official] = shape
    if cfg.text_dim:
        shapes[PAD_TOKEN] = (cfg.dim,)
    return shapes


def from_official(source: TensorSource, cfg: ModelConfig) -> TensorSource:
    """Whole official tensors with our names and layout; the dead half of the head is dropped unless the configuration
    has learn_sigma.

    Raises:
        CheckpointError: parameters are missing, unknown or of another shape than the configuration says.
    """
    head = source.entries.get(HEAD + "bias")
    doubled = head is not None and head.shape != official_shapes(cfg, doubled=False)[HEAD + "bias"]
    found = {name: entry for name, entry in source.entries.items() if name != PAD_TOKEN}
    expected = {name: s for name, s in official_shapes(cfg, doubled=doubled).items() if name != PAD_TOKEN}
    compare(found, expected)
    names = {name: official_name(name, cfg) for name in expected_shapes(cfg)}
    dtype = next(iter(found.values())).dtype
    entries = {
        name: Entry(shape, dtype if is_constant(name, cfg) else found[names[name]].dtype)
        for name, shape in expected_shapes(cfg).items()
    }

    def read(name: str) -> Tensor:
        if is_constant(name, cfg):
            return torch.ones(entries[name].shape, dtype=dtype)
        tensor = source.read(names[name])
        if names[name].startswith(HEAD):
            tensor = _head_rows(tensor, cfg, to_ours=True)[: entries[name].shape[0]].contiguous()
        return tensor

    return Derived(entries, read)


def as_official(source: TensorSource, cfg: ModelConfig) -> TensorSource:
    """The inverse of `from_official`: the dead half of the head is zeros, and text models get a `pad_token` of zeros,
    which the official code masks.

    Raises:
        CheckpointError: the tensors do not fit the configuration, or weights that the official network lacks have been
            trained.
    """
    compare(source.entries, expected_shapes(cfg))
    trained = [n for n in source.entries if is_constant(n, cfg) and not bool((source.read(n) == 1).all())]
    if trained:
        raise CheckpointError(
            f"the official class-conditional Next-DiT has no weights in its first norms, but here {_some(trained)} "
            "are not ones",
            fix="Export in another format.",
        )
    names = {official_name(name, cfg): name for name in source.entries if not is_constant(name, cfg)}
    dtype = next(iter(source.entries.values())).dtype
    entries = {
        name: Entry(shape, source.entries[names[name]].dtype if name in names else dtype)
        for name, shape in official_shapes(cfg).items()
    }

    def read(name: str) -> Tensor:
        if name == PAD_TOKEN:
            return torch.zeros(entries[name].shape, dtype=dtype)
        tensor = source.read(names[name])
        if name.startswith(HEAD):
            rows = entries[name].shape[0]
            if len(tensor) < rows:
                tensor = torch.cat([tensor, torch.zeros_like(tensor)])
            tensor = _head_rows(tensor, cfg, to_ours=False).contiguous()
        return tensor

    return Derived(entries, read)


def convert_official(state_dict: Mapping[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """`from_official` for a state dict in memory.

    Raises:
        CheckpointError: parameters are missing, unknown or of another shape than the configuration says.
    """
    return dict(from_official(InMemory(state_dict), cfg).items())


def expected_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our parameter names and shapes for a configuration, without allocating memory."""
    with torch.device("meta"):
        model = FlagDiT(cfg)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def official_name(name: str, cfg: ModelConfig) -> str:
    """The official name of one of our parameters."""
    if cfg.block == "next" and not cfg.text_dim:
        for ours, theirs in SECOND_NORMS.items():
            name = name.replace(ours, theirs)
    return _rename(name, {new.format(m=only_modality(cfg)): old for old, new in PREFIXES.items()})


def is_constant(name: str, cfg: ModelConfig) -> bool:
    """Whether the official network has ones where we have that parameter."""
    return cfg.block == "next" and not cfg.text_dim and name.endswith(FIRST_NORMS)


def only_modality(cfg: ModelConfig) -> str:
    """The model's one modality.

    Raises:
        CheckpointError: there are several.
    """
    if len(cfg.modalities) != 1:
        raise CheckpointError(
            f"official checkpoints hold one modality, this model has {', '.join(cfg.modalities)}",
            where="model.modalities",
        )
    return next(iter(cfg.modalities))


def compare(found: Mapping[str, Shaped], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Whether tensors are those that a network has.

    Raises:
        CheckpointError: lists names and shapes that differ.
    """
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


def _some(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
