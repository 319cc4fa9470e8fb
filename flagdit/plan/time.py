"""Operations, traffic and the time that they take: a roofline with stated efficiencies, not a measurement.

The formulas stand in docs/plan.md. FLOPs are matrix products, 2 for a multiply-add, with bidirectional attention inside
each sample; traffic is what one rank sends in a step, by axis.
"""

from __future__ import annotations

from dataclasses import dataclass

from flagdit.model.flops import forward_flops
from flagdit.plan.gpus import Gpu
from flagdit.plan.memory import FP32, Slice
from flagdit.plan.parameters import Parameters
from flagdit.plan.workload import Workload

MATMUL = 0.70
"""Share of the peak that large bf16 matrix products reach: an assumption, on the careful side."""
ATTENTION = 0.55
"""The same for fused attention: torch's cuDNN kernels, about 550 of an H100's 989 TFLOP/s."""
BANDWIDTH = 0.80
"""Share of a memory's or a link's bandwidth that large transfers reach."""
OVERLAPPED = 0.7
"""Share of the gradient and weight traffic that hides behind backward and forward."""
FUSED_PASSES = {"stream": 20, "heads": 10, "hidden": 8}
"""Passes of a block's fused kernels over its tensors, forward and backward: two gated residuals with norms (4 + 6
each), QK-norm with RoPE (4 + 6), SwiGLU (3 + 5)."""
OPTIMIZER_BYTES = 30
"""Bytes that AdamW moves per parameter: gradient, master, two moments read; three of them and the weight written."""
HOST_BANDWIDTH = 20e9
"""Bytes/s at which a rank's share of the host's memory serves an offloaded optimizer: an assumption."""
REUSED = 1e9
"""Elements of a tensor rank's model up to which ZeRO 3 keeps gathered weights from forward to backward (DeepSpeed's
stage3_max_reuse_distance)."""
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Operations:
    """FLOPs of one optimizer step, over all GPUs.

    Attributes:
        model: forward and backward of the model alone: what MFU counts.
        attention: the part of `model` that is attention between image tokens.
        executed: with what backward computes again: attention scores, checkpointed blocks.
    """

    model: float
    attention: float
    executed: float


