"""A tiny model on every mesh of some ranks against one process: losses, gradients, averages and three optimizer steps.

    python benchmarks/parity.py [--ranks 2,4] [--brief] [--only "TP2 SP"] [--out FILE]

Eight uneven pictures and videos with captions make a global batch. The columns are the largest relative differences:
of a loss, of a gradient norm, of any parameter's gradient, and of any weight, moment or average after three steps.
A parameter whose gradient is zero but for rounding (the bias of normed keys moves no softmax) is compared on the scale
of the whole gradient. bf16 is held against one bf16 process, to looser bounds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from _conditions import write_result
from _parity_ranks import Case, cases
from safetensors.torch import load_file

from flagdit.launch.local import free_port, rank_environment
from flagdit.launch.processes import run_ranks

BOUNDS = {"loss": 1e-6, "norm": 1e-6, "gradient": 1e-5, "state": 1e-5}
BF16_BOUNDS = {"loss": 2e-2, "norm": 2e-2, "gradient": 0.2, "state": 0.1}
SMALL = 1e-3
"""Share of the whole gradient's norm below which a parameter's own gradient is no scale."""


@dataclass(frozen=True)
class Row:
    """Largest relative differences of one case."""

    case: Case
    loss: float
    norm: float
    gradient: float
    state: float
    worst: str

    @property
    def bounds(self) -> dict[str, float]:
        return BF16_BOUNDS if self.case.precision == "bf16" else BOUNDS

    @property
    def good(self) -> bool:
        return all(getattr(self, name) <= bound for name, bound in self.bounds.items())


def compare(case: Case, folder: Path) -> Row:
    """What a case left in the folder against its reference."""
    numbers, tensors = read(case, folder)
    expected, wanted = read(case.reference, folder)
    assert tensors.keys() == wanted.keys(), f"{case.name}: other tensors than one process has"
    whole = torch.stack([w.norm() for name, w in wanted.items() if name.startswith("gradient ")]).norm()

    def worst_of(*kinds: str) -> tuple[float, str]:
        found = [(0.0, "")]
        for name, want in wanted.items():
            kind = name.split()[0]
            if kind in kinds:
                floor = SMALL * whole if kind in ("gradient", "moment") else 1e-12
                found.append((((tensors[name] - want).norm() / want.norm().clamp(min=floor)).item(), name))
        return max(found)

    def off(*names: str) -> float:
        pairs = [pair for name in names for pair in zip(numbers[name], expected[name], strict=True)]
        return max(abs(a - b) / abs(b) for a, b in pairs)

    gradient, where = worst_of("gradient")
    state, _ = worst_of("weight", "average", "moment")
    return Row(case, off("loss", "ema_loss"), off("grad_norm"), gradient, state, where.removeprefix("gradient "))


def read(case: Case, folder: Path) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    return json.loads((folder / f"{case.name}.json").read_text()), load_file(folder / f"{case.name}.safetensors")


def start(ranks: int, folder: Path, brief: bool, only: str, tell: Callable[[str], None]) -> None:
    """Runs all cases of that many ranks."""
    script = Path(__file__).with_name("_parity_ranks.py")
    argv = [
        sys.executable,
        str(script),
        str(ranks),
        str(folder),
        "brief" if brief else "all",
        only if ranks > 1 else "",
    ]
    port = free_port()
    path = os.pathsep.join([str(script.parents[1]), os.environ.get("PYTHONPATH", "")])

    def environment(rank: int) -> dict[str, str]:
        # For the cases on fused kernels: ranks compute on the CPU, where Triton interprets.
        return {**rank_environment(rank, ranks, port), "PYTHONPATH": path, "TRITON_INTERPRET": "1"}

    code = run_ranks(argv, ranks, folder / f"logs_{ranks}", environment, tell)
    assert code == 0, f"{ranks} ranks ended with {code}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", default="2,4", help="numbers of ranks (default: 2,4)")
    parser.add_argument("--brief", action="store_true", help="one or two micro-batches in turn instead of both")
    parser.add_argument("--only", default="", help="cases whose names hold all these words")
    parser.add_argument("--out", type=Path, help="also write figures and conditions to this file")
    args = parser.parse_args()
    worlds = [int(n) for n in args.ranks.split(",")]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for ranks in (1, *worlds):
            start(ranks, Path(name), args.brief, args.only, lambda line: print(line, file=sys.stderr))
            wanted = [case for case in cases(ranks, args.brief) if all(word in case.name for word in args.only.split())]
            rows += [compare(case, Path(name)) for case in wanted if ranks > 1]
    print(f"{'case':<52}{'loss':>9}{'norm':>9}{'gradient':>10}{'3 steps':>9}")
    for row in rows:
        mark = "" if row.good else f"  too large ({row.worst})"
        print(f"{row.case.name:<52}{row.loss:>9.0e}{row.norm:>9.0e}{row.gradient:>10.0e}{row.state:>9.0e}{mark}")
    exact = [row for row in rows if row.case.precision == "fp32"]
    figures = {
        "cases": len(rows),
        "failed": sum(not row.good for row in rows),
        "worst_loss": max((row.loss for row in exact), default=0.0),
        "worst_grad": max((row.gradient for row in exact), default=0.0),
        "worst_state": max((row.state for row in exact), default=0.0),
    }
    if args.out:
        write_result(args.out, figures, ("torch", "megatron-core", "deepspeed"), ranks=args.ranks, only=args.only)
    print(json.dumps(figures))
    sys.exit(1 if figures["failed"] or not rows else 0)


if __name__ == "__main__":
    main()
