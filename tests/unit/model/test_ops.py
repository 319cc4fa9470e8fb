"""Blocks on fused kernels (in Triton's interpreter where there is no GPU) against blocks on plain torch."""

import logging
from dataclasses import replace

import pytest
import torch

from flagdit.batch import PackedText, Segment
from flagdit.config.schema import FlowConfig, ModelConfig
from flagdit.errors import RecipeError
from flagdit.flow.objective import FlowMatching
from flagdit.flow.path import draw_path
from flagdit.kernels import dispatch
from flagdit.model.attention_backends import uncompiled
from flagdit.model.flag_dit import FlagDiT, Inference
from flagdit.model.initialize import initialize
from flagdit.model.ops import FusedOps, PlainOps, choose_kernels
from flagdit.model.rope import RopeScaling
from flagdit.model.tokens import TokenSpec, pack
from flagdit.parallel.context import share
from flagdit.parallel.mesh import Axis, ParallelContext

pytest.importorskip("triton", reason="Triton exists on Linux only")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BASE = ModelConfig(dim=48, num_layers=2, num_heads=4, ffn_dim=56, text_dim=10, modalities={"image": 4, "video": 3})
SHAPES = [("image", (4, 1, 4, 6)), ("video", (3, 2, 4, 4)), ("image", (4, 1, 2, 2)), ("image", (4, 1, 8, 4))]
VARIANTS = {
    "flag": {},
    "next, grouped queries": {"block": "next", "num_kv_heads": 2, "nextline": False, "nextframe": False},
    "layer norm of queries and keys": {"rope": "raster", "qk_norm": "layer"},
    "no norm of queries and keys": {"block": "next", "rope_axes": 3, "qk_norm": "none"},
}


def make_model(cfg: ModelConfig) -> FlagDiT:
    """A network none of whose parameters is at its neutral starting value."""
    model = FlagDiT(cfg)
    initialize(model, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.to(DEVICE)


def make_batch(cfg: ModelConfig):
    generator = torch.Generator().manual_seed(1)
    latents = [torch.randn(shape, generator=generator) for _, shape in SHAPES]
    text = PackedText.pack([torch.randn(n, cfg.text_dim, generator=generator) for n in (3, 1, 5, 3)])
    segments = [Segment(i, *shape) for i, shape in enumerate(SHAPES)]
    return pack(segments, latents, TokenSpec.from_model(cfg), text=text).to(DEVICE)


T_S = torch.tensor([0.1, 0.35, 0.6, 0.9], device=DEVICE)


def outcome(cfg: ModelConfig, kernels: str, compiled: bool = False):
    """Loss and the gradient of every parameter."""
    model, batch = make_model(replace(cfg, kernels=kernels)), make_batch(cfg)
    if compiled:
        torch._dynamo.reset()
        model.attention_backend = uncompiled(model.attention_backend)
        for block in model.blocks:
            block.compile(backend="aot_eager")
    loss = FlowMatching(FlowConfig()).loss(model, batch, draw_path(batch, T_S, 0)).total
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters()}


def assert_same(got, want):
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=0)
    for name, gradient in want[1].items():
        largest = gradient.abs().max().item()
        assert largest > 0, name
        torch.testing.assert_close(got[1][name], gradient, rtol=0, atol=5e-6 * max(largest, 0.1), msg=name)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_loss_and_gradients_are_those_of_plain_torch(changes):
    cfg = replace(BASE, **changes)
    assert_same(outcome(cfg, "triton"), outcome(cfg, "reference"))


@pytest.mark.parametrize(("block", "checkpointing"), [("flag", "block"), ("next", "selective")])
def test_under_activation_checkpointing(block, checkpointing):
    cfg = replace(BASE, block=block)
    assert_same(outcome(replace(cfg, checkpointing=checkpointing), "triton"), outcome(cfg, "reference"))


@pytest.mark.parametrize("block", ["flag", "next"])
def test_compiled_blocks(block):
    cfg = replace(BASE, block=block)
    assert_same(outcome(cfg, "triton", compiled=True), outcome(cfg, "reference"))


@torch.no_grad()
def test_scaled_positions_and_proportional_attention():
    inference = Inference(RopeScaling("time_switch", factor=2.0, watershed=0.5), proportional_base=8)
    velocities = []
    for kernels in ("triton", "reference"):
        batch = make_batch(BASE)
        velocities.append(make_model(replace(BASE, kernels=kernels))(batch.patches, T_S, batch, inference))
    for modality, want in velocities[1].items():
        torch.testing.assert_close(velocities[0][modality], want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("rank", range(4))
def test_a_rank_that_holds_part_of_a_pack(rank):
    """A range of tokens: of some samples a part, of others none, and padding at the end. Self-attention, in which ranks
    would exchange, is replaced by something local."""
    mesh = ParallelContext(device=DEVICE, context=Axis(size=4, rank=rank))
    results = []
    for kernels in ("triton", "reference"):
        model = make_model(replace(BASE, kernels=kernels))
        batch = share(make_batch(BASE), mesh, model.patch_dims)
        assert 0 in batch.layout.seqlens
        model.self_attention = lambda q, k, v, pairs: q * k + v
        velocity = model(batch.patches, T_S, batch)
        sum(y.square().sum() for y in velocity.values()).backward()
        results.append((velocity, {name: p.grad for name, p in model.named_parameters()}))
    for got, want in zip(*results, strict=True):
        for name in want:
            largest = want[name].abs().max().item() if want[name].numel() else 0.0
            torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-5 * max(largest, 0.1), msg=name)


def ops_of(model: FlagDiT):
    """The operations that the blocks run on."""
    seen = []
    hook = model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[2].ops))
    batch = make_batch(model.cfg)
    model({m: x.to(model.dtype) for m, x in batch.patches.items()}, T_S, batch)
    hook.remove()
    return seen[0]


def test_the_recipe_forces_either_way():
    assert isinstance(ops_of(make_model(replace(BASE, kernels="triton"))), FusedOps)
    assert isinstance(ops_of(make_model(replace(BASE, kernels="reference"))), PlainOps)


def test_auto_uses_kernels_on_gpus_only_and_says_so_once(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_told", set())
    model = make_model(BASE)
    with caplog.at_level(logging.INFO, "flagdit.kernels"):
        kinds = {type(ops_of(model)) for _ in range(2)}
    assert kinds == {FusedOps if DEVICE.type == "cuda" else PlainOps}
    told = [r.getMessage() for r in caplog.records if "the blocks" in r.getMessage()]
    assert len(told) == (0 if DEVICE.type == "cuda" else 1)


@pytest.mark.parametrize(
    ("cfg", "dtype", "reason"),
    [
        (BASE, torch.float64, "float64"),
        (replace(BASE, dim=32768), torch.float32, "rows of 32768 elements"),
    ],
)
def test_a_gpu_run_that_cannot_use_kernels_says_why(cfg, dtype, reason, caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_told", set())
    with caplog.at_level(logging.WARNING, "flagdit.kernels"):
        assert [choose_kernels(cfg, torch.device("cuda"), dtype) for _ in range(3)] == ["reference"] * 3
    assert [reason in r.getMessage() for r in caplog.records] == [True]
    with pytest.raises(RecipeError, match=f"model.kernels: .*{reason}"):
        choose_kernels(replace(cfg, kernels="triton"), torch.device("cuda"), dtype)
