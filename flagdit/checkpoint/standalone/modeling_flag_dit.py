"""Flag-DiT and Next-DiT for diffusers, in one file that needs torch and diffusers only.

arXiv 2405.05945 (Flag-DiT) and arXiv 2406.18583 (Next-DiT). All samples of a batch have one size; captions may differ
in length. Weights have the names of the framework that trained them.

Shape legend
    B        samples
    N, L     image tokens (special tokens counted) and text tokens of a sample
    E, Y, C  widths of the residual stream, of the text features, of the conditioning vector
    H, K, D  query heads, key/value heads, channels of a head
    R, A     pairs of neighbouring channels that rotate together; position axes
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

TIME_FEATURES = 256
LONGEST_PERIOD = 1e4
FINAL_EPS = 1e-6
MODALITIES_WITH_FRAMES = ("video", "multiview")


@dataclass
class Shared:
    """What all blocks of one forward share."""

    cond_BC: Tensor
    cis_NR: Tensor
    text_BLY: Tensor | None
    text_mask_B11L: Tensor | None
    temperature: float


class TimeEmbedder(nn.Module):
    def __init__(self, cond_dim: int, time_scale: float):
        super().__init__()
        self.time_scale = time_scale
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))

    def forward(self, t_B: Tensor) -> Tensor:
        half = TIME_FEATURES // 2
        exponent = torch.arange(half, dtype=torch.float32, device=t_B.device) / half
        angle = (t_B.float() * self.time_scale)[:, None] * torch.exp(-math.log(LONGEST_PERIOD) * exponent)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.mlp[0].weight.dtype))


class TextPooler(nn.Module):
    """Mean of a caption's features → LayerNorm → Linear."""

    def __init__(self, text_dim: int, cond_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(text_dim)
        self.proj = nn.Linear(text_dim, cond_dim)

    def forward(self, text_BLY: Tensor, mask_BL: Tensor) -> Tensor:
        weight_BL1 = mask_BL[..., None].to(text_BLY.dtype)
        return self.proj(self.norm((text_BLY * weight_BL1).sum(1) / weight_BL1.sum(1)))


class LabelEmbedder(nn.Module):
    """Class → vector; the last row, id num_classes, means "no class"."""

    def __init__(self, num_classes: int, cond_dim: int):
        super().__init__()
        self.table = nn.Embedding(num_classes + 1, cond_dim)

    def forward(self, labels_B: Tensor) -> Tensor:
        return self.table(labels_B)


class QKNorm(nn.Module):
    """(…, heads·D) → (…, heads, D), normed: `rms` each head alone, `layer` all heads together, or `none`."""

    def __init__(self, kind: str, num_heads: int, head_dim: int, eps: float):
        super().__init__()
        self.kind, self.head_dim, self.eps = kind, head_dim, eps
        if kind != "none":
            self.weight = nn.Parameter(torch.ones(num_heads * head_dim if kind == "layer" else head_dim))
        if kind == "layer":
            self.bias = nn.Parameter(torch.zeros(num_heads * head_dim))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "layer":
            x = F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        x = x.unflatten(-1, (-1, self.head_dim))
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps) if self.kind == "rms" else x


