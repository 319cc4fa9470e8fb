"""How many bytes the kernels move, counted from the arguments of their launches, against the least that is possible.

    python -m flagdit.kernels.traffic [--tokens 131072]

The floor of an operation is one pass over every large tensor that it must read or write. What comes on top: the vectors
that every program reads, partial sums, statistics of rows, angles. Repeated reads count in full, though caches serve
them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flagdit.kernels.language import Launch
from flagdit.kernels.shipped import SHAPES, Pass, Shape, activations, modulated_norms, rotations

# Of these every program reads one row, or all of a vector.
SHARED = ("weight", "f_weight", "q_weight", "k_weight", "bias", "gate", "shift", "scale", "frequency")
ANGLES = ("cos", "sin", "position", "frequency")

FLOORS = {
    ("rms_norm_modulate", "forward"): 2,
    ("rms_norm_modulate", "backward"): 3,
    ("rms_norm_modulate_residual", "backward"): 4,
    ("gated_residual_norm", "forward"): 4,
    ("gated_residual_norm", "backward"): 6,
    ("gated_residual", "forward"): 3,
    ("gated_residual", "backward"): 3,
    ("qk_norm_rope", "forward"): 4,
    ("qk_norm_rope", "backward"): 6,
    ("layer_norm_rope", "forward"): 2,
    ("layer_norm_rope", "backward"): 3,
    ("rope", "forward"): 2,
    ("swiglu", "forward"): 3,
    ("swiglu", "backward"): 5,
}
"""Operation and direction → passes over its large tensor: (T, D), one of queries and keys, or (T, F)."""


def bytes_of(launch: Launch) -> int:
    """Bytes that one launch reads and writes."""
    # Backward of queries and keys goes through the tokens twice, and reads their angles each time.
    twice = ANGLES if launch.name == "qk_norm_rope_backward_kernel" else ()
    total = 0
    for name, value in launch.args.items():
        if not isinstance(value, Tensor):
            continue
        if name == "offsets":
            count = 2 * launch.grid
        elif name in SHARED:
            count = value.shape[-1] * launch.grid
        else:
            count = value.numel()
        total += count * value.element_size() * (2 if name in twice else 1)
    return total


def bytes_of_pass(one: Pass) -> int:
    """Bytes of all its launches, and of the sum of partial gradients where torch takes it."""
    last = one.launches[-1]
    parts = last.args.get("parts")
    after = 0 if parts is None or last.name == "segment_sums_kernel" else parts.numel() * parts.element_size()
    return sum(map(bytes_of, one.launches)) + after


@dataclass(frozen=True)
class Row:
    """Bytes of one pass.

    Attributes:
        operation, direction: of the pass.
        moved: bytes.
        floor: bytes that cannot be avoided.
    """

    operation: str
    direction: str
    moved: int
    floor: int

    @property
    def ratio(self) -> float:
        return self.moved / self.floor


def rows(shape: Shape, tokens: int, dtype: torch.dtype = torch.bfloat16) -> Iterator[Row]:
    """Every operation with a floor, as blocks of this shape call it; queries and keys have equally many heads."""
    assert shape.num_heads == shape.num_kv_heads
    passes = [*modulated_norms(shape, tokens, dtype), *rotations(shape, tokens, dtype)]
    for width, group in ((shape.dim, passes), (shape.ffn_dim, list(activations(shape, tokens, dtype)))):
        for one in group:
            if (floor := FLOORS.get((one.operation, one.direction))) is not None:
                least = floor * tokens * width * dtype.itemsize
                yield Row(one.operation, one.direction, bytes_of_pass(one), least)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131072, help="of the pack (default: 131072)")
    parser.add_argument("--size", default="7b", choices=[n for n, s in SHAPES.items() if s.num_heads == s.num_kv_heads])
    chosen = parser.parse_args()
    print(f"{chosen.size}, {chosen.tokens:,} tokens, bf16")
    print(f"{'operation':<36}{'GB moved':>10}{'floor':>10}{'ratio':>8}")
    for row in rows(SHAPES[chosen.size], chosen.tokens):
        name = f"{row.operation} {row.direction}"
        print(f"{name:<36}{row.moved / 1e9:>10.3f}{row.floor / 1e9:>10.3f}{row.ratio:>8.3f}")


if __name__ == "__main__":
    main()
