"""Our networks, loss, guidance and samplers against tensors made by the official code."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from flagdit.batch import PackedText, Segment
from flagdit.checkpoint.lumina import convert_official
from flagdit.config.schema import FlowConfig, ModelConfig
from flagdit.flow.guidance import guided_velocity
from flagdit.flow.objective import FlowMatching
from flagdit.flow.path import between
from flagdit.flow.solver import integrate
from flagdit.model.flag_dit import FlagDiT, Inference
from flagdit.model.rope import RopeScaling
from flagdit.model.tokens import TokenSpec, pack, patchify, unpack

GOLDENS = Path(__file__).parents[2] / "goldens"
TOLERANCE = 2e-5


def config_of(info: dict) -> ModelConfig:
    is_next = info["family"] == "next-dit"
    return ModelConfig(
        block="next" if is_next else "flag",
        dim=info["dim"],
        num_layers=info["num_layers"],
        num_heads=info["num_heads"],
        num_kv_heads=info["num_kv_heads"],
        ffn_dim=256,
        modalities={"image": info["in_channels"]},
        patch_size=info["patch_size"],
        text_dim=info["caption_dim"],
        qk_norm="layer",
        norm_eps=info["norm_eps"],
        rope="axial" if is_next else "raster",
        nextline=not is_next,
        time_scale=1.0,
        learn_sigma=info["learn_sigma"],
    )


@pytest.fixture(params=["flag_dit_t2i", "next_dit_t2i_gqa"], scope="module")
def golden(request) -> SimpleNamespace:
    with safe_open(GOLDENS / f"{request.param}.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        info = json.loads(file.metadata()["info"])
    cfg = config_of(info)
    model = FlagDiT(cfg)
    weights = {name.removeprefix("weights."): x for name, x in tensors.items() if name.startswith("weights.")}
    model.load_state_dict(convert_official(weights, cfg))
    return SimpleNamespace(tensors=tensors, cfg=cfg, model=model, is_next=cfg.block == "next", x=tensors)


def captions(features: torch.Tensor, mask: torch.Tensor) -> PackedText:
    return PackedText.pack([f[m.bool()] for f, m in zip(features, mask, strict=True)])


def packed(cfg: ModelConfig, latents: list[torch.Tensor], text: PackedText):
    """Latents (C, H, W) as one pack."""
    latents = [x[:, None] for x in latents]
    segments = [Segment(i, "image", tuple(x.shape)) for i, x in enumerate(latents)]
    return pack(segments, latents, TokenSpec.from_model(cfg), text=text)


def patches_of(cfg: ModelConfig, latents: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"image": torch.cat([patchify(x[:, None], (1, cfg.patch_size, cfg.patch_size)) for x in latents])}


def latents_of(cfg: ModelConfig, patches: dict[str, torch.Tensor], batch) -> list[torch.Tensor]:
    return [x[:, 0] for x in unpack(patches, batch.segments, TokenSpec.from_model(cfg))]


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    error = (found - wanted).norm() / wanted.norm()
    assert error <= TOLERANCE, f"relative error {error:.2e}"
    assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


@torch.no_grad()
def test_output_of_equal_sizes(golden):
    x = golden.tensors
    batch = packed(golden.cfg, list(x["x"]), captions(x["cap_feats"], x["cap_mask"]))
    velocity = golden.model(batch.patches, x["t"], batch)
    assert_close(torch.stack(latents_of(golden.cfg, velocity, batch)), x["y"])


@torch.no_grad()
def test_output_of_mixed_sizes(golden):
    x = golden.tensors
    batch = packed(golden.cfg, [x["list_x0"], x["list_x1"]], captions(x["cap_feats"], x["cap_mask"]))
    velocity = golden.model(batch.patches, x["t"], batch)
    for found, name in zip(latents_of(golden.cfg, velocity, batch), ("list_y0", "list_y1"), strict=True):
        assert_close(found, x[name])


def test_loss_and_gradients(golden):
    x = golden.tensors
    batch = packed(golden.cfg, list(x["x"]), captions(x["cap_feats"], x["cap_mask"]))
    patches = {"image": batch.patches["image"].requires_grad_()}
    golden.model.zero_grad()
    velocity = golden.model(patches, x["t"], batch)
    found = torch.stack(latents_of(golden.cfg, velocity, batch))
    loss = (found - x["target"]).square().flatten(1).mean(1).sum()
    loss.backward()
    assert_close(loss.detach()[None], x["loss"])
    grads = latents_of(golden.cfg, {"image": patches["image"].grad}, batch)
    assert_close(torch.stack(grads), x["x_grad"])
    parameters = dict(golden.model.named_parameters())
    for name in (n.removeprefix("grad.") for n in x if n.startswith("grad.")):
        assert_close(parameters[name.replace("layers.", "blocks.")].grad, x[f"grad.{name}"])


def test_flow_matching_gives_the_official_loss(golden):
    x = golden.tensors
    cfg = golden.cfg
    # The official loss compares with `target` at the given x; take data and noise whose path passes there.
    target, t = patches_of(cfg, list(x["target"]))["image"], x["t"]
    batch = packed(cfg, list(x["x"]), captions(x["cap_feats"], x["cap_mask"]))
    t_N1 = t[batch.layout.patch_segment["image"]][:, None]
    data = batch.patches["image"] + (1 - t_N1) * target
    batch.patches["image"] = data
    flow = FlowMatching(FlowConfig(weighting="none"))
    loss = flow.loss(golden.model, batch, between(batch, {"image": data - target}, t), denominator=1.0)
    assert_close(loss.total.detach()[None], x["loss"])
    assert_close(loss.per_sample_S.sum()[None], x["loss"])


def guided(golden, inference: Inference):
    """Guidance as the official code, of its first 3 channels: (batch, velocity) of each sample."""
    x = golden.tensors
    captions_of = captions(x["cfg_cap_feats"], x["cfg_cap_mask"]).unpack()  # captions first, null captions second
    for latent, own, null in zip(x["x"], captions_of[:2], captions_of[2:], strict=True):
        batch = packed(golden.cfg, [latent], PackedText.pack([own]))
        yield (
            batch,
            guided_velocity(golden.model, batch, scale=4.0, channels=3, null_text_LY=null, inference=inference),
        )


def inference_of(golden) -> tuple[str, Inference]:
    if golden.is_next:
        return "cfg_scale4_time_aware", Inference(RopeScaling("time_switch", 2.0, watershed=0.3), proportional_base=16)
    return "cfg_scale4_ntk2_prop", Inference(RopeScaling("ntk", 2.0), proportional_base=16)


@torch.no_grad()
@pytest.mark.parametrize("scaled", [False, True])
def test_guided_output(golden, scaled):
    name, inference = inference_of(golden) if scaled else ("cfg_scale4", Inference())
    found = [
        latents_of(golden.cfg, velocity(batch.patches, 0.41), batch)[0] for batch, velocity in guided(golden, inference)
    ]
    assert_close(torch.stack(found), golden.tensors[name])


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "solver", "steps", "shift"), [("euler9", "euler", 8, 1.0), ("midpoint5_shift4", "midpoint", 4, 4.0)]
)
def test_samples(golden, name, solver, steps, shift):
    found = []
    for (batch, velocity), noise in zip(guided(golden, Inference()), golden.tensors["sample_noise"], strict=True):
        start = patches_of(golden.cfg, [noise])
        solution = integrate(velocity, start, solver=solver, steps=steps, shift=shift)
        found += latents_of(golden.cfg, solution.x, batch)
    assert_close(torch.stack(found), golden.tensors[f"sample_{name}"])
