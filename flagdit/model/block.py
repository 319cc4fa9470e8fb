"""The transformer blocks of Flag-DiT and Next-DiT, and the table by which tensor parallelism splits them.

Shape legend
    T, M, S  image tokens, text tokens and samples of the pack
    E, Y, C  widths of the residual stream, of the text features, of the conditioning vector
"""

from __future__ import annotations

from torch import Tensor, nn

from flagdit.config.schema import ModelConfig
from flagdit.model.attention import Attention, Context, Projection, each_alone
from flagdit.model.ops import BlockOps

TP_PLAN: dict[str, str] = {
    "blocks.*.attention.wq": "column",
    "blocks.*.attention.wk": "column",
    "blocks.*.attention.wv": "column",
    "blocks.*.attention.wk_y": "column",
    "blocks.*.attention.wv_y": "column",
    "blocks.*.attention.wo": "row",
    "blocks.*.attention.gate": "heads",
    "blocks.*.attention.q_norm": "qk_norm",
    "blocks.*.attention.k_norm": "qk_norm",
    "blocks.*.attention.ky_norm": "qk_norm",
    "blocks.*.feed_forward.w1": "column",
    "blocks.*.feed_forward.w3": "column",
    "blocks.*.feed_forward.w2": "row",
    "blocks.*.adaLN_modulation.1": "column_gather",
    "final_adaLN_modulation.1": "column_gather",
    "blocks.*.attention_y_norm": "feeds_split",
    "t_embedder": "feeds_split",
    "text_pooler": "feeds_split",
    "y_embedder": "feeds_split",
}
"""Module or parameter name pattern → how tensor parallelism treats it; what is not named is replicated.

column: split the outputs. row: split the inputs, sum the results. column_gather: split the outputs, gather them after.
heads: a vector with one entry per query head, split with the heads. qk_norm: norms of the split queries and keys: `rms`
weights are shared by all heads and replicated; `layer` weights are split and their statistics reduced over the ranks.
feeds_split: replicated, and read by split linears only, so that each rank sees a part of its gradient.
"""


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): w2(silu(w1 x) · w3 x). `projection`: see `Attention`."""

    projected = ("w1", "w3")

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.projection: Projection = each_alone
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x_TE: Tensor, ops: BlockOps) -> Tensor:
        gate, up = self.projection(x_TE, self.w1, self.w3)
        return self.w2(ops.swiglu(gate, up))


class _Block(nn.Module):
    """What both kinds share: attention, feed-forward, modulation and the norm of the text."""

    chunks: int

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        assert cfg.ffn_dim and cfg.cond_dim, "resolve the configuration first (model/sizes.py)"
        self.attention = Attention(cfg)
        self.feed_forward = FeedForward(cfg.dim, cfg.ffn_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.cond_dim, self.chunks * cfg.dim))
        self.attention_y_norm = nn.RMSNorm(cfg.text_dim, cfg.norm_eps) if cfg.text_dim else None

    def modulation(self, cond_SC: Tensor) -> tuple[Tensor, ...]:
        return self.adaLN_modulation(cond_SC).chunk(self.chunks, dim=-1)

    def attend(self, x_TE: Tensor, ctx: Context) -> Tensor:
        text_MY = None if self.attention_y_norm is None else self.attention_y_norm(ctx.text_MY)
        return self.attention(x_TE, text_MY, ctx)


class FlagBlock(_Block):
    """Pre-norm with adaLN shift, scale and gate (arXiv 2405.05945, figure 2)."""

    chunks = 6

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        self.attention_norm = nn.RMSNorm(cfg.dim, cfg.norm_eps)
        self.ffn_norm = nn.RMSNorm(cfg.dim, cfg.norm_eps)

    def forward(self, x_TE: Tensor, cond_SC: Tensor, ctx: Context) -> Tensor:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.modulation(cond_SC)
        x_TE, y_TE = ctx.ops.norm(x_TE, self.attention_norm, shift_a, scale_a)
        y_TE = self.attend(y_TE, ctx)
        x_TE, y_TE = ctx.ops.add_norm(x_TE, y_TE, gate_a, self.ffn_norm, shift_f, scale_f)
        y_TE = self.feed_forward(y_TE, ctx.ops)
        return ctx.ops.add(x_TE, y_TE, gate_f)


class NextBlock(_Block):
    """Sandwich norms and tanh gates, no shift (Next-DiT, arXiv 2406.18583, section 2.1)."""

    chunks = 4

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        self.attention_norm1 = nn.RMSNorm(cfg.dim, cfg.norm_eps)
        self.attention_norm2 = nn.RMSNorm(cfg.dim, cfg.norm_eps)
        self.ffn_norm1 = nn.RMSNorm(cfg.dim, cfg.norm_eps)
        self.ffn_norm2 = nn.RMSNorm(cfg.dim, cfg.norm_eps)

    def forward(self, x_TE: Tensor, cond_SC: Tensor, ctx: Context) -> Tensor:
        scale_a, gate_a, scale_f, gate_f = self.modulation(cond_SC)
        x_TE, y_TE = ctx.ops.norm(x_TE, self.attention_norm1, None, scale_a)
        y_TE = self.attend(y_TE, ctx)
        x_TE, y_TE = ctx.ops.add_norm(x_TE, y_TE, gate_a, self.ffn_norm1, None, scale_f, sandwich=self.attention_norm2)
        y_TE = self.feed_forward(y_TE, ctx.ops)
        return ctx.ops.add(x_TE, y_TE, gate_f, sandwich=self.ffn_norm2)


BLOCKS: dict[str, type[FlagBlock] | type[NextBlock]] = {"flag": FlagBlock, "next": NextBlock}
