"""Ring attention (arXiv 2310.01889) over packs of samples: keys and values travel, queries stay.

Rank r holds the r-th of equal ranges of the pack. In step s it attends to the keys of rank r − s, received from there
directly, while those of step s + 1 are under way; partial results are merged by their log-sum-exp. A range of keys is
sent only to ranks whose queries share a sample with it: all ranks know the pack, so they agree without asking. Backward
runs the same schedule and sends the gradients of keys and values home.

Shape legend
    t        tokens of one range
    H, K, D  query heads, key/value heads, channels of a head
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flagdit.parallel.mesh import Axis


@dataclass(frozen=True)
class Schedule:
    """Who attends to whom.

    Attributes:
        axis: the ring.
        spans: for each range, the tokens of each sample in it.
        pairs: of the whole pack; gives the type of the pairs of two ranges.
    """

    axis: Axis
    spans: tuple[tuple[int, ...], ...]
    pairs: Any
    _local: dict[int, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, pairs: Any, axis: Axis) -> Schedule:
        """From the pairs of the whole pack, whose tokens are a multiple of the ring's size."""
        ends = list(accumulate(pairs.seqlens_q))
        part = ends[-1] // axis.size
        assert part * axis.size == ends[-1], "the pack is not padded to equal parts"
        lengths = list(zip(pairs.seqlens_q, ends, strict=True))
        spans = tuple(
            tuple(max(0, min(end, (r + 1) * part) - max(end - n, r * part)) for n, end in lengths)
            for r in range(axis.size)
        )
        return cls(axis, spans, pairs)

    def needs(self, queries: int, keys: int) -> bool:
        """Whether a sample has tokens in both ranges."""
        return any(q and k for q, k in zip(self.spans[queries], self.spans[keys], strict=True))

    def local_pairs(self, keys: int) -> Any:
        """Pairs of this rank's queries and another range's keys; made once."""
        if keys not in self._local:
            self._local[keys] = self._make_pairs(keys)
        return self._local[keys]

    def _make_pairs(self, keys: int) -> Any:
        queries, device = self.spans[self.axis.rank], self.pairs.cu_seqlens_q.device

        def offsets(lengths: tuple[int, ...]) -> Tensor:
            return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32).to(device)

        spans = self.spans[keys]
        return replace(
            self.pairs,
            seqlens_q=queries,
            seqlens_k=spans,
            cu_seqlens_q=offsets(queries),
            cu_seqlens_k=offsets(spans),
        )

    def exchange(self, step: int, mine: Tensor, home: bool = False) -> tuple[Tensor | None, list[dist.Work]]:
        """Starts step `step`: sends `mine` to the rank `step` ahead and receives from the one `step` behind, or with
        `home` the other way round, each only where it is needed.

        Returns:
            What will have been received when the works are done; None where nothing is.
        """
        size, rank = self.axis.size, self.axis.rank
        ahead, behind = (rank + step) % size, (rank - step) % size
        operations, received = [], None
        if home:
            # `mine` is for the owner of the keys, behind; this rank's keys were read by the rank ahead.
            to, source, send, receive = behind, ahead, self.needs(rank, behind), self.needs(ahead, rank)
        else:
            to, source, send, receive = ahead, behind, self.needs(ahead, rank), self.needs(rank, behind)
        group = self.axis.group
        if send:
            operations.append(dist.P2POp(dist.isend, mine, group=group, group_peer=to))
        if receive:
            received = torch.empty_like(mine)
            operations.append(dist.P2POp(dist.irecv, received, group=group, group_peer=source))
        return received, dist.batch_isend_irecv(operations) if operations else []


