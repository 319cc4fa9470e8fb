"""torch's scaled_dot_product_attention: the reference, runs everywhere.

Shape legend
    T, U  query tokens and key tokens of the pack
    H, K  query heads, key/value heads (K divides H)
    G     queries heads per key head
    D     channels of a head
    B, L  samples of one run, queries of each of them
    N, M  queries and keys of one sample
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from flagdit.model.attention_backends.base import LiveBackend, lse_dtype
from flagdit.model.attention_backends.pairs import Pairs

_aten = torch.ops.aten
MATH_QUERIES = 1024
"""Queries whose scores are held at once where there is no fused kernel."""


class Sdpa(LiveBackend):
    """One call per run of equally long samples. On GPUs torch chooses cuDNN, flash or efficient kernels for each call.

    Keys that differ in number inside a run (captions) are padded and masked; self-attention never is. `forward` and
    `backward` call the kernel that torch would choose, once per run of equal queries and keys; where that is none with
    a log-sum-exp (fp32 on a GPU), they write the formula out, a block of queries at a time.
    """

    name = "sdpa"

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int, *, lse: bool = False) -> str | None:
        return None if dtype.is_floating_point else f"{dtype} is not a floating-point type"

    def nondeterminism(self, device: torch.device, *, gqa: bool) -> str | None:
        return None

    def _attend(self, q_THD: Tensor, k_UKD: Tensor, v_UKD: Tensor, pairs: Pairs) -> Tensor:
        groups, num_kv_heads = pairs.groups, k_UKD.shape[1]
        queries = q_THD.split([g.len_q * len(g.seqlens_k) for g in groups])
        keys = k_UKD.split([sum(g.seqlens_k) for g in groups])
        values = v_UKD.split([sum(g.seqlens_k) for g in groups])
        outputs = []
        for group, q, k, v in zip(groups, queries, keys, values, strict=True):
            out_BKND = F.scaled_dot_product_attention(
                fold(q, group.len_q, num_kv_heads),
                group.batch_keys(k),
                group.batch_keys(v),
                attn_mask=group.mask_B11L,
            )
            outputs.append(unfold(out_BKND, group.len_q))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _forward(self, q_THD: Tensor, k_UKD: Tensor, v_UKD: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
        outs, lses = [], []
        for len_q, len_k, (q,), (k, v) in _blocks(pairs, (q_THD,), (k_UKD, v_UKD)):
            q_BKND = fold(q, len_q, k.shape[1])
            k_BKMD, v_BKMD = fold(k, len_k, k.shape[1]), fold(v, len_k, k.shape[1])
            out_BKND, lse_BKN = _kernel_forward(q_BKND, k_BKMD, v_BKMD)
            outs.append(unfold(out_BKND, len_q))
            lses.append(unfold(lse_BKN[..., None], len_q)[..., 0])
        return torch.cat(outs), torch.cat(lses)

    def _backward(
        self,
        grad_THD: Tensor,
        q_THD: Tensor,
        k_UKD: Tensor,
        v_UKD: Tensor,
        out_THD: Tensor,
        lse_TH: Tensor,
        pairs: Pairs,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        sources = (grad_THD, q_THD, out_THD, lse_TH[..., None])
        for len_q, len_k, queries, (k, v) in _blocks(pairs, sources, (k_UKD, v_UKD)):
            grad, q, out, lse = (fold(x, len_q, k.shape[1]) for x in queries)
            k_BKMD, v_BKMD = fold(k, len_k, k.shape[1]), fold(v, len_k, k.shape[1])
            parts = _kernel_backward(grad, q, k_BKMD, v_BKMD, out, lse[..., 0])
            for found, part, length in zip(grads, parts, (len_q, len_k, len_k), strict=True):
                found.append(unfold(part, length))
        return torch.cat(grads[0]), torch.cat(grads[1]), torch.cat(grads[2])


def _blocks(pairs: Pairs, queries: tuple[Tensor, ...], keys: tuple[Tensor, ...]):
    """(queries and keys of a sample, tensors of the queries, tensors of the keys) of each run of equal samples."""
    blocks = pairs.blocks
    split_q = [x.split([b.count * b.len_q for b in blocks]) for x in queries]
    split_k = [x.split([b.count * b.len_k for b in blocks]) for x in keys]
    for block, of_q, of_k in zip(blocks, zip(*split_q, strict=True), zip(*split_k, strict=True), strict=True):
        yield block.len_q, block.len_k, of_q, of_k


def fold(x_TXD: Tensor, length: int, num_heads: int) -> Tensor:
    """(B·L, K·G, D) → (B, K, G·L, D): the heads that share keys become more queries of one head.

    Without a causal mask a query does not care where it stands, so grouped-query attention needs neither copies of the
    keys nor kernels that know of it. A view where G = 1.
    """
    x_BLKGD = x_TXD.unflatten(0, (-1, length)).unflatten(2, (num_heads, -1))
    return x_BLKGD.permute(0, 2, 3, 1, 4).flatten(2, 3)


def unfold(x_BKND: Tensor, length: int) -> Tensor:
    """(B, K, G·L, D) → (B·L, K·G, D)."""
    return x_BKND.unflatten(2, (-1, length)).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)


def _kernel_of(q: Tensor, k: Tensor, v: Tensor) -> str:
    """The kernel with a log-sum-exp that torch would take: cpu, flash, cudnn, or none (math)."""
    # Some kernels serve shapes forward that they do not serve backward; torch tells by what needs a gradient.
    with torch.enable_grad():
        choice = torch._fused_sdp_choice(q.detach().requires_grad_(), k, v)
    if q.device.type == "cpu":
        return "cpu" if choice == SDPBackend.FLASH_ATTENTION.value else "math"
    if choice == SDPBackend.CUDNN_ATTENTION.value:
        return "cudnn"
    # scaled_dot_product_attention pads heads to multiples of 8 for this kernel; the operator itself does not.
    flash = choice == SDPBackend.FLASH_ATTENTION.value and q.shape[-1] % 8 == 0
    return "flash" if flash else "math"


def _kernel_forward(q_BKND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor) -> tuple[Tensor, Tensor]:
    """(out_BKND, lse_BKN) of equally long samples."""
    q, k, v = q_BKND, k_BKMD, v_BKMD
    kernel = _kernel_of(q, k, v)
    if kernel == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    if kernel == "cudnn":
        out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
        return out, lse.view(q.shape[:3])
    if kernel == "flash":
        out, lse, *_ = _aten._scaled_dot_product_flash_attention(q, k, v)
        return out, lse
    return math_forward(q, k, v)


def _kernel_backward(
    grad_BKND: Tensor, q_BKND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, out_BKND: Tensor, lse_BKN: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of equally long samples."""
    grad, q, k, v, out = grad_BKND, q_BKND, k_BKMD, v_BKMD, out_BKND
    kernel = _kernel_of(q, k, v)
    if kernel == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse_BKN, 0.0, False)
    # No dropout, so the state of the generator is not read.
    seed = torch.zeros((2,) if kernel == "flash" else (), dtype=torch.uint64 if kernel == "flash" else torch.int64)
    seed, lengths = seed.to(q.device), (q.shape[2], k.shape[2])
    if kernel == "cudnn":
        stats = lse_BKN.contiguous()[..., None]
        return _aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, stats, seed, seed, None, None, None, *lengths, 0.0, False
        )
    if kernel == "flash":
        return _aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse_BKN.contiguous(), None, None, *lengths, 0.0, False, seed, seed
        )
    return math_backward(grad, q, k, v, out, lse_BKN)