def operations_of(work: Workload) -> Operations:
    """The FLOPs of a step."""
    m = work.model
    patches = {next(iter(m.modalities)): work.patches}
    packs = work.data * work.accumulation
    forward = packs * forward_flops(m, work.seqlens, work.text_seqlens, patches)
    attention = packs * 4 * m.num_layers * m.dim * sum(n * n for n in work.seqlens)
    cross = packs * 4 * m.num_layers * m.dim * sum(a * b for a, b in zip(work.seqlens, work.text_seqlens, strict=False))
    # Fused attention computes its scores a second time in backward: 5 products for 2 of the forward, not 4.
    executed = 3 * forward + (attention + cross) / 2
    if m.checkpointing != "none":
        share = -(-m.num_layers // m.checkpoint_every) / m.num_layers
        executed += share * forward if m.checkpointing == "block" else 0
    return Operations(3 * forward, 3 * attention, executed)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in an optimizer step, by axis."""

    tensor: float
    ulysses: float
    ring: float
    shards: float


def traffic_of(work: Workload, parameters: Parameters) -> Traffic:
    """What a rank sends: ring algorithms, where each of N ranks sends (N−1)/N of a gathered or scattered tensor."""
    m, p, s = work.model, work.parallel, Slice.of(work)
    assert m.num_kv_heads
    w, a = work.width, s.attended
    ulysses = p.context // p.ring
    q = m.dim / p.tensor
    k = m.dim // m.num_heads * m.num_kv_heads / p.tensor
    blocks = m.num_layers * work.accumulation
    # Forwards of a block per step: once more where it is recomputed.
    recomputed = -(-m.num_layers // m.checkpoint_every) / m.num_layers if m.checkpointing == "block" else 0
    forwards = 1 + recomputed
    # Two gathers and two scatters forward, the same backward, which gathers both inputs once more; without sequence
    # parallelism two sums each way, which cost as much as a gather and a scatter.
    tensor = _share(p.tensor) * blocks * (4 * forwards + (6 if p.sequence else 4)) * w * a * m.dim
    exchanged = _share(ulysses) * blocks * (forwards + 1) * w * a * (2 * q + 2 * k)
    # Keys and values travel forward and backward, their gradients backward in fp32, each to every other rank.
    passed = blocks * (p.ring - 1) * 2 * a * k * ((forwards + 1) * w + FP32)
    own, n = parameters.per_rank(p.tensor), work.shards
    # DeepSpeed's stages 1 and 2 reduce by all-reduce, which sends twice; 2 and 3 do so in every micro-batch.
    reductions = FP32 * own * {1: 2, 2: 2 * work.accumulation, 3: work.accumulation}.get(p.zero, 2)
    again = 2 if own > REUSED else 1
    gathers = again * work.accumulation if p.zero == 3 else 1
    shards = _share(n) * (reductions + gathers * w * own)
    return Traffic(tensor, exchanged, passed, shards)


def _share(ranks: int) -> float:
    return (ranks - 1) / ranks


@dataclass(frozen=True)
class Time:
    """Predicted seconds of an optimizer step, by what they are spent on, and what follows from them."""

    matmul: float
    attention: float
    memory: float
    communication: float
    optimizer: float
    mfu: float

    @property
    def step(self) -> float:
        return self.matmul + self.attention + self.memory + self.communication + self.optimizer


def time_of(work: Workload, parameters: Parameters, gpu: Gpu, gpus_per_node: int = GPUS_PER_NODE) -> Time:
    """The seconds of a step on so many of these GPUs."""
    m, p, s = work.model, work.parallel, Slice.of(work)
    assert m.ffn_dim
    ops, traffic = operations_of(work), traffic_of(work, parameters)
    peak = gpu.tflops * 1e12 * (1 if work.width == 2 else 0.5)
    again = ops.executed / ops.model
    attention = ops.attention * again / work.gpus / (peak * ATTENTION)
    matmul = (ops.model - ops.attention) * again / work.gpus / (peak * MATMUL)
    passes = FUSED_PASSES["stream"] * s.stream * m.dim
    passes += (FUSED_PASSES["heads"] * m.dim + FUSED_PASSES["hidden"] * m.ffn_dim) * s.attended / p.tensor
    memory = m.num_layers * work.accumulation * passes * work.width / (gpu.bandwidth * BANDWIDTH)

    def seconds(sent: float, inner: int, size: int) -> float:
        # An axis whose ranks lie on one node talks over NVLink; rank numbers run tensor, ulysses, ring, data.
        rate = gpu.link if inner * size <= gpus_per_node else gpu.network
        return sent / (rate * BANDWIDTH)

    ulysses = p.context // p.ring
    waited = seconds(traffic.tensor, 1, p.tensor) + seconds(traffic.ulysses, p.tensor, ulysses)
    # Ring steps hide behind the attention of the step before, where that takes longer.
    passed = max(seconds(traffic.ring, p.tensor * ulysses, p.ring) - attention, 0)
    states = seconds(traffic.shards, p.tensor, work.shards) * (1 - OVERLAPPED)
    own = parameters.per_rank(p.tensor) / (work.shards if p.zero else 1)
    optimizer = own * (OPTIMIZER_BYTES + 12 * work.emas) / (gpu.bandwidth * BANDWIDTH)
    if p.offload:
        optimizer = own * OPTIMIZER_BYTES / HOST_BANDWIDTH
    step = matmul + attention + memory + waited + passed + states + optimizer
    mfu = ops.model / (step * peak * work.gpus)
    return Time(matmul, attention, memory, waited + passed + states, optimizer, mfu)