class RingAttention:
    """softmax(q·kᵀ/√D)·v inside each sample of a pack that lies on the ranks of a ring.

    Args:
        attention: offers forward(q, k, v, pairs) → (out, lse) and backward(grad, q, k, v, out, lse, pairs) → (dq, dk,
            dv).
        axis: the ring.
    """

    def __init__(self, attention: Any, axis: Axis):
        self.attention, self.axis = attention, axis
        self._schedule: Schedule | None = None

    def __call__(self, q_tHD: Tensor, k_tKD: Tensor, v_tKD: Tensor, pairs: Any) -> Tensor:
        """(t, H, D) for this rank's range. `pairs` are those of the whole pack."""
        # All blocks of a forward bring the same pairs.
        if self._schedule is None or self._schedule.pairs is not pairs:
            self._schedule = Schedule.of(pairs, self.axis)
        return _Ring.apply(q_tHD, k_tKD, v_tKD, self.attention, self._schedule)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, attention: Any, schedule: Schedule) -> Tensor:
        kv = torch.stack([k, v])
        merged: tuple[Tensor, Tensor] | None = None

        def attend(keys: int, kv: Tensor) -> None:
            nonlocal merged
            part = attention.forward(q, kv[0], kv[1], schedule.local_pairs(keys))
            merged = part if merged is None else merge(*merged, *part)

        _walk(schedule, kv, attend)
        assert merged is not None
        out, lse = merged[0].to(q.dtype), merged[1]
        ctx.save_for_backward(q, kv, out, lse)
        ctx.attention, ctx.schedule = attention, schedule
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, out, lse = ctx.saved_tensors
        schedule, attention = ctx.schedule, ctx.attention
        grad = grad.contiguous()
        dq = torch.zeros_like(q, dtype=torch.float32)
        dkv = torch.zeros_like(kv, dtype=torch.float32)
        homebound: list[tuple[Tensor | None, list[dist.Work], Tensor]] = []

        def attend(keys: int, kv: Tensor) -> None:
            part_q, *part_kv = attention.backward(grad, q, kv[0], kv[1], out, lse, schedule.local_pairs(keys))
            dq.add_(part_q)
            step = (schedule.axis.rank - keys) % schedule.axis.size
            if step == 0:
                dkv.add_(torch.stack(part_kv))
            else:
                outgoing[step] = torch.stack(part_kv).float()

        outgoing: dict[int, Tensor] = {}

        def after(step: int) -> None:
            # All ranks send the gradients of one step home together, needed here or not.
            mine = outgoing.pop(step, dkv)
            homebound.append((*schedule.exchange(step, mine, home=True), mine))

        _walk(schedule, kv, attend, after)
        for received, works, _ in homebound:
            for work in works:
                work.wait()
            if received is not None:
                dkv.add_(received)
        return dq.to(q.dtype), dkv[0].to(kv.dtype), dkv[1].to(kv.dtype), None, None


def _walk(
    schedule: Schedule,
    kv: Tensor,
    attend: Callable[[int, Tensor], None],
    after: Callable[[int], None] | None = None,
) -> None:
    """Calls attend(range, its keys and values) for every range that this rank's queries need, its own first; the next
    range travels while the present one is worked on. after(step) follows each step but the first."""
    size, rank = schedule.axis.size, schedule.axis.rank
    arriving = schedule.exchange(1, kv)
    attend(rank, kv)
    for step in range(1, size):
        received, works = arriving
        for work in works:
            work.wait()
        if step + 1 < size:
            arriving = schedule.exchange(step + 1, kv)
        if received is not None:
            attend((rank - step) % size, received)
        if after:
            after(step)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys → attention over both.

    Args:
        out_a, out_b: (t, H, D).
        lse_a, lse_b: (t, H) fp32 log-sum-exp of the logits; −inf where a query has no key in the set.

    Returns:
        fp32 output and log-sum-exp.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    safe = torch.where(lse.isneginf(), 0.0, lse)
    weight_a, weight_b = (torch.exp(part - safe)[..., None] for part in (lse_a, lse_b))
    return weight_a * out_a.float() + weight_b * out_b.float(), lse
