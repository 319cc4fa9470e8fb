"""The fused kernels and the same operations by other hands (`contestants.py`): right at real sizes, and how fast."""

from __future__ import annotations

from typing import Any

import torch
from clock import Clock, cell, ratio
from contestants import EPS, REAL, TINY, Operation, Pack, Sizes
from torch import Tensor

from flagdit.kernels import gated_residual_norm as gated
from flagdit.kernels import qk_norm_rope as qk
from flagdit.kernels import rms_norm_modulate as norm
from flagdit.kernels import swiglu
from flagdit.kernels.rope import Angles, frequencies
from flagdit.kernels.segments import Segments

GOALS = {"rms_norm_modulate": (0.9, 0.8), "gated_residual_norm": (0.88, 0.8), "qk_norm_rope": (0.85, 0.75),
         "swiglu": (0.92, 0.9)}  # fmt: skip
"""Least share of the copy rate, forward and backward, on an H200 at 131,072 × 4096."""
COMPILE_GOAL = 1.3
"""How many times faster than torch.compile all of a block's memory-bound operations together."""
LARGEST_ERROR = {torch.bfloat16: 5e-3, torch.float32: 1e-5}


def make_leaves(operation: Operation, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in operation.shapes]


def largest_error(operation: Operation, device: torch.device, dtype: torch.dtype) -> float:
    """Largest relative error in norm, ‖got − want‖/‖want‖, of all outputs and gradients against the reference in fp32
    on the same numbers."""
    leaves = make_leaves(operation, device, dtype)
    wide = [x.detach().float().requires_grad_() for x in leaves]
    got, want = operation.contestants["fused"](*leaves), operation.reference(*wide)
    got, want = (y if isinstance(y, tuple) else (y,) for y in (got, want))
    upstream = [torch.randn_like(y) for y in got]
    got = [*got, *torch.autograd.grad(got, leaves, upstream)]
    want = [*want, *torch.autograd.grad(want, wide, [u.float() for u in upstream])]
    errors = [((g.float() - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True)]
    return max(float("inf") if e != e else e for e in errors)


@torch.no_grad()
def far_offsets(sizes: Sizes, device: torch.device) -> dict[str, float]:
    """Error of the last rows of tensors with more than 2³¹ elements, of kernels that go through them in one pass."""
    tail = min(2048, sizes.tokens)
    tokens = tail if sizes is TINY else 2**31 // sizes.width + tail
    x = torch.randn(tokens, sizes.width, device=device, dtype=torch.bfloat16)
    segments, last = Segments.build([tokens - tail, tail], device), Segments.build([tail], device)
    weight, scale = (torch.randn(n, sizes.width, device=device, dtype=x.dtype) for n in (1, 2))
    position = torch.arange(tokens, device=device)[:, None]
    frequency = frequencies(sizes.head_dim, 1, 1e4, device)
    q = x.unflatten(1, (-1, sizes.head_dim))
    head_weight = torch.ones(sizes.head_dim, device=device, dtype=x.dtype)

    def error(got: Tensor, want: Tensor) -> float:
        return ((got[-tail:].float() - want).norm() / want.norm()).item()

    end = x[-tail:].float()
    y = norm.rms_norm_modulate(x, weight[0], None, scale, segments, EPS, "triton")
    errors = {"rms_norm_modulate": error(y, norm.reference(end, weight[0], None, scale[1:], last, EPS))}
    y = gated.gated_residual(x, x, scale, segments, EPS, backend="triton")
    errors["gated_residual"] = error(y, gated.reference(end, end, scale[1:], None, last, EPS))
    del y
    y = swiglu.swiglu(x, x, "triton")
    errors["swiglu"] = error(y, swiglu.reference(end, end))
    del y
    angles = Angles(position_TA=position, frequency_R=frequency)
    ends = Angles(position_TA=position[-tail:], frequency_R=frequency)
    y = qk.qk_norm_rope(q, q[:1].expand_as(q[:tokens]), head_weight, head_weight, angles, EPS, "triton")[0]
    errors["qk_norm_rope"] = error(y, qk.reference(q[-tail:].float(), head_weight, ends, EPS))
    return errors


def measure(clock: Clock, copy_rate: float | None) -> dict[str, Any]:
    """Checks and times; prints the tables."""
    device, sizes = clock.device, TINY if clock.dry else REAL
    dtype = torch.float32 if clock.dry else torch.bfloat16
    found: dict[str, Any] = {"sizes": vars(sizes), "errors": {}, "times_ms": {}, "skipped": [], "goals": {}}
    found["errors_of_last_rows"] = far_offsets(sizes, device)
    clock.release()
    print(f"\n{'operation':<22}{'contestant':<12}{'fwd ms':>9}{'bwd ms':>9}{'fwd/copy':>10}{'bwd/copy':>10}")
    for one in Pack(sizes, device, "eager" if clock.dry else "inductor").operations():
        if clock.out_of_time:
            found["skipped"].append(one.name)
            continue
        found["errors"][one.name] = largest_error(one, device, dtype)
        clock.release()
        leaves = make_leaves(one, device, dtype)
        found["times_ms"][one.name] = times = {}
        for name, function in one.contestants.items():
            times[name] = clock.forward_backward(function, leaves)
            shares = shares_of_copy(one, times[name], dtype, copy_rate)
            milliseconds, percent = (f"{cell(x):>9}" for x in times[name]), (f"{cell(x, '.0%'):>10}" for x in shares)
            print(f"{one.name:<22}{name:<12}", *milliseconds, *percent, sep="")
            if name == "fused" and one.name in GOALS:
                found["goals"][one.name] = {"wanted": GOALS[one.name], "reached": shares}
        del leaves
        clock.release()
    found["compiled_over_fused"] = ratio(total(found, "compiled"), total(found, "fused"))
    print(f"all of them, compiled over fused: {cell(found['compiled_over_fused'], '.2f')} (goal: {COMPILE_GOAL})")
    report_errors(found, dtype)
    return found


def shares_of_copy(
    one: Operation, times: tuple[float | None, float | None], dtype: torch.dtype, copy_rate: float | None
) -> list[float | None]:
    """Of the copy rate, forward and backward: bytes that cannot be avoided over the time taken."""
    least = [None if copy_rate is None else n * one.large * dtype.itemsize / copy_rate / 1e6 for n in one.passes]
    return [ratio(floor, taken) for floor, taken in zip(least, times, strict=True)]


def total(found: dict[str, Any], name: str) -> float | None:
    """Milliseconds of all operations, both directions; None if one is missing."""
    times = [t for contestants in found["times_ms"].values() for t in contestants[name]]
    return None if found["skipped"] or None in times else sum(times)


def report_errors(found: dict[str, Any], dtype: torch.dtype) -> None:
    """Prints errors; a wrong kernel ends the benchmark, for its times mean nothing."""
    print("\nrelative errors against fp32: " + ", ".join(f"{n} {e:.1e}" for n, e in found["errors"].items()))
    print(
        "last rows, beyond 2³¹ elements at real sizes: "
        + ", ".join(f"{n} {e:.1e}" for n, e in found["errors_of_last_rows"].items())
    )
    bad = [n for n, e in found["errors"].items() if not e < LARGEST_ERROR[dtype]]
    bad += [n for n, e in found["errors_of_last_rows"].items() if not e < LARGEST_ERROR[torch.bfloat16]]
    if bad:
        raise SystemExit(f"WRONG RESULTS: {', '.join(bad)}")
