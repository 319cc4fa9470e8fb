"""Official names and layout to ours and back; tests/unit/model/test_parity.py shows that the numbers are right."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from flagdit.batch import Segment
from flagdit.checkpoint.lumina import (
    as_official,
    compare,
    convert_official,
    expected_shapes,
    from_official,
    official_shapes,
)
from flagdit.checkpoint.lumina_config import infer_config, obstacles, require_official
from flagdit.checkpoint.tensors import Entry, InMemory
from flagdit.config.schema import ModelConfig
from flagdit.errors import CheckpointError
from flagdit.model.flag_dit import FlagDiT
from flagdit.model.sizes import SIZES, official, resolve
from flagdit.model.tokens import TokenSpec, pack, unpack

PARTS = ("weight", "bias")

FLAG = ModelConfig(
    dim=96,
    num_layers=2,
    num_heads=4,
    ffn_dim=256,
    modalities={"image": 4},
    text_dim=40,
    qk_norm="layer",
    rope="raster",
    time_scale=1.0,
    learn_sigma=True,
)
CONFIGS = {
    "flag_dit_t2i": FLAG,
    "next_dit_t2i_gqa": replace(FLAG, block="next", num_kv_heads=2, rope="axial", nextline=False),
}


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


def test_there_and_back_is_exact(golden):
    theirs, cfg = golden.weights, CONFIGS[golden.name]
    ours = convert_official(theirs, cfg)
    assert {n: tuple(x.shape) for n, x in ours.items()} == expected_shapes(cfg)
    back = dict(as_official(InMemory(ours), cfg).items())
    assert back.keys() == theirs.keys()
    for n, x in theirs.items():
        assert torch.equal(back[n], x) or n == "pad_token", n
    assert equal(convert_official(back, cfg), ours)


def test_the_dead_half_is_dropped_exactly_and_comes_back_as_zeros(golden):
    cfg = replace(CONFIGS[golden.name], learn_sigma=False)
    whole = convert_official(golden.weights, CONFIGS[golden.name])
    half = convert_official(golden.weights, cfg)
    for name, x in half.items():
        assert torch.equal(x, whole[name][: len(x)]), name
    assert len(half["heads.image.weight"]) * 2 == len(whole["heads.image.weight"])
    back = dict(as_official(InMemory(half), cfg).items())
    for name, x in golden.weights.items():
        if name.startswith("final_layer.linear."):
            pixels = (4, 8, *x.shape[1:])  # 2×2 pixels of 4 channels and their dead doubles
            assert torch.equal(back[name].reshape(pixels)[:, :4], x.reshape(pixels)[:, :4])
            assert not back[name].reshape(pixels)[:, 4:].any()
        elif name != "pad_token":
            assert torch.equal(back[name], x), name


def test_head_rows_move_from_pixels_first_to_channels_first(goldens):
    theirs = dict(goldens["flag_dit_t2i"].weights)
    # Row = (pixel of the 2×2 patch)·8 + channel, of 8 channels with learn_sigma.
    theirs["final_layer.linear.bias"] = torch.arange(32.0)
    ours = convert_official(theirs, FLAG)["heads.image.bias"]
    assert ours[:8].tolist() == [0, 8, 16, 24, 1, 9, 17, 25]


def test_class_conditional_names():
    cfg = replace(FLAG, text_dim=0, num_classes=3, nextline=False)
    ours = {n: torch.randn(shape) for n, shape in expected_shapes(cfg).items()}
    theirs = dict(as_official(InMemory(ours), cfg).items())
    assert theirs["y_embedder.embedding_table.weight"].shape == (4, 96)
    assert not {"pad_token", "eol_token"} & theirs.keys()
    assert equal(convert_official(theirs, cfg), ours)


@torch.no_grad()
def test_class_conditional_next_dit_gives_the_official_numbers():
    """Against the official forward written out here: norms without weights first, shift and scale at the end."""
    cfg = replace(FLAG, block="next", text_dim=0, num_classes=3, rope="axial", nextline=False, final_shift=True)
    cfg = replace(cfg, learn_sigma=False, nextframe=False)
    generator = torch.Generator().manual_seed(0)
    w = {n: 0.2 * torch.randn(s, generator=generator) for n, s in official_shapes(cfg).items()}
    assert w["layers.1.attention_norm.weight"].shape == (96,) and "layers.1.attention_norm1.weight" not in w
    entries = {n: Entry.of(x) for n, x in w.items()}
    assert infer_config(entries, {}, heads=4) == resolve(cfg) and not obstacles(cfg)
    ours = dict(from_official(InMemory(w), cfg).items())
    back = dict(as_official(InMemory(ours), cfg).items())
    assert all(torch.equal(back[n], x) for n, x in w.items() if not n.startswith("final_layer.linear"))
    with pytest.raises(CheckpointError, match="no weights in its first norms"):
        as_official(InMemory(ours | {"blocks.0.ffn_norm1.weight": torch.zeros(96)}), cfg)

    model = FlagDiT(cfg)
    model.load_state_dict(ours)
    x, t, y = torch.randn(2, 4, 4, 6, generator=generator), torch.tensor([0.2, 0.7]), torch.tensor([1, 3])
    segments = [Segment(i, "image", (4, 1, 4, 6)) for i in range(2)]
    spec = TokenSpec.from_model(cfg)
    batch = pack(segments, list(x[:, :, None]), spec, labels=y)
    found = torch.stack([v[:, 0] for v in unpack(model(batch.patches, t, batch), segments, spec)])
    torch.testing.assert_close(found, official_next_dit_of_classes(w, x, t, y), rtol=2e-5, atol=2e-5)


def official_next_dit_of_classes(w, x, t, y):
    dim, heads, (b, c, h, v) = 96, 4, x.shape

    def linear(z, name):
        return F.linear(z, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(z):
        return z * torch.rsqrt(z.square().mean(-1, keepdim=True) + 1e-5)

    def turn(z, cis):
        pairs = torch.view_as_complex(z.reshape(b, -1, heads, dim // heads // 2, 2))
        return torch.view_as_real(pairs * cis[None, :, None]).flatten(3)

    frequency = 1 / 10000 ** (torch.arange(0, dim // heads, 4) / (dim // heads))
    row, column = torch.meshgrid(torch.arange(h // 2), torch.arange(v // 2), indexing="ij")
    angle = torch.stack([row.flatten()[:, None] * frequency, column.flatten()[:, None] * frequency], -1).flatten(1)
    cis = torch.polar(torch.ones_like(angle), angle)
    z = x.view(b, c, h // 2, 2, v // 2, 2).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    z = linear(z, "x_embedder")
    steps = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    cond = linear(F.silu(linear(torch.cat([steps.cos(), steps.sin()], -1), "t_embedder.mlp.0")), "t_embedder.mlp.2")
    cond = cond + w["y_embedder.embedding_table.weight"][y]
    for i in range(2):
        p = f"layers.{i}."
        scale_a, gate_a, scale_f, gate_f = linear(F.silu(cond), p + "adaLN_modulation.1")[:, None].chunk(4, -1)
        u = norm(z) * (1 + scale_a)
        q, k = (
            F.layer_norm(linear(u, f"{p}attention.w{n}"), (dim,), *(w[f"{p}attention.{n}_norm.{q}"] for q in PARTS))
            for n in "qk"
        )
        value = linear(u, p + "attention.wv").view(b, -1, heads, dim // heads)
        out = F.scaled_dot_product_attention(*(a.transpose(1, 2) for a in (turn(q, cis), turn(k, cis), value)))
        out = linear(out.transpose(1, 2).flatten(2), p + "attention.wo")
        z = z + gate_a.tanh() * norm(out) * w[p + "attention_norm.weight"]
        u = norm(z) * (1 + scale_f)
        out = linear(F.silu(linear(u, p + "feed_forward.w1")) * linear(u, p + "feed_forward.w3"), p + "feed_forward.w2")
        z = z + gate_f.tanh() * norm(out) * w[p + "ffn_norm.weight"]
    shift, scale = linear(F.silu(cond), "final_layer.adaLN_modulation.1")[:, None].chunk(2, -1)
    z = linear(F.layer_norm(z, (dim,), eps=1e-6) * (1 + scale) + shift, "final_layer.linear")
    z = z.view(b, h // 2, v // 2, 2, 2, 2 * c).permute(0, 5, 1, 3, 2, 4).reshape(b, 2 * c, h, v)
    return z[:, :c]


def test_official_names_of_the_published_5b():
    shapes = official_shapes(official("5b"))
    assert sum(Entry(shape, torch.float32).numel for shape in shapes.values()) == 5_046_643_744
    assert shapes["layers.31.attention.wk_y.weight"] == (3072, 4096)
    assert shapes["cap_embedder.1.weight"] == (1024, 4096)
    assert shapes["final_layer.linear.weight"] == (32, 3072)


@pytest.mark.parametrize("name", [n for n in SIZES if n not in ("tiny", "small")])
def test_published_networks_are_recognized_by_their_shapes(name):
    cfg = official(name)
    entries = {n: Entry(shape, torch.bfloat16) for n, shape in official_shapes(cfg).items()}
    found = infer_config(entries, {})
    wanted = replace(cfg, size=None, learn_sigma=False, nextframe=False)
    assert found == resolve(wanted)
    assert not obstacles(found)


def test_other_tensors_are_not_taken_for_a_network(goldens):
    entries = {n: Entry.of(x) for n, x in goldens["flag_dit_t2i"].weights.items()}
    without = {n: e for n, e in entries.items() if n != "t_embedder.mlp.0.weight"}
    with pytest.raises(CheckpointError, match=r"not the tensors of an official.*t_embedder.mlp.0.weight"):
        infer_config(without, {})
    with pytest.raises(CheckpointError, match="adaLN has 2 parts"):
        infer_config(entries | {"layers.0.adaLN_modulation.1.weight": Entry((192, 96), torch.float32)}, {})
    with pytest.raises(CheckpointError, match=r"final_layer.linear.bias of \(33,\)"):
        infer_config(entries | {"final_layer.linear.bias": Entry((33,), torch.float32)}, {})


def test_a_network_that_the_official_code_lacks_is_described():
    with pytest.raises(CheckpointError, match=r"model.qk_norm is rms, there it is layer or none; .*time_scale is 1000"):
        require_official(replace(FLAG, qk_norm="rms", time_scale=1000.0), fix="")
    with pytest.raises(CheckpointError, match=r"model.rope is axial, there it is raster"):
        require_official(replace(FLAG, rope="axial"), fix="")
    require_official(FLAG, fix="")


def test_a_checkpoint_that_does_not_fit_is_described(goldens):
    theirs, cfg = goldens["flag_dit_t2i"].weights, FLAG
    without = {n: x for n, x in theirs.items() if "wo.weight" not in n}
    with pytest.raises(CheckpointError, match=r"missing layers.0.attention.wo.weight, layers.1"):
        convert_official(without, cfg)
    with pytest.raises(CheckpointError, match=r"unknown surprise"):
        convert_official(theirs | {"surprise": torch.zeros(1)}, cfg)
    with pytest.raises(CheckpointError, match=r"w1.weight is \(256, 96\) instead of \(512, 96\)"):
        convert_official(theirs, replace(cfg, ffn_dim=512))
    with pytest.raises(CheckpointError, match="one modality"):
        convert_official(theirs, replace(cfg, modalities={"image": 4, "video": 4}))
    with pytest.raises(CheckpointError, match="missing"):
        as_official(InMemory({}), cfg)
    with pytest.raises(CheckpointError, match="and 8 more"):
        compare({}, {str(i): (1,) for i in range(20)})


def test_nothing_is_read_before_the_names_are_known_to_fit(goldens):
    class Unread(InMemory):
        def read(self, name):
            raise AssertionError(name)

    with pytest.raises(CheckpointError, match="unknown surprise"):
        from_official(Unread(goldens["flag_dit_t2i"].weights | {"surprise": torch.zeros(1)}), FLAG)
