"""The tensor-parallel plan names every part of a block."""

from fnmatch import fnmatch

import pytest
import torch
from torch import nn

from flagdit.config.schema import ModelConfig
from flagdit.model.attention import QKNorm
from flagdit.model.block import TP_PLAN
from flagdit.model.flag_dit import FlagDiT


def matches(name: str) -> list[str]:
    return [pattern for pattern in TP_PLAN if fnmatch(name, pattern)]


@pytest.mark.parametrize("block", ["flag", "next"])
def test_every_linear_of_a_block_is_in_the_plan(block):
    shape = {"block": block, "dim": 64, "num_layers": 2, "num_heads": 4}
    with torch.device("meta"):
        model = FlagDiT(ModelConfig(**shape, text_dim=8))
        classes = FlagDiT(ModelConfig(**shape, text_dim=0, num_classes=3))
    used = set()
    for name, module in [*model.named_modules(), *classes.named_modules()]:
        used |= set(matches(name))
        if isinstance(module, nn.Linear | QKNorm) and (name.startswith("blocks.") or "adaLN" in name):
            assert len(matches(name)) == 1, name
    for name, _ in model.named_parameters():
        used |= set(matches(name))
    assert used == set(TP_PLAN), "the plan names modules that do not exist"


def test_split_shapes_are_what_the_plan_says():
    with torch.device("meta"):
        model = FlagDiT(ModelConfig(dim=64, num_layers=1, num_heads=8, num_kv_heads=4, text_dim=8, ffn_dim=96))
    for name, module in model.named_modules():
        for kind in (TP_PLAN[pattern] for pattern in matches(name)):
            if kind in ("column", "column_gather"):
                assert module.weight.shape[0] % 4 == 0, name
            if kind == "row":
                assert module.weight.shape[1] % 4 == 0, name
                assert module.bias is None, "a row-parallel bias would be added once a rank"