class Attention(nn.Module):
    """Self-attention plus tanh(gate)·cross-attention with the same queries, then one output projection."""

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, text_dim: int, qk_norm: str, eps: float):
        super().__init__()
        self.head_dim = dim // num_heads
        self.repeats = num_heads // num_kv_heads
        kv_dim = num_kv_heads * self.head_dim
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, kv_dim, bias=False)
        self.wv = nn.Linear(dim, kv_dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.q_norm = QKNorm(qk_norm, num_heads, self.head_dim, eps)
        self.k_norm = QKNorm(qk_norm, num_kv_heads, self.head_dim, eps)
        if text_dim:
            self.wk_y = nn.Linear(text_dim, kv_dim, bias=False)
            self.wv_y = nn.Linear(text_dim, kv_dim, bias=False)
            self.ky_norm = QKNorm(qk_norm, num_kv_heads, self.head_dim, eps)
            self.gate = nn.Parameter(torch.zeros(num_heads))

    def forward(self, x_BNE: Tensor, text_BLY: Tensor | None, shared: Shared) -> Tensor:
        q_BNHD = rotate(self.q_norm(self.wq(x_BNE)), shared.cis_NR)
        k_BNKD = rotate(self.k_norm(self.wk(x_BNE)), shared.cis_NR)
        v_BNKD = self.wv(x_BNE).unflatten(-1, (-1, self.head_dim))
        out_BNHD = self.attend(q_BNHD * shared.temperature, k_BNKD, v_BNKD, None)
        if text_BLY is not None:
            # Text keys have no position: they are normed and not rotated.
            k_BLKD = self.ky_norm(self.wk_y(text_BLY))
            v_BLKD = self.wv_y(text_BLY).unflatten(-1, (-1, self.head_dim))
            cross_BNHD = self.attend(q_BNHD, k_BLKD, v_BLKD, shared.text_mask_B11L)
            out_BNHD = out_BNHD + cross_BNHD * self.gate.tanh()[:, None]
        return self.wo(out_BNHD.flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        k, v = (x.repeat_interleave(self.repeats, dim=2) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """`flag`: pre-norm with adaLN shift, scale and gate. `next`: sandwich norms, scale and tanh gate."""

    def __init__(self, config: Any):
        super().__init__()
        c = config
        self.is_next = c.block == "next"
        self.chunks = 4 if self.is_next else 6
        self.attention = Attention(c.dim, c.num_heads, c.num_kv_heads, c.text_dim, c.qk_norm, c.norm_eps)
        self.feed_forward = FeedForward(c.dim, c.ffn_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(c.cond_dim, self.chunks * c.dim))
        self.attention_y_norm = nn.RMSNorm(c.text_dim, c.norm_eps) if c.text_dim else None
        names = ["attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"]
        for name in names if self.is_next else ["attention_norm", "ffn_norm"]:
            setattr(self, name, nn.RMSNorm(c.dim, c.norm_eps))

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        parts = self.adaLN_modulation(shared.cond_BC)[:, None].chunk(self.chunks, dim=-1)
        text = None if shared.text_BLY is None else self.attention_y_norm(shared.text_BLY)
        if self.is_next:
            scale_a, gate_a, scale_f, gate_f = parts
            y = self.attention(self.attention_norm1(x) * (1 + scale_a), text, shared)
            x = x + gate_a.tanh() * self.attention_norm2(y)
            y = self.feed_forward(self.ffn_norm1(x) * (1 + scale_f))
            return x + gate_f.tanh() * self.ffn_norm2(y)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = parts
        x = x + gate_a * self.attention(self.attention_norm(x) * (1 + scale_a) + shift_a, text, shared)
        return x + gate_f * self.feed_forward(self.ffn_norm(x) * (1 + scale_f) + shift_f)


class FlagDiTTransformer(ModelMixin, ConfigMixin):
    """Latents and time → the velocity that leads from noise (t = 0) to data (t = 1)."""

    @register_to_config
    def __init__(
        self,
        block: str,
        dim: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int,
        ffn_dim: int,
        cond_dim: int,
        modalities: dict[str, int],
        patch_size: int,
        text_dim: int,
        num_classes: int,
        qk_norm: str,
        norm_eps: float,
        rope: str,
        rope_axes: int,
        rope_theta: float,
        has_nextline: bool,
        has_nextframe: bool,
        time_scale: float,
        final_shift: bool,
        learn_sigma: bool,
    ):
        super().__init__()
        features = {m: channels * patch_size**2 for m, channels in modalities.items()}
        self.stems = nn.ModuleDict({m: nn.Linear(p, dim) for m, p in features.items()})
        if has_nextline:
            self.nextline = nn.Parameter(torch.empty(dim))
        if has_nextframe and any(m in MODALITIES_WITH_FRAMES for m in modalities):
            self.nextframe = nn.Parameter(torch.empty(dim))
        self.t_embedder = TimeEmbedder(cond_dim, time_scale)
        if text_dim:
            self.text_pooler = TextPooler(text_dim, cond_dim)
        if num_classes:
            self.y_embedder = LabelEmbedder(num_classes, cond_dim)
        self.blocks = nn.ModuleList([Block(self.settings) for _ in range(num_layers)])
        final_chunks = 2 if final_shift else 1
        self.final_adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cond_dim, final_chunks * dim))
        self.heads = nn.ModuleDict({m: nn.Linear(dim, (1 + learn_sigma) * p) for m, p in features.items()})

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        class_labels: Tensor | None = None,
        modality: str | None = None,
        rope_linear: float = 1.0,
        rope_ntk: float = 1.0,
        proportional_base: int | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """
        Args:
            hidden_states: (B, channels, rows, columns) latents, or (B, channels, frames, rows, columns).
            timestep: (B,) times in [0, 1]; 0 is noise, 1 is data.
            encoder_hidden_states: (B, L, Y) text features, of models with text.
            encoder_attention_mask: (B, L), nonzero at valid tokens; None: all are.
            class_labels: (B,) of class-conditional models; num_classes means none.
            modality: one of config.modalities; None: the first.
            rope_linear, rope_ntk: divisor of positions and factor on theta, for sizes beyond the trained ones.
            proportional_base: tokens per sample in training, to keep attention as sharp for others; None: off.
            return_dict: wrap the result.

        Returns:
            The velocity, shaped as the latents.
        """
        c = self.settings
        modality = modality or next(iter(c.modalities))
        with_frames = hidden_states if hidden_states.ndim == 5 else hidden_states[:, :, None]
        frames, rows, columns = (
            with_frames.shape[2],
            *(size // c.patch_size for size in with_frames.shape[3:]),
        )
        marks_frames = c.has_nextframe and modality in MODALITIES_WITH_FRAMES
        cond_BC = self.t_embedder(timestep)
        mask_BL = None
        if c.text_dim:
            assert encoder_hidden_states is not None, "this model reads text"
            encoder_hidden_states = encoder_hidden_states.to(self.dtype)
            if encoder_attention_mask is None:
                encoder_attention_mask = torch.ones(encoder_hidden_states.shape[:2], device=hidden_states.device)
            mask_BL = encoder_attention_mask != 0
            cond_BC = cond_BC + self.text_pooler(encoder_hidden_states, mask_BL)
        if c.num_classes:
            cond_BC = cond_BC + self.y_embedder(class_labels)
        position_NA = self.positions(frames, rows, columns, marks_frames).to(hidden_states.device)
        tokens = len(position_NA)
        shared = Shared(
            cond_BC=cond_BC,
            cis_NR=self.rotation(position_NA, rope_linear, rope_ntk),
            text_BLY=encoder_hidden_states if c.text_dim else None,
            text_mask_B11L=None if mask_BL is None else mask_BL[:, None, None],
            temperature=1.0 if proportional_base is None else math.sqrt(math.log(tokens, proportional_base)),
        )
        h_BNE = self.embed(self.stems[modality](self.patchify(with_frames).to(self.dtype)), marks_frames)
        for block in self.blocks:
            h_BNE = block(h_BNE, shared)
        parts = self.final_adaLN_modulation(cond_BC)[:, None].split(c.dim, dim=-1)
        h_BNE = F.layer_norm(h_BNE, (c.dim,), eps=FINAL_EPS) * (1 + parts[-1])
        if len(parts) == 2:
            h_BNE = h_BNE + parts[0]
        out = self.heads[modality](self.drop_special(h_BNE, frames, rows, columns, marks_frames))
        if c.learn_sigma:
            out = out.chunk(2, dim=-1)[0]
        velocity = self.unpatchify(out).reshape(hidden_states.shape)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    @property
    def settings(self) -> Any:
        """The arguments of __init__, as attributes."""
        return self.config

    def patchify(self, x: Tensor) -> Tensor:
        """(B, C, F, H, W) → (B, F, rows, columns, C·p·p)."""
        p = self.settings.patch_size
        b, c, f, h, w = x.shape
        x = x.reshape(b, c, f, h // p, p, w // p, p).permute(0, 2, 3, 5, 1, 4, 6)
        return x.flatten(4)

    def unpatchify(self, x: Tensor) -> Tensor:
        """(B, F, rows, columns, C·p·p) → (B, C, F, H, W)."""
        p = self.settings.patch_size
        b, f, rows, columns, _ = x.shape
        x = x.reshape(b, f, rows, columns, -1, p, p).permute(0, 4, 1, 2, 5, 3, 6)
        return x.reshape(b, -1, f, rows * p, columns * p)

    def embed(self, h: Tensor, marks_frames: bool) -> Tensor:
        """(B, F, rows, columns, E) → (B, N, E), a special token after every row and frame where the model has them."""
        if self.settings.has_nextline:
            h = torch.cat([h, self.nextline.expand(*h.shape[:3], 1, -1)], dim=3)
        h = h.flatten(2, 3)
        if marks_frames:
            h = torch.cat([h, self.nextframe.expand(*h.shape[:2], 1, -1)], dim=2)
        return h.flatten(1, 2)

    def drop_special(self, h: Tensor, frames: int, rows: int, columns: int, marks_frames: bool) -> Tensor:
        """The inverse of `embed`."""
        h = h.unflatten(1, (frames, -1))
        if marks_frames:
            h = h[:, :, :-1]
        return h.unflatten(2, (rows, -1))[:, :, :, :columns]

    def positions(self, frames: int, rows: int, columns: int, marks_frames: bool) -> Tensor:
        """(N, A) positions of all tokens of a sample: one raster index, or (frame,) row and column."""
        c = self.settings
        line = [(row, column) for row in range(rows) for column in range(columns + c.has_nextline)]
        if marks_frames:
            line.append((rows, columns))
        axes = torch.tensor([(frame, *place) for frame in range(frames) for place in line])
        return torch.arange(len(axes))[:, None] if c.rope == "raster" else axes[:, -c.rope_axes :]

    def rotation(self, position_NA: Tensor, linear: float, ntk: float) -> Tensor:
        """(N, R) complex: pair j turns with axis j mod A by position·theta^(−2A·⌊j/A⌋/D)."""
        c = self.settings
        head_dim, axes = c.dim // c.num_heads, position_NA.shape[1]
        pair_R = torch.arange(head_dim // 2, device=position_NA.device)
        exponent_R = (pair_R // axes) * (2 * axes / head_dim)
        frequency_R = (torch.tensor(c.rope_theta * ntk, device=position_NA.device)) ** -exponent_R / linear
        angle_NR = position_NA.float()[:, pair_R % axes] * frequency_R
        return torch.complex(angle_NR.cos(), angle_NR.sin())


def rotate(x_BNHD: Tensor, cis_NR: Tensor) -> Tensor:
    """RoPE (arXiv 2104.09864): turns the pairs of every head, in fp32."""
    pairs = torch.view_as_complex(x_BNHD.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * cis_NR[:, None]).flatten(-2).to(x_BNHD.dtype)
