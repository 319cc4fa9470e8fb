"""Self-attention and zero-initialized cross-attention to the text (arXiv 2405.05945, section 2.2.2).

Shape legend
    T, M, S  image tokens, text tokens and samples of the pack
    E, Y     width of the residual stream, of the text features
    H, K     query heads, key/value heads
    D        channels of a head
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flagdit.config.schema import ModelConfig
from flagdit.model.attention_backends import AttentionBackend, Pairs
from flagdit.model.ops import BlockOps
from flagdit.model.segments import Samples

SelfAttention = Callable[[Tensor, Tensor, Tensor, Pairs], Tensor]
"""Queries, keys and values of this process's tokens, and the pairs of the whole pack → (T, H, D) of its tokens."""


Projection = Callable[..., tuple[Tensor, ...]]
"""Tokens (T, E) and the linears that read them → one (T, O) for each linear."""


def each_alone(x_TE: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
    """The projection of one process: every linear by itself."""
    return tuple(linear(x_TE) for linear in linears)


@dataclass(frozen=True)
class Context:
    """What all blocks share in one forward.

    Attributes:
        attention: computes softmax(q·kᵀ/√D)·v inside each sample.
        self_attention: the same between image tokens; under context parallelism the ranks exchange theirs in it.
        samples: which tokens of the residual stream belong to which sample, for the final modulation.
        ops: norms, gates, RoPE and activations of the blocks.
        self_pairs: image tokens of the whole pack that see each other.
        text_MY: packed text features; None without text.
        text_pairs: this process's image tokens and the text tokens they see; None without text.
        temperature_T11: (T, 1, 1) factor on the queries of self-attention (proportional attention); None: 1.
    """

    attention: AttentionBackend
    self_attention: SelfAttention
    samples: Samples
    ops: BlockOps
    self_pairs: Pairs
    text_MY: Tensor | None = None
    text_pairs: Pairs | None = None
    temperature_T11: Tensor | None = None


class QKNorm(nn.Module):
    """Norm of queries or keys: (…, heads·D) → (…, heads, D).

    `rms`: each head alone, one weight vector for all. `layer`: LayerNorm over all heads together before the split, as
    the official code; tensor parallelism must then reduce its statistics.
    """

    def __init__(self, cfg: ModelConfig, num_heads: int):
        super().__init__()
        self.kind, self.eps = cfg.qk_norm, cfg.norm_eps
        self.head_dim = cfg.dim // cfg.num_heads
        width = num_heads * self.head_dim
        if self.kind != "none":
            self.weight = nn.Parameter(torch.ones(width if self.kind == "layer" else self.head_dim))
        if self.kind == "layer":
            self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "layer":
            x = F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        x = x.unflatten(-1, (-1, self.head_dim))
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps) if self.kind == "rms" else x


class Attention(nn.Module):
    """Self-attention, plus tanh(gate)·cross-attention with the same queries, then one output projection.

    Attributes:
        projection: applies the linears `projected` to the tokens they share. Tensor parallelism sets another, which
            gathers the tokens once for all of them.
    """

    projected = ("wq", "wk", "wv")

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.projection: Projection = each_alone
        self.head_dim = cfg.dim // cfg.num_heads
        kv_heads = cfg.num_kv_heads or cfg.num_heads
        kv_dim = kv_heads * self.head_dim
        self.wq = nn.Linear(cfg.dim, cfg.dim, bias=False)
        self.wk = nn.Linear(cfg.dim, kv_dim, bias=False)
        self.wv = nn.Linear(cfg.dim, kv_dim, bias=False)
        self.wo = nn.Linear(cfg.dim, cfg.dim, bias=False)
        self.q_norm = QKNorm(cfg, cfg.num_heads)
        self.k_norm = QKNorm(cfg, kv_heads)
        if cfg.text_dim:
            self.wk_y = nn.Linear(cfg.text_dim, kv_dim, bias=False)
            self.wv_y = nn.Linear(cfg.text_dim, kv_dim, bias=False)
            self.ky_norm = QKNorm(cfg, kv_heads)
            self.gate = nn.Parameter(torch.zeros(cfg.num_heads))

    def forward(self, x_TE: Tensor, text_MY: Tensor | None, ctx: Context) -> Tensor:
        """(T, E) → (T, E). `text_MY` is the block's normed text; None without text."""
        q, k, v = self.projection(x_TE, self.wq, self.wk, self.wv)
        q_THD, k_TKD = ctx.ops.queries_and_keys(q, k, self.q_norm, self.k_norm)
        v_TKD = v.unflatten(-1, (-1, self.head_dim))
        q_self_THD = q_THD if ctx.temperature_T11 is None else q_THD * ctx.temperature_T11
        out_THD = ctx.self_attention(q_self_THD, k_TKD, v_TKD, ctx.self_pairs)
        if text_MY is not None:
            assert ctx.text_pairs is not None
            # Text keys have no position: they are normed and not rotated, and the temperature is not theirs.
            k_MKD = self.ky_norm(self.wk_y(text_MY))
            v_MKD = self.wv_y(text_MY).unflatten(-1, (-1, self.head_dim))
            cross_THD = ctx.attention(q_THD, k_MKD, v_MKD, ctx.text_pairs)
            out_THD = torch.addcmul(out_THD, cross_THD, self.gate.tanh()[:, None])
        return self.wo(out_THD.flatten(1))
