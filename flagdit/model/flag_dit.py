"""Flag-DiT (arXiv 2405.05945): packed patches of any modality and size → the velocity of the flow.

Shape legend
    T, N, S  tokens of the pack, patch tokens of one modality, samples
    P        features of a patch, ordered (C, pf, ph, pw)
    E        width of the residual stream
    C        width of the conditioning vector
    M, Y     text tokens of the pack, width of the text features

The model knows nothing of devices, ranks or precision beyond the dtype of its parameters. Settings of one inference
(RoPE scaling, attention temperature) are arguments of forward, never state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from flagdit.batch import PackedBatch, PackedText, Patches
from flagdit.config.schema import ModelConfig
from flagdit.errors import DataError
from flagdit.model.attention import Context, SelfAttention
from flagdit.model.attention_backends import AttentionBackend, Pairs, Sdpa, joined, set_sizes
from flagdit.model.block import BLOCKS
from flagdit.model.embed import LabelEmbedder, TextPooler, TimeEmbedder
from flagdit.model.modality import MODALITIES
from flagdit.model.ops import block_ops
from flagdit.model.rope import RopeScaling, build_rotation, extents
from flagdit.model.segments import Samples, modulate, runs_of, take_rows
from flagdit.model.sizes import resolve
from flagdit.model.tokens import modality_of

FINAL_EPS = 1e-6

# Selective checkpointing keeps what is dear to compute: outputs of matrix products and attention.
_aten = torch.ops.aten
EXPENSIVE_OPS = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.flagdit.packed_attention.default,
]


@dataclass(frozen=True)
class Inference:
    """Settings of one sampling run that change how the trained network is read.

    Attributes:
        rope: scaling of positions for sizes beyond the trained ones; None: as trained.
        proportional_base: tokens per sample in training. Self-attention logits are multiplied by √log_base(n) for
            samples of n tokens, so that attention over more tokens stays as sharp (arXiv 2306.08645). None: off.
        sets: sizes of groups of neighbouring samples whose tokens all see each other (shared attention, arXiv
            2312.02133); the pattern repeats over the pack, so that guidance, which doubles it, keeps its halves apart.
            Empty: every sample for itself.
    """

    rope: RopeScaling | None = None
    proportional_base: int | None = None
    sets: tuple[int, ...] = ()


class FlagDiT(nn.Module):
    """The network. Parameters exist only where the configuration uses them.

    Args:
        cfg: shape and variant; `size` and nulls are resolved here, `self.cfg` is the result.

    Attributes:
        patch_dims: modality → features of a patch.
        attention_backend: set from outside to a faster one by whoever knows the device
            (`attention_backends.resolve_backend`).
        self_attention: set from outside by context parallelism; None: the attention backend.

    Raises:
        RecipeError: an impossible shape.
        DataError: an unknown modality.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        cfg = self.cfg = resolve(cfg)
        assert cfg.cond_dim is not None
        self.attention_backend: AttentionBackend = Sdpa()
        patch_dims = {m: c * math.prod(modality_of(m).patch(cfg.patch_size)) for m, c in cfg.modalities.items()}
        self.patch_dims = patch_dims
        self.self_attention: SelfAttention | None = None
        self.stems = nn.ModuleDict({m: nn.Linear(p, cfg.dim) for m, p in patch_dims.items()})
        if cfg.nextline:
            self.nextline = nn.Parameter(torch.empty(cfg.dim))
        if cfg.nextframe and any(MODALITIES[m].has_frames for m in cfg.modalities):
            self.nextframe = nn.Parameter(torch.empty(cfg.dim))
        self.t_embedder = TimeEmbedder(cfg.cond_dim, cfg.time_scale)
        if cfg.text_dim:
            self.text_pooler = TextPooler(cfg.text_dim, cfg.cond_dim)
        if cfg.num_classes:
            self.y_embedder = LabelEmbedder(cfg.num_classes, cfg.cond_dim)
        self.blocks = nn.ModuleList([BLOCKS[cfg.block](cfg) for _ in range(cfg.num_layers)])
        final_chunks = 2 if cfg.final_shift else 1
        self.final_adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.cond_dim, final_chunks * cfg.dim))
        outputs = 2 if cfg.learn_sigma else 1
        self.heads = nn.ModuleDict({m: nn.Linear(cfg.dim, outputs * p) for m, p in patch_dims.items()})

    @property
    def dtype(self) -> torch.dtype:
        return self.t_embedder.dtype

    def forward(self, x: Patches, t_S: Tensor, batch: PackedBatch, inference: Inference | None = None) -> Patches:
        """The velocity dx/dt at x and t.

        Args:
            x: noised patch features (N, P) by modality.
            t_S: (S,) times in [0, 1]; 0 is noise, 1 is data.
            batch: geometry and conditions; its clean patches are not read.
            inference: settings of this call; None: as trained.

        Returns:
            (N, P) by modality, in the parameters' dtype.

        Raises:
            DataError: the batch does not fit the model (modality, channels, text or labels).
        """
        self._check(x, t_S, batch)
        text = batch.text if self.cfg.text_dim else None
        cond_SC = self.condition(t_S, text, batch.labels_S)
        ctx = self.context(t_S, batch, text, inference or Inference())
        h_TE = self.embed(x, batch)
        for i, block in enumerate(self.blocks):
            h_TE = self._run(block, i, h_TE, cond_SC, ctx)
        return self.project(h_TE, cond_SC, ctx, batch)

    def embed(self, x: Patches, batch: PackedBatch) -> Tensor:
        """Patches through their stems, [nextline] and [nextframe] in their places: (T, E)."""
        layout = batch.layout
        parts = [(layout.patch_index[m], self.stems[m](x_NP.to(self.dtype))) for m, x_NP in x.items()]
        for name, index in (("nextline", layout.nextline_index), ("nextframe", layout.nextframe_index)):
            # Also where this process holds none: every parameter takes part in every forward, as sharding engines need.
            if hasattr(self, name):
                parts.append((index, getattr(self, name).expand(len(index), -1)))
        if len(parts) == 1 and len(parts[0][0]) == layout.num_tokens:
            return parts[0][1]
        h_TE = parts[0][1].new_zeros(layout.num_tokens, self.cfg.dim)
        for index, tokens in parts:
            h_TE = h_TE.index_copy(0, index, tokens)
        return h_TE

    def condition(self, t_S: Tensor, text: PackedText | None, labels_S: Tensor | None) -> Tensor:
        """(S, C): embedded time plus pooled text or class."""
        cond_SC = self.t_embedder(t_S)
        if text is not None:
            cond_SC = cond_SC + self.text_pooler(text.features_MY.to(self.dtype), runs_of(text.seqlens))
        if self.cfg.num_classes:
            cond_SC = cond_SC + self.y_embedder(labels_S)
        return cond_SC

    def context(self, t_S: Tensor, batch: PackedBatch, text: PackedText | None, inference: Inference) -> Context:
        """What all blocks share: computed once per forward."""
        layout, attended, whole = batch.layout, batch.attended, batch.share or batch.layout
        sets = set_sizes(inference.sets, len(t_S))
        temperature_T11 = None
        if inference.proportional_base is not None:
            seen = joined(whole.seqlens[: len(t_S)], sets)
            factors = [math.sqrt(math.log(n, inference.proportional_base)) for n in seen]
            factor_S = torch.tensor(factors, dtype=self.dtype).repeat_interleave(torch.tensor(sets)).to(t_S.device)
            temperature_T11 = factor_S[attended.segment_ids][:, None, None]
        lengths_SA = None
        if inference.rope is not None:
            lengths_SA = extents(self.cfg, batch.segments, whole.seqlens[: len(t_S)], t_S.device)
        samples = Samples(runs_of(layout.seqlens), layout.segment_ids)
        rotation = build_rotation(self.cfg, attended, t_S, inference.rope, lengths_SA)
        return Context(
            attention=self.attention_backend,
            self_attention=self.self_attention or self.attention_backend,
            samples=samples,
            ops=block_ops(self.cfg, t_S.device, self.dtype, layout, samples, rotation),
            self_pairs=Pairs.within(sets, whole.seqlens, whole.cu_seqlens),
            text_MY=None if text is None else text.features_MY.to(self.dtype),
            text_pairs=None
            if text is None
            else Pairs(attended.seqlens, text.seqlens, attended.cu_seqlens, text.cu_seqlens),
            temperature_T11=temperature_T11,
        )

    def project(self, h_TE: Tensor, cond_SC: Tensor, ctx: Context, batch: PackedBatch) -> Patches:
        """Final norm, modulation and each modality's head; special tokens are dropped."""
        shift_scale = self.final_adaLN_modulation(cond_SC).split(self.cfg.dim, dim=-1)
        shift_SE = shift_scale[0] if len(shift_scale) == 2 else None
        h_TE = F.layer_norm(h_TE, (self.cfg.dim,), eps=FINAL_EPS)
        h_TE = modulate(h_TE, shift_SE, shift_scale[-1], ctx.samples)
        velocity = {}
        for modality, index in batch.layout.patch_index.items():
            out_NP = self.heads[modality](take_rows(h_TE, index))
            # The second half of a learn_sigma head is trained by nothing here and kept for the checkpoint's sake.
            velocity[modality] = out_NP.chunk(2, dim=-1)[0] if self.cfg.learn_sigma else out_NP
        return velocity

    def _run(self, block: nn.Module, i: int, h_TE: Tensor, cond_SC: Tensor, ctx: Context) -> Tensor:
        kind = self.cfg.checkpointing
        if kind == "none" or i % self.cfg.checkpoint_every or not torch.is_grad_enabled():
            return block(h_TE, cond_SC, ctx)
        # The blocks draw no random numbers, so there is no generator state to keep.
        run = partial(checkpoint, block, h_TE, cond_SC, ctx, use_reentrant=False, preserve_rng_state=False)
        if kind == "block":
            return run()
        return run(context_fn=partial(create_selective_checkpoint_contexts, EXPENSIVE_OPS))

    def _check(self, x: Patches, t_S: Tensor, batch: PackedBatch) -> None:
        count = len(batch.segments)
        assert t_S.shape == (count,), f"t_S has shape {tuple(t_S.shape)} for {count} samples"
        assert set(x) == set(batch.layout.patch_index), "patches and layout disagree on modalities"
        for modality, x_NP in x.items():
            if modality not in self.stems:
                raise DataError(
                    f"the model has no {modality} modality, only {', '.join(self.stems)}",
                    fix="Add it to model.modalities.",
                )
            if x_NP.shape[1] != self.stems[modality].in_features:
                raise DataError(
                    f"{modality} patches have {x_NP.shape[1]} features, the model expects "
                    f"{self.stems[modality].in_features}",
                    fix=f"Set model.modalities.{modality} to the channels of the data, model.patch_size as packed.",
                )
        if self.cfg.text_dim:
            if batch.text is None:
                raise DataError(
                    "the model reads text, the batch has none", fix="Set model.text_dim=0 for a model without."
                )
            if batch.text.features_MY.shape[1] != self.cfg.text_dim:
                raise DataError(
                    f"text features are {batch.text.features_MY.shape[1]} wide, the model expects {self.cfg.text_dim}",
                    fix="Set model.text_dim to the width of the text encoder.",
                )
            assert len(batch.text.seqlens) == count and min(batch.text.seqlens) > 0
        if self.cfg.num_classes and batch.labels_S is None:
            raise DataError("the model reads classes, the batch has no labels")
        special = {"nextline": batch.layout.nextline_index, "nextframe": batch.layout.nextframe_index}
        for name, index in special.items():
            assert not len(index) or hasattr(self, name), f"the pack has [{name}] tokens, the model has none"
