"""The network over packed tokens: variants, independence of samples, inference settings, checkpointing, learning."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flagdit.batch import PackedText, Segment, concat
from flagdit.config.schema import FlowConfig, ModelConfig
from flagdit.errors import DataError
from flagdit.flow.objective import FlowMatching
from flagdit.flow.path import draw_path
from flagdit.model.flag_dit import FlagDiT, Inference
from flagdit.model.initialize import initialize
from flagdit.model.rope import RopeScaling
from flagdit.model.tokens import TokenSpec, pack

BASE = ModelConfig(dim=48, num_layers=2, num_heads=4, ffn_dim=64, text_dim=10, modalities={"image": 4, "video": 3})
SHAPES = [("image", (4, 1, 4, 6)), ("video", (3, 2, 4, 4)), ("image", (4, 1, 4, 6)), ("image", (4, 1, 8, 4))]


def make_model(cfg: ModelConfig, seed: int = 0) -> FlagDiT:
    """A network none of whose parameters is at its neutral starting value."""
    model = FlagDiT(cfg)
    initialize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def make_batch(cfg: ModelConfig, which=range(4)):
    generator = torch.Generator().manual_seed(1)
    latents = [torch.randn(shape, generator=generator) for _, shape in SHAPES]
    text = [torch.randn(n, cfg.text_dim, generator=generator) for n in (3, 1, 5, 3)] if cfg.text_dim else None
    segments = [Segment(i, *SHAPES[i]) for i in which]
    return pack(
        segments,
        [latents[i] for i in which],
        TokenSpec.from_model(cfg),
        text=text and PackedText.pack([text[i] for i in which]),
        labels=list(which) if cfg.num_classes else None,
    )


def times(which=range(4)) -> torch.Tensor:
    return torch.tensor([0.1, 0.35, 0.6, 0.9])[list(which)]


VARIANTS = {
    "defaults": {},
    "next, grouped queries": {"block": "next", "num_kv_heads": 2, "nextline": False, "nextframe": False},
    "raster": {"rope": "raster", "qk_norm": "layer"},
    "three axes": {"rope_axes": 3, "qk_norm": "none"},
    "classes": {"text_dim": 0, "num_classes": 4},
    "unconditional": {"text_dim": 0, "learn_sigma": True},
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)


@each_variant
def test_every_parameter_learns_and_shapes_are_kept(variant):
    cfg = replace(BASE, **VARIANTS[variant])
    model, batch = make_model(cfg), make_batch(cfg)
    velocity = model(batch.patches, times(), batch)
    assert {m: v.shape for m, v in velocity.items()} == {m: x.shape for m, x in batch.patches.items()}
    sum(v.square().sum() for v in velocity.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.count_nonzero() > 0, name


@each_variant
def test_a_sample_does_not_depend_on_its_company(variant):
    cfg = replace(BASE, **VARIANTS[variant])
    model = make_model(cfg)
    whole = make_batch(cfg)
    together = model(whole.patches, times(), whole)
    used = dict.fromkeys(together, 0)
    grads_alone = []
    for i in range(4):
        alone = make_batch(cfg, [i])
        ((modality, v),) = model(alone.patches, times([i]), alone).items()
        start = used[modality]
        used[modality] += len(v)
        torch.testing.assert_close(together[modality][start : start + len(v)], v, rtol=1e-4, atol=1e-5)
        grads_alone.append(torch.autograd.grad(v.square().sum(), list(model.parameters()), allow_unused=True))
    loss = sum(v.square().sum() for v in together.values())
    for i, (name, _) in enumerate(model.named_parameters()):
        (grad,) = torch.autograd.grad(loss, [list(model.parameters())[i]], retain_graph=True)
        wanted = sum(g[i] for g in grads_alone if g[i] is not None)
        assert (grad - wanted).norm() <= 1e-4 * wanted.norm() + 1e-6, name


def test_order_in_the_pack_does_not_matter():
    model = make_model(BASE)
    one, two = make_batch(BASE, [0, 1]), make_batch(BASE, [2, 3])
    forth, back = concat([one, two]), concat([two, one])
    v_forth = model(forth.patches, times(), forth)["image"]
    v_back = model(back.patches, times([2, 3, 0, 1]), back)["image"]
    first = len(one.patches["image"])
    torch.testing.assert_close(v_forth[first:], v_back[:-first], rtol=1e-4, atol=1e-5)


def test_the_initial_velocity_is_zero():
    model = FlagDiT(BASE)
    initialize(model, 0)
    batch = make_batch(BASE)
    assert all(v.count_nonzero() == 0 for v in model(batch.patches, times(), batch).values())


@pytest.mark.parametrize(
    ("change", "absent"),
    [
        ({"nextline": False}, "nextline"),
        ({"nextframe": False}, "nextframe"),
        ({"modalities": {"image": 4}}, "nextframe"),
        ({"text_dim": 0}, "attention.gate"),
        ({"text_dim": 0}, "text_pooler"),
        ({"qk_norm": "none"}, "q_norm"),
        ({}, "y_embedder"),
    ],
)
def test_parameters_exist_only_where_they_are_used(change, absent):
    with torch.device("meta"):
        names = [name for name, _ in FlagDiT(replace(BASE, **change)).named_parameters()]
    assert not [name for name in names if absent in name]


def test_conditions_change_the_velocity():
    model, batch = make_model(BASE), make_batch(BASE)
    v = model(batch.patches, times(), batch)["image"]
    later = model(batch.patches, times() + 0.01, batch)["image"]
    assert not torch.allclose(v, later, atol=1e-3)
    other = replace(batch, text=replace(batch.text, features_MY=-batch.text.features_MY))
    assert not torch.allclose(v, model(batch.patches, times(), other)["image"], atol=1e-3)


@torch.no_grad()
def test_time_scale_makes_small_steps_visible():
    coarse, fine = (make_model(replace(BASE, time_scale=s)) for s in (1.0, 1000.0))
    difference = [
        (m.condition(torch.tensor([0.50]), None, None) - m.condition(torch.tensor([0.51]), None, None)).norm()
        for m in (coarse, fine)
    ]
    assert difference[1] > 20 * difference[0]


@torch.no_grad()
def test_inference_settings_are_not_state():
    model, batch = make_model(BASE), make_batch(BASE)
    before = model(batch.patches, times(), batch)["image"]
    for settings in (Inference(RopeScaling("ntk", factor=2.0)), Inference(proportional_base=8)):
        assert not torch.allclose(before, model(batch.patches, times(), batch, settings)["image"], atol=1e-4)
    assert torch.equal(before, model(batch.patches, times(), batch)["image"])
    assert torch.equal(before, model(batch.patches, times(), batch, Inference())["image"])


@torch.no_grad()
def test_proportional_attention_at_the_trained_size_changes_nothing():
    model, batch = make_model(BASE), make_batch(BASE, [0])
    (n,) = batch.layout.seqlens
    plain = model(batch.patches, times([0]), batch)["image"]
    torch.testing.assert_close(model(batch.patches, times([0]), batch, Inference(proportional_base=n))["image"], plain)


@torch.no_grad()
def test_bf16_is_close_to_fp32():
    model, batch = make_model(BASE), make_batch(BASE)
    exact = model(batch.patches, times(), batch)["image"]
    rounded = model.bfloat16()(batch.patches, times(), batch)["image"]
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.03 * exact.norm()


class Counter(TorchDispatchMode):
    """Counts matrix products and attention calls."""

    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        self.products += any(op in name for op in ("aten.mm", "aten.addmm", "attention_for_cpu.default"))
        return function(*args, **(kwargs or {}))


def gradients(cfg: ModelConfig) -> tuple[list[torch.Tensor], int]:
    model, batch = make_model(cfg), make_batch(cfg)
    with Counter() as counter:
        velocity = model(batch.patches, times(), batch)
        sum(v.square().sum() for v in velocity.values()).backward()
    return [p.grad for p in model.parameters()], counter.products


@pytest.mark.parametrize("block", ["flag", "next"])
def test_checkpointing_gives_identical_gradients(block):
    cfg = replace(BASE, block=block)
    plain, products = gradients(cfg)
    counts = {}
    for kind, every in itertools.product(("block", "selective"), (1, 2)):
        found, counts[kind, every] = gradients(replace(cfg, checkpointing=kind, checkpoint_every=every))
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True)), (kind, every)
    assert counts["selective", 1] == counts["selective", 2] == products, "nothing dear is computed twice"
    assert counts["block", 1] > counts["block", 2] > products, "whole blocks are"


def test_checkpointing_is_off_without_gradients():
    cfg = replace(BASE, checkpointing="block")
    model, batch = make_model(cfg), make_batch(cfg)
    with torch.no_grad():
        assert not model(batch.patches, times(), batch)["image"].requires_grad


def test_a_batch_that_does_not_fit_says_how_to_fix_it():
    model, batch = make_model(BASE), make_batch(BASE)
    with pytest.raises(DataError, match=r"no video modality, only image.*model.modalities"):
        make_model(replace(BASE, modalities={"image": 4}))(batch.patches, times(), batch)
    with pytest.raises(DataError, match=r"image patches have 16 features, the model expects 32"):
        make_model(replace(BASE, modalities={"image": 8, "video": 3}))(batch.patches, times(), batch)
    with pytest.raises(DataError, match=r"model\.text_dim=0"):
        model(batch.patches, times(), replace(batch, text=None))
    with pytest.raises(DataError, match=r"10 wide, the model expects 12"):
        make_model(replace(BASE, text_dim=12))(batch.patches, times(), batch)
    with pytest.raises(DataError, match="no labels"):
        make_model(replace(BASE, text_dim=0, num_classes=4))(batch.patches, times(), batch)
    with pytest.raises(DataError, match="no modality 'smell'"):
        FlagDiT(replace(BASE, modalities={"smell": 1}))


def test_one_batch_is_learned_by_heart():
    """Flow matching at fixed noise and times falls below 5% of its first loss."""
    cfg = ModelConfig(dim=64, num_layers=3, num_heads=4, text_dim=10, modalities={"image": 4})
    model = FlagDiT(cfg)
    initialize(model, 0)
    batch = make_batch(cfg, [0, 2, 3])
    path = draw_path(batch, torch.tensor([0.2, 0.5, 0.8]), 0)
    objective = FlowMatching(FlowConfig())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        loss = objective.loss(model, batch, path).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert math.isfinite(losses[-1])
    assert losses[-1] < 0.05 * losses[0]
