"""Floating-point operations of a training step, counted from the shapes: matrix products only, 2 for a multiply-add.

Norms, modulation, RoPE and activations are left out, as is usual for MFU: they are bound by memory, not arithmetic.
Recomputed activations are not counted either: they are overhead, not work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from flagdit.batch import PackedBatch
from flagdit.config.schema import ModelConfig
from flagdit.model.modality import MODALITIES
from flagdit.model.sizes import resolve


def forward_flops(
    cfg: ModelConfig, seqlens: Sequence[int], text_seqlens: Sequence[int] = (), patches: dict[str, int] | None = None
) -> int:
    """FLOPs of one forward pass.

    Args:
        cfg: the network.
        seqlens: tokens of each sample; attention is bidirectional inside a sample.
        text_seqlens: text tokens of each sample, for models that read text.
        patches: patch tokens by modality, for stems and heads; None: all tokens are patches of the first modality.
    """
    cfg = resolve(cfg)
    assert cfg.num_kv_heads and cfg.ffn_dim and cfg.cond_dim
    tokens, text_tokens, samples = sum(seqlens), sum(text_seqlens), len(seqlens)
    kv_dim = cfg.dim // cfg.num_heads * cfg.num_kv_heads
    chunks = 6 if cfg.block == "flag" else 4
    # Multiply-adds of one block.
    macs = tokens * (2 * cfg.dim * cfg.dim + 2 * cfg.dim * kv_dim + 3 * cfg.dim * cfg.ffn_dim)
    macs += sum(2 * n * n * cfg.dim for n in seqlens)
    macs += samples * cfg.cond_dim * chunks * cfg.dim
    if cfg.text_dim:
        macs += text_tokens * 2 * cfg.text_dim * kv_dim
        macs += sum(2 * n * m * cfg.dim for n, m in zip(seqlens, text_seqlens, strict=True))
    macs *= cfg.num_layers
    if patches is None:
        patches = {next(iter(cfg.modalities)): tokens}
    for modality, count in patches.items():
        patch_dim = cfg.modalities[modality] * math.prod(MODALITIES[modality].patch(cfg.patch_size))
        macs += count * patch_dim * cfg.dim * (3 if cfg.learn_sigma else 2)
    macs += samples * cfg.cond_dim * (256 + cfg.cond_dim + cfg.text_dim + chunks // 3 * cfg.dim)
    return 2 * macs


def training_flops(cfg: ModelConfig, batch: PackedBatch) -> int:
    """FLOPs of forward and backward of one pack; backward costs twice the forward."""
    text_seqlens = batch.text.seqlens if batch.text is not None and cfg.text_dim else ()
    patches = {modality: len(index) for modality, index in batch.layout.patch_index.items()}
    return 3 * forward_flops(cfg, batch.layout.seqlens, text_seqlens, patches)
