"""Bytes on one GPU: what training holds all the time, and what one micro-batch needs at its peak.

The formulas stand in docs/plan.md with their reasons, and are held against the traced model (`trace.py`). They count
the readable torch path; the fused kernels keep less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flagdit.config.schema import ModelConfig
from flagdit.model.sizes import resolve
from flagdit.parallel.deepspeed import BUCKET
from flagdit.plan.parameters import Parameters
from flagdit.plan.workload import Workload

FP32 = 4
COMPLEX64 = 8
MOMENTS = 2
CONTEXT = 1.5e9
"""Bytes that CUDA, NCCL's buffers and libraries' workspaces take, whatever the model: about so much on one node."""
FRAGMENTATION = 0.05
"""Share of activations and buffers that the caching allocator loses to holes."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a step, by kind."""

    weights: float
    gradients: float
    optimizer: float
    ema: float
    activations: float
    communication: float
    margin: float
    host: float

    @property
    def total(self) -> float:
        """On the GPU; `host` is beside it."""
        kinds = (self.weights, self.gradients, self.optimizer, self.ema, self.activations, self.communication)
        return sum(kinds) + self.margin


def memory_of(work: Workload, parameters: Parameters) -> Memory:
    """The bytes of one rank (docs/plan.md).

    Args:
        work: what it computes.
        parameters: of its model.
    """
    p, w = work.parallel, work.width
    own = parameters.per_rank(p.tensor)
    n = work.shards
    stage = p.zero if work.gpus > 1 else 0
    bucket = min(BUCKET, own)
    weights, gradients, communication = float(w * own), float(FP32 * own), 0.0
    masters = FP32 * own if w < FP32 or stage else 0
    if stage:
        # One bucket is filled while the one before travels, in fp32; gathered weights in their own type.
        communication = 2 * FP32 * bucket + w * bucket
    if stage >= 2:
        gradients = FP32 * own / n
    if stage == 3:
        weights = w * own / n
        communication += 2 * w * parameters.largest_block(p.tensor)
    optimizer = (masters + MOMENTS * FP32 * own) / (n if stage else 1)
    ema = work.emas * FP32 * own / (n if stage else 1)
    activations = activation_bytes(work.model, Slice.of(work))
    margin = CONTEXT + FRAGMENTATION * (activations + communication)
    host = optimizer if p.offload else 0.0
    return Memory(weights, gradients, optimizer - host, ema, activations, communication, margin, host)


@dataclass(frozen=True)
class Slice:
    """A rank's part of a pack and of the network's widths.

    Attributes:
        stream: tokens of the residual stream.
        attended: tokens that queries, keys and values are made of.
        samples, text: samples of the pack and their text tokens.
        uniform: all samples are equally long.
        tensor: ranks that split heads and hidden channels.
        width: bytes of an activation.
    """

    stream: float
    attended: float
    samples: int
    text: int
    uniform: bool
    tensor: int
    width: int

    @classmethod
    def whole(cls, seqlens: Sequence[int], text_seqlens: Sequence[int], width: int) -> Slice:
        """That of a single process."""
        n = sum(seqlens)
        return cls(n, n, len(seqlens), sum(text_seqlens), len(set(seqlens)) == 1, 1, width)

    @classmethod
    def of(cls, work: Workload) -> Slice:
        """That of one rank of a mesh."""
        p = work.parallel
        attended = work.tokens / p.context
        stream = attended / p.tensor if p.sequence else attended
        uniform = len(set(work.seqlens)) == 1 and p.context == 1 and not (p.sequence and p.tensor > 1)
        return cls(stream, attended, len(work.seqlens), work.text_tokens, uniform, p.tensor, work.width)


@dataclass(frozen=True)
class BlockBytes:
    """What one block keeps for its backward.

    Attributes:
        kept: without checkpointing.
        input: the residual stream that comes in.
        expensive: outputs of matrix products and attention, which selective checkpointing keeps.
        shared: the part of `expensive` that is among `kept`.
        transient: most that its backward needs beside what is kept.
    """

    kept: float
    input: float
    expensive: float
    shared: float
    transient: float


def block_bytes(cfg: ModelConfig, s: Slice) -> BlockBytes:
    """The bytes of one block, by the tensors that autograd keeps (docs/plan.md has the table)."""
    cfg = resolve(cfg)
    assert cfg.num_kv_heads and cfg.ffn_dim
    w, a, t = s.width, s.attended, s.stream
    E, head = cfg.dim, cfg.dim // cfg.num_heads
    q, k, h = E / s.tensor, head * cfg.num_kv_heads / s.tensor, cfg.ffn_dim / s.tensor
    flag = cfg.block == "flag"
    norms = 2 if flag else 4

    def norm(tokens: float, width: float) -> float:
        # Below fp32: the input and the normed input in fp32. In fp32 the input is the producer's own tensor.
        return tokens * width * (2 * FP32 if w < FP32 else FP32)

    stream = norms * norm(t, E) + 4 * w * t * E + (0 if w < FP32 else norms * FP32 * t * E)
    inputs = 2 * w * t * E
    qk = {"rms": norm(a, q) + norm(a, k) + (0 if w < FP32 else FP32 * a * (q + k)), "layer": w * a * (q + k), "none": 0}
    lse = FP32 * a * cfg.num_heads / s.tensor
    attention = w * a * (q + 2 * k) + w * a * q + lse
    cross = 0.0
    if cfg.text_dim:
        attention += w * a * q + lse  # the cross-attention's output
        attention += w * a * q  # the sum of both, which wo reads
    if cfg.num_kv_heads < cfg.num_heads:
        attention += 2 * w * a * q  # keys and values repeated for the query heads that share them
    if not s.uniform:
        attention += w * a * q  # runs of samples are joined
        cross = s.text * (cfg.text_dim * (w + FP32) + 2 * w * k + 2 * FP32 * k)
    ffn = 4 * w * a * h
    conditions = 8 * s.samples * E * w
    kept = stream + inputs + qk[cfg.qk_norm] + attention + cross + ffn + conditions
    products = w * (a * (q + 2 * k) + 2 * t * E + 2 * a * h)
    outputs = (2 if cfg.text_dim else 1) * (w * a * q + lse)
    shared = w * (a * k + 2 * a * h + 2 * t * E) + outputs
    # Two gradients of the hidden width and some of the stream's; or a norm's backward, which works in fp32.
    transient = w * max(2 * a * h + (1.4 if flag else 3.2) * t * E, 7.4 * t * E)
    return BlockBytes(kept, w * t * E, products + outputs, shared, transient)


def activation_bytes(cfg: ModelConfig, s: Slice) -> float:
    """Peak bytes of forward and backward of one micro-batch, beside weights and gradients."""
    cfg = resolve(cfg)
    block = block_bytes(cfg, s)
    layers, every = cfg.num_layers, cfg.checkpoint_every
    some = 0 if cfg.checkpointing == "none" else -(-layers // every)
    peak = outside_bytes(cfg, s) + (layers - some) * block.kept + block.transient
    if not some:
        return peak
    selective = cfg.checkpointing == "selective"
    peak += some * (block.input + (block.expensive if selective else 0))
    # One block is recomputed at a time. Where the last one is whole, it is gone by then and leaves its room.
    if (layers - 1) % every == 0:
        peak += block.kept - (block.shared if selective else 0)
    return peak


def outside_bytes(cfg: ModelConfig, s: Slice) -> float:
    """What is kept outside the blocks while these run backward: the rotation. The final norm and the heads are done."""
    return COMPLEX64 * s.attended * (cfg.dim // cfg.num_heads) / 2
