"""Adapters: nothing at first, only they train, and merged weights act as they do."""

import pytest
import torch
from torch import nn

from flagdit.batch import PackedText, Segment
from flagdit.checkpoint.tensors import InMemory
from flagdit.checkpoint.weights import merge_adapters
from flagdit.config.schema import LoraConfig, ModelConfig
from flagdit.errors import CheckpointError
from flagdit.model.flag_dit import FlagDiT
from flagdit.model.initialize import initial_value
from flagdit.model.lora import LoraLinear, add_adapters, is_adapter
from flagdit.model.tokens import TokenSpec, pack

CFG = ModelConfig(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=48, text_dim=12)
ALL = ["wq", "wk", "wv", "wo", "wk_y", "wv_y", "w1", "w2", "w3"]


def random_model() -> FlagDiT:
    model = FlagDiT(CFG)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def velocity(model: FlagDiT) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = [torch.randn(3, 1, 4, 6, generator=generator) for _ in range(2)]
    segments = [Segment(i, "image", (3, 1, 4, 6)) for i in range(2)]
    text = PackedText.pack([torch.randn(n, 12, generator=generator) for n in (3, 5)])
    batch = pack(segments, latents, TokenSpec.from_model(CFG), text=text)
    return model(batch.patches, torch.tensor([0.3, 0.8]), batch)["image"]


@torch.no_grad()
def fill(model: FlagDiT, b: float) -> None:
    for name, p in model.named_parameters():
        if is_adapter(name):
            p.copy_(initial_value(name, p.shape, 0))
            if name.endswith("lora_b.weight"):
                p.add_(b * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))


def test_fresh_adapters_change_nothing():
    model = random_model()
    before = velocity(model)
    add_adapters(model, LoraConfig(rank=3, targets=ALL))
    fill(model, 0)
    assert torch.equal(velocity(model), before)


@pytest.mark.parametrize("targets", [["wq"], ["wo", "w2"], ALL])
def test_only_adapters_of_the_targets_train(targets):
    model = random_model()
    add_adapters(model, LoraConfig(rank=3, targets=targets))
    fill(model, 0.1)
    velocity(model).square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    expected = {
        f"blocks.{i}.{'attention' if t[1] not in '123' else 'feed_forward'}.{t}.lora_{ab}.weight"
        for i in range(2)
        for t in targets
        for ab in "ab"
    }
    assert trained == expected == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    plain = {name for name, _ in random_model().named_parameters()}
    assert {name for name, _ in model.named_parameters()} == plain | expected, "the weights keep their names"


@torch.no_grad()
def test_merged_weights_act_as_layer_and_adapter():
    cfg = LoraConfig(rank=3, alpha=6.0, targets=ALL)
    model = random_model()
    plain = velocity(model)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    add_adapters(model, cfg)
    fill(model, 0.1)
    adapted = velocity(model)
    assert (adapted - plain).abs().max() > 0.01 * plain.abs().max(), "the adapters do something"
    adapters = {name: p for name, p in model.named_parameters() if is_adapter(name)}
    merged = FlagDiT(CFG)
    merged.load_state_dict(dict(merge_adapters(InMemory(base), InMemory(adapters), cfg).items()))
    torch.testing.assert_close(velocity(merged), adapted, rtol=1e-5, atol=1e-5)


def test_the_layer_is_the_formula_of_the_paper():
    base = nn.Linear(5, 7)
    layer = LoraLinear(base, LoraConfig(rank=2, alpha=8.0))
    x = torch.randn(4, 5)
    wanted = base(x) + 8 / 2 * x @ layer.lora_a.weight.T @ layer.lora_b.weight.T
    torch.testing.assert_close(layer(x), wanted)
    assert layer.weight is base.weight and layer.bias is base.bias


def test_adapters_of_another_model_are_refused():
    adapters = {"blocks.9.wq.lora_a.weight": torch.zeros(1, 2), "blocks.9.wq.lora_b.weight": torch.zeros(2, 1)}
    with pytest.raises(CheckpointError, match=r"adapters for blocks.9.wq.weight"):
        merge_adapters(InMemory({"blocks.0.wq.weight": torch.zeros(2, 2)}), InMemory(adapters), LoraConfig(rank=1))
