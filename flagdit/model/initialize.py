"""The initial value of every parameter: a function of the seed and the parameter's name.

Nothing else enters: not the order of construction, the device, the dtype or the number of ranks.
"""

from __future__ import annotations

import hashlib
import math
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

# First match wins; a parameter that no rule names is an error, never left as allocated.
RULES: list[tuple[str, str]] = [
    # Adapters start as no change at all.
    ("*.lora_a.weight", "xavier"),
    ("*.lora_b.weight", "zeros"),
    # adaLN-zero: every block starts as the identity, and the velocity as zero.
    ("*adaLN_modulation.*", "zeros"),
    ("heads.*", "zeros"),
    ("*.attention.gate", "zeros"),
    ("*norm*.weight", "ones"),
    ("*bias", "zeros"),
    ("nextline", "normal"),
    ("nextframe", "normal"),
    ("t_embedder.mlp.*.weight", "normal"),
    ("text_pooler.proj.weight", "normal"),
    ("y_embedder.table.weight", "normal"),
    ("stems.*.weight", "xavier"),
    ("blocks.*.attention.w*.weight", "xavier"),
    ("blocks.*.feed_forward.w*.weight", "xavier"),
]
NORMAL_STD = 0.02


def initial_value(name: str, shape: torch.Size, seed: int) -> Tensor:
    """The whole fp32 parameter of that name, on the CPU; ranks that hold a part of it take theirs from here."""
    rule = next((rule for pattern, rule in RULES if fnmatch(name, pattern)), None)
    assert rule is not None, f"no rule initializes the parameter {name}"
    if rule in ("zeros", "ones"):
        return torch.full(shape, float(rule == "ones"))
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    if rule == "normal":
        return torch.empty(shape).normal_(0, NORMAL_STD, generator=generator)
    bound = math.sqrt(6 / sum(shape))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Gives every parameter its initial value. A model built on the meta device needs `to_empty` first."""
    for name, parameter in model.named_parameters():
        assert not parameter.is_meta, f"{name} has no memory: call model.to_empty(device=...) first"
        parameter.copy_(initial_value(name, parameter.shape, seed))


def count_parameters(model: nn.Module) -> int:
    """All parameters; a model built on the meta device will do."""
    return sum(p.numel() for p in model.parameters())
