"""The memory-bound operations of a block behind one seam: as plain torch, and as fused kernels.

`PlainOps` is the reference: what each operation means, in the fewest words, and what runs on CPUs. `FusedOps` does the
same in one pass over memory each, forward and backward (`kernels/`). Which one runs is settled once per forward.

Shape legend
    T, S     tokens of the residual stream, samples of the pack
    E, F     width of the residual stream, hidden width of the feed-forward
    A        tokens that queries and keys are made of; under parallelism not those of the residual stream
    H, K, D  query heads, key heads, channels of a head
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flagdit.batch import PackLayout
from flagdit.config.schema import ModelConfig
from flagdit.errors import RecipeError
from flagdit.kernels.dispatch import use_triton
from flagdit.kernels.gated_residual_norm import gated_residual, gated_residual_norm
from flagdit.kernels.layer_norm_rope import layer_norm_rope
from flagdit.kernels.qk_norm_rope import qk_norm_rope
from flagdit.kernels.rms_norm_modulate import rms_norm_modulate_residual
from flagdit.kernels.rope import Angles, rope
from flagdit.kernels.segments import Segments
from flagdit.kernels.swiglu import swiglu
from flagdit.model.rope import Rotation
from flagdit.model.segments import Samples, modulate, scale_tokens


class BlockOps(Protocol):
    """What a block does besides matrix products and attention. Values with S rows are every sample's own."""

    def norm(self, x_TE: Tensor, norm: nn.RMSNorm, shift_SE: Tensor | None, scale_SE: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream and its norm, modulated: (x, norm(x)·(1 + scale) + shift)."""

    def add(self, x_TE: Tensor, f_TE: Tensor, gate_SE: Tensor, sandwich: nn.RMSNorm | None = None) -> Tensor:
        """The residual stream after a branch: x + gate·f, or with a sandwich norm x + tanh(gate)·sandwich(f)."""

    def add_norm(
        self,
        x_TE: Tensor,
        f_TE: Tensor,
        gate_SE: Tensor,
        norm: nn.RMSNorm,
        shift_SE: Tensor | None,
        scale_SE: Tensor,
        sandwich: nn.RMSNorm | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`add`, then `norm` of its result."""

    def queries_and_keys(self, q: Tensor, k: Tensor, q_norm: Any, k_norm: Any) -> tuple[Tensor, Tensor]:
        """Normed and rotated: (A, H·D) and (A, K·D) → (A, H, D) and (A, K, D)."""

    def swiglu(self, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        """silu(gate)·up."""


@dataclass(frozen=True)
class PlainOps:
    """Plain torch.

    Attributes:
        samples: which tokens of the residual stream belong to which sample.
        rotation: RoPE of the tokens that queries and keys are made of.
    """

    samples: Samples
    rotation: Rotation

    def norm(self, x_TE: Tensor, norm: nn.RMSNorm, shift_SE: Tensor | None, scale_SE: Tensor) -> tuple[Tensor, Tensor]:
        return x_TE, modulate(norm(x_TE), shift_SE, scale_SE, self.samples)

    def add(self, x_TE: Tensor, f_TE: Tensor, gate_SE: Tensor, sandwich: nn.RMSNorm | None = None) -> Tensor:
        if sandwich is not None:
            f_TE, gate_SE = sandwich(f_TE), gate_SE.tanh()
        return x_TE + scale_tokens(f_TE, gate_SE, self.samples)

    def add_norm(
        self,
        x_TE: Tensor,
        f_TE: Tensor,
        gate_SE: Tensor,
        norm: nn.RMSNorm,
        shift_SE: Tensor | None,
        scale_SE: Tensor,
        sandwich: nn.RMSNorm | None = None,
    ) -> tuple[Tensor, Tensor]:
        return self.norm(self.add(x_TE, f_TE, gate_SE, sandwich), norm, shift_SE, scale_SE)

    def queries_and_keys(self, q: Tensor, k: Tensor, q_norm: Any, k_norm: Any) -> tuple[Tensor, Tensor]:
        return self.rotation(q_norm(q)), self.rotation(k_norm(k))

    def swiglu(self, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        return F.silu(gate_TF) * up_TF


@dataclass(frozen=True)
class FusedOps:
    """Fused kernels in Triton. Of the norms' modules only the parameters are read.

    Attributes:
        segments: which tokens of the residual stream belong to which sample.
        angles: RoPE of the tokens that queries and keys are made of.
        eps: of all norms.
    """

    segments: Segments
    angles: Angles
    eps: float

    def norm(self, x_TE: Tensor, norm: nn.RMSNorm, shift_SE: Tensor | None, scale_SE: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm_modulate_residual(x_TE, norm.weight, shift_SE, scale_SE, self.segments, self.eps, "triton")

    def add(self, x_TE: Tensor, f_TE: Tensor, gate_SE: Tensor, sandwich: nn.RMSNorm | None = None) -> Tensor:
        weight_E = None if sandwich is None else sandwich.weight
        return gated_residual(
            x_TE, f_TE, gate_SE, self.segments, self.eps,
            f_weight_D=weight_E, tanh=sandwich is not None, backend="triton",
        )  # fmt: skip

    def add_norm(
        self,
        x_TE: Tensor,
        f_TE: Tensor,
        gate_SE: Tensor,
        norm: nn.RMSNorm,
        shift_SE: Tensor | None,
        scale_SE: Tensor,
        sandwich: nn.RMSNorm | None = None,
    ) -> tuple[Tensor, Tensor]:
        weight_E = None if sandwich is None else sandwich.weight
        return gated_residual_norm(
            x_TE, f_TE, gate_SE, norm.weight, shift_SE, scale_SE, self.segments, self.eps,
            f_weight_D=weight_E, tanh=sandwich is not None, backend="triton",
        )  # fmt: skip

    def queries_and_keys(self, q: Tensor, k: Tensor, q_norm: Any, k_norm: Any) -> tuple[Tensor, Tensor]:
        head_dim = 2 * self.angles.num_pairs
        kind = getattr(q_norm, "kind", None)
        if kind == "rms":
            q_AHD, k_AKD = (x.unflatten(-1, (-1, head_dim)) for x in (q, k))
            return qk_norm_rope(q_AHD, k_AKD, q_norm.weight, k_norm.weight, self.angles, self.eps, "triton")
        if kind == "layer":
            q_AHD, k_AKD = (
                layer_norm_rope(x, norm.weight, norm.bias, self.angles, head_dim, self.eps, "triton")
                for x, norm in ((q, q_norm), (k, k_norm))
            )
            return q_AHD, k_AKD
        # No norm, or one that was put in its place from outside: tensor parallelism reduces statistics over the ranks.
        return (
            rope(q_norm(q), self.angles, backend="triton"),
            rope(k_norm(k), self.angles, backend="triton"),
        )

    def swiglu(self, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        return swiglu(gate_TF, up_TF, "triton")


def choose_kernels(cfg: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    """triton or reference: what the blocks run on such tensors. A reason not to use Triton on a GPU is logged once.

    Raises:
        RecipeError: model.kernels=triton, and it cannot serve.
    """
    try:
        return "triton" if use_triton("the blocks", cfg.kernels, device.type, dtype, cfg.dim) else "reference"
    except ValueError as error:
        raise RecipeError(str(error), where="model.kernels", fix="Use model.kernels=auto.") from error


def block_ops(
    cfg: ModelConfig, device: torch.device, dtype: torch.dtype, layout: PackLayout, samples: Samples, rotation: Rotation
) -> BlockOps:
    """The operations of all blocks in one forward.

    Args:
        device, dtype: of the residual stream.
        layout: of its tokens.
        samples: the same, as `PlainOps` reads it.
        rotation: RoPE of the tokens that queries and keys are made of.
    """
    if choose_kernels(cfg, device, dtype) == "reference":
        return PlainOps(samples, rotation)
    angles = Angles(cos_TR=rotation.cos_TR, sin_TR=rotation.sin_TR)
    return FusedOps(Segments.build(layout.seqlens, device), angles, cfg.norm_eps)