def math_forward(q_BKND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor) -> tuple[Tensor, Tensor]:
    """Attention written out, in fp32 or more: (out_BKND, lse_BKN)."""
    dtype = lse_dtype(q_BKND)
    k, v = k_BKMD.to(dtype), v_BKMD.to(dtype)
    outs, lses = [], []
    for q in q_BKND.split(MATH_QUERIES, dim=2):
        scores = q.to(dtype) @ k.transpose(2, 3) / math.sqrt(q.shape[3])
        lse = scores.logsumexp(-1)
        outs.append(((scores - lse[..., None]).exp_() @ v).to(q.dtype))
        lses.append(lse)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def math_backward(
    grad_BKND: Tensor, q_BKND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, out_BKND: Tensor, lse_BKN: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients written out (arXiv 2205.14135, appendix B.2)."""
    dtype, scale = lse_dtype(q_BKND), 1 / math.sqrt(q_BKND.shape[3])
    k, v = k_BKMD.to(dtype), v_BKMD.to(dtype)
    dk, dv, dqs = torch.zeros_like(k), torch.zeros_like(v), []
    parts = (x.split(MATH_QUERIES, dim=2) for x in (grad_BKND, q_BKND, out_BKND, lse_BKN))
    for grad, q, out, lse in zip(*parts, strict=True):
        grad, q = grad.to(dtype), q.to(dtype)
        p = (q @ k.transpose(2, 3) * scale - lse[..., None]).exp_()
        delta = (grad * out).sum(-1, keepdim=True)
        ds = p * (grad @ v.transpose(2, 3) - delta) * scale
        dv += p.transpose(2, 3) @ grad
        dk += ds.transpose(2, 3) @ q
        dqs.append((ds @ k).to(q_BKND.dtype))
    return torch.cat(dqs, dim=2), dk.to(q_BKND.dtype), dv.to(q_BKND.dtype)
