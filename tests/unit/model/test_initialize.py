"""Every parameter gets a value, a function of the seed and its name alone."""

import pytest
import torch
from torch import nn

from flagdit.config.schema import ModelConfig
from flagdit.model.flag_dit import FlagDiT
from flagdit.model.initialize import initial_value, initialize

CONFIGS = {
    "text": ModelConfig(dim=32, num_layers=2, num_heads=4, text_dim=8, modalities={"image": 4, "video": 3}),
    "classes": ModelConfig(dim=32, num_layers=2, num_heads=4, text_dim=0, num_classes=5, qk_norm="layer"),
    "next": ModelConfig(block="next", dim=32, num_layers=2, num_heads=4, num_kv_heads=2, text_dim=8, qk_norm="none"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_no_parameter_is_left_as_allocated(name):
    model = FlagDiT(CONFIGS[name])
    for parameter in model.parameters():
        nn.init.constant_(parameter, torch.nan)
    initialize(model, seed=1)
    for parameter in model.parameters():
        assert parameter.isfinite().all()
    assert not list(model.buffers()), "state outside the parameters would not be initialized"


def test_seed_and_name_decide():
    first, second, other = (FlagDiT(CONFIGS["text"]) for _ in range(3))
    torch.manual_seed(5)
    initialize(first, seed=1)
    torch.manual_seed(6)
    initialize(second, seed=1)
    initialize(other, seed=2)
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(a, c) == (a.unique().numel() == 1), name
    w1, w3 = first.blocks[0].feed_forward.w1.weight, first.blocks[0].feed_forward.w3.weight
    assert not torch.equal(w1, w3)
    assert torch.equal(w1, initial_value("blocks.0.feed_forward.w1.weight", w1.shape, 1))


def test_meta_device_then_memory_equals_the_direct_way():
    direct = FlagDiT(CONFIGS["next"])
    initialize(direct, seed=3)
    with torch.device("meta"):
        model = FlagDiT(CONFIGS["next"])
    with pytest.raises(AssertionError, match="to_empty"):
        initialize(model, seed=3)
    model.to_empty(device="cpu")
    initialize(model, seed=3)
    for a, b in zip(direct.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_dtype_rounds_the_same_values():
    model = FlagDiT(CONFIGS["text"]).bfloat16()
    initialize(model, seed=1)
    weight = model.blocks[1].attention.wq.weight
    assert torch.equal(weight, initial_value("blocks.1.attention.wq.weight", weight.shape, 1).bfloat16())


def test_a_parameter_without_a_rule_is_an_error():
    class Researcher(nn.Module):
        def __init__(self):
            super().__init__()
            self.idea = nn.Parameter(torch.empty(3))

    with pytest.raises(AssertionError, match="idea"):
        initialize(Researcher(), seed=0)


def test_adaLN_gates_and_heads_start_at_zero():
    model = FlagDiT(CONFIGS["text"])
    initialize(model, seed=0)
    for name, parameter in model.named_parameters():
        zero = any(part in name for part in ("adaLN", "heads.", ".gate")) or name.endswith("bias")
        assert (parameter.count_nonzero() == 0) == zero, name
