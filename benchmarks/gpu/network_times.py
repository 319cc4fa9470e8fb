"""Attention backends, and one block at the width of the 7B model, forward and backward.

Operations are counted for bidirectional attention, 2 for a multiply-add: attention over n tokens costs 4·n²·H·D forward
and 2.5 times that backward (one more product than the two of each forward product, since the scores are made again).
A block costs `model/flops.py` forward and twice that backward: recomputed scores are overhead there, not work.

Shape legend: T tokens, S samples, H heads, D channels of a head, E width of the residual stream.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from clock import Clock, cell
from torch import Tensor, nn

from flagdit.batch import PackedBatch, Segment
from flagdit.config.schema import ModelConfig
from flagdit.model.attention import Context
from flagdit.model.attention_backends import BACKENDS, AttentionBackend, Pairs, choose_backend, uncompiled
from flagdit.model.flag_dit import FlagDiT, Inference
from flagdit.model.flops import forward_flops
from flagdit.model.sizes import resolve
from flagdit.model.tokens import TokenSpec, pack
from flagdit.train.metrics import peak_tflops

CONFIG = ModelConfig(size="7b", modalities={"image": 4}, text_dim=0, nextline=False, qk_norm="rms", rope="axial")
# Latent rows and columns, two to a token: 4K, 32K and 128K tokens.
SIZES = [(128, 128), (256, 512), (512, 1024)]
TINY_CONFIG = replace(CONFIG, size=None, dim=32, num_heads=2, ffn_dim=48, num_layers=1)
TINY_SIZES = [(4, 8)]
BACKWARD = 2.5
COLUMNS = (
    lambda row: f"{row['path']:<18}{row['attention']:<10}{row['tokens']:>8}",
    lambda row: f"{cell(row['ms'], '.2f'):>12}{cell(row['tflops'], '.0f'):>9}",
    lambda row: f"{cell(row['mfu'], '.1%'):>7}{cell(row['peak_gb'], '.1f'):>9}",
)


def rate(flops: float, milliseconds: float | None) -> float | None:
    """TFLOP/s."""
    return None if milliseconds is None else flops / milliseconds / 1e9


def attention(clock: Clock) -> list[dict[str, Any]]:
    """Every backend that serves this machine, over one sample; prints the table."""
    head_dim, sizes = (16, TINY_SIZES) if clock.dry else (128, SIZES)
    dtype = torch.float32 if clock.dry else torch.bfloat16
    rows, refusals = [], {}
    print(f"\n{'attention':<12}{'tokens':>8}{'fwd TFLOP/s':>13}{'bwd TFLOP/s':>13}")
    for tokens, backend in ((h * w // 4, backend) for h, w in sizes for backend in BACKENDS):
        refusal = backend.refusal(clock.device, dtype, head_dim)
        if refusal is not None or clock.out_of_time:
            refusals[backend.name] = refusal or f"no time left for {tokens} tokens"
            continue
        forward, backward = attention_rates(backend, tokens, 2 if clock.dry else 32, head_dim, dtype, clock)
        rows.append({"backend": backend.name, "tokens": tokens, "forward": forward, "backward": backward})
        print(f"{backend.name:<12}{tokens:>8}{cell(forward, '.0f'):>13}{cell(backward, '.0f'):>13}")
        clock.release()
    for name, why in refusals.items():
        print(f"{name:<12}{why}")
    return [*rows, *({"backend": name, "refusal": why} for name, why in refusals.items())]


def attention_rates(
    backend: AttentionBackend, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, clock: Clock
) -> tuple[float | None, float | None]:
    """TFLOP/s forward and backward."""
    offsets = torch.tensor([0, tokens], dtype=torch.int32, device=clock.device)
    pairs = Pairs((tokens,), (tokens,), offsets, offsets)
    shape = (tokens, heads, head_dim)
    leaves = [torch.randn(shape, device=clock.device, dtype=dtype).requires_grad_() for _ in range(3)]
    forward, backward = clock.forward_backward(lambda q, k, v: backend(q, k, v, pairs), leaves)
    flops = 4 * tokens**2 * heads * head_dim
    return rate(flops, forward), rate(BACKWARD * flops, backward)


def one_block(cfg: ModelConfig, size: tuple[int, int], clock: Clock) -> tuple[nn.Module, Context, PackedBatch]:
    """A block with values, and what it needs to run on one picture."""
    dtype = torch.float32 if clock.dry else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(clock.device):
        model = FlagDiT(replace(cfg, size=None, num_layers=1)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.02)
    segments = [Segment(0, "image", (4, 1, *size))]
    batch = pack(segments, None, TokenSpec.from_model(cfg)).to(clock.device)
    head_dim = model.cfg.dim // model.cfg.num_heads
    backend = choose_backend(clock.device, dtype, head_dim, longest=batch.layout.num_tokens)
    model.attention_backend = uncompiled(backend)
    ctx = model.context(torch.zeros(1, device=clock.device), batch, None, Inference())
    return model.blocks[0], ctx, batch


def blocks(clock: Clock) -> list[dict[str, Any]]:
    """The block with plain torch, compiled plain torch and fused kernels; prints the table."""
    base, sizes = (TINY_CONFIG, TINY_SIZES) if clock.dry else (resolve(CONFIG), SIZES)
    base = replace(resolve(base), size=None)
    peak = peak_tflops(clock.device, 0.0)
    rows = []
    print(f"\n{'7B block':<18}{'attention':<10}{'tokens':>8}{'fwd+bwd ms':>12}{'TFLOP/s':>9}{'MFU':>7}{'peak GB':>9}")
    for size in sizes:
        for kernels, compiled in (("triton", False), ("reference", False), ("reference", True)):
            name = "compiled torch" if compiled else {"triton": "fused", "reference": "torch"}[kernels]
            if clock.out_of_time:
                rows.append({"path": name, "tokens": size[0] * size[1] // 4, "refusal": "no time left"})
                continue
            row = {"path": name, **block_row(replace(base, kernels=kernels), size, compiled, clock, peak)}
            rows.append(row)
            print("".join(form(row) for form in COLUMNS))
            clock.release()
    return rows


def block_row(
    cfg: ModelConfig, size: tuple[int, int], compiled: bool, clock: Clock, peak: float | None
) -> dict[str, Any]:
    block, ctx, batch = one_block(cfg, size, clock)
    if compiled:
        torch._dynamo.reset()
        block.compile(backend="eager" if clock.dry else "inductor")
    tokens, dtype = batch.layout.num_tokens, next(block.parameters()).dtype
    x_TE = torch.randn(tokens, cfg.dim, device=clock.device, dtype=dtype).requires_grad_()
    cond_SC = torch.randn(1, cfg.cond_dim or 0, device=clock.device, dtype=dtype)
    upstream_TE = torch.randn_like(x_TE)

    def step() -> Tensor:
        y_TE = block(x_TE, cond_SC, ctx)
        return torch.autograd.grad(y_TE, [x_TE, *block.parameters()], upstream_TE)[0]

    taken = clock.milliseconds(step, seconds=1.0)
    two, one = (forward_flops(replace(cfg, num_layers=n), [tokens]) for n in (2, 1))
    tflops = rate(3 * (two - one), taken)
    return {
        "attention": ctx.attention.name,
        "tokens": tokens,
        "ms": taken,
        "tflops": tflops,
        "mfu": None if tflops is None or peak is None else tflops / peak,
        "peak_gb": clock.peak_gb(step),
    }
