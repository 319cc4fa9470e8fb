"""Rules about what a run starts from: other weights, adapters."""

from __future__ import annotations

from collections.abc import Iterator

from flagdit.config.problems import Problem
from flagdit.config.schema import Recipe

LORA_TARGETS = ("wq", "wk", "wv", "wo", "wk_y", "wv_y", "w1", "w2", "w3")


def start_problems(recipe: Recipe) -> Iterator[Problem]:
    train, lora = recipe.train, recipe.lora
    if train.init_ema is not None and train.init_from is None:
        yield Problem(
            ("train.init_ema", "train.init_from"),
            f"train.init_ema={train.init_ema} has no effect without train.init_from; remove it or name a run",
        )
    if not lora.rank:
        return
    if train.init_from is None:
        yield Problem(
            ("lora.rank", "train.init_from"),
            f"lora.rank={lora.rank} adapts weights, but train.init_from names none; set it to a run folder",
        )
    if unknown := [name for name in lora.targets if name not in LORA_TARGETS]:
        yield Problem(
            ("lora.targets",),
            f"lora.targets={lora.targets} names {', '.join(unknown)}; use some of {', '.join(LORA_TARGETS)}",
        )
    elif not lora.targets:
        yield Problem(("lora.targets",), f"lora.targets is empty; use some of {', '.join(LORA_TARGETS)}")
