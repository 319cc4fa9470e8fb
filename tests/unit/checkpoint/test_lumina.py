"""Official names and layout to ours and back; tests/unit/model/test_parity.py shows that the numbers are right."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from flagdit.checkpoint.lumina import convert_official, expected_shapes, to_official
from flagdit.config.schema import ModelConfig
from flagdit.errors import CheckpointError
from flagdit.model.sizes import official

GOLDENS = Path(__file__).parents[2] / "goldens"
FLAG = ModelConfig(
    dim=96,
    num_layers=2,
    num_heads=4,
    ffn_dim=256,
    modalities={"image": 4},
    text_dim=40,
    qk_norm="layer",
    rope="raster",
    learn_sigma=True,
)
CONFIGS = {
    "flag_dit_t2i": FLAG,
    "next_dit_t2i_gqa": replace(FLAG, block="next", num_kv_heads=2, rope="axial", nextline=False),
}


def weights(name: str) -> dict[str, torch.Tensor]:
    with safe_open(GOLDENS / f"{name}.safetensors", "pt") as file:
        assert json.loads(file.metadata()["info"])["dim"] == FLAG.dim
        names = [n for n in file.keys() if n.startswith("weights.")]  # noqa: SIM118 (not a dict)
        return {n.removeprefix("weights."): file.get_tensor(n) for n in names}


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_is_exact(name):
    theirs, cfg = weights(name), CONFIGS[name]
    ours = convert_official(theirs, cfg)
    assert {n: tuple(x.shape) for n, x in ours.items()} == expected_shapes(cfg)
    back = to_official(ours, cfg)
    assert back.keys() == theirs.keys()
    for n, x in theirs.items():
        assert torch.equal(back[n], x) or n == "pad_token", n
    again = convert_official(back, cfg)
    assert all(torch.equal(again[n], x) for n, x in ours.items())


def test_head_rows_move_from_pixels_first_to_channels_first():
    cfg = CONFIGS["flag_dit_t2i"]
    theirs = weights("flag_dit_t2i")
    # Row = (pixel of the 2×2 patch)·8 + channel, of 8 channels with learn_sigma.
    theirs["final_layer.linear.bias"] = torch.arange(32.0)
    ours = convert_official(theirs, cfg)["heads.image.bias"]
    assert ours[:8].tolist() == [0, 8, 16, 24, 1, 9, 17, 25]


def test_class_conditional_names():
    cfg = replace(FLAG, text_dim=0, num_classes=3, nextline=False)
    ours = {n: torch.randn(shape) for n, shape in expected_shapes(cfg).items()}
    theirs = to_official(ours, cfg)
    assert theirs["y_embedder.embedding_table.weight"].shape == (4, 96)
    assert not {"pad_token", "eol_token"} & theirs.keys()
    back = convert_official(theirs, cfg)
    assert all(torch.equal(back[n], x) for n, x in ours.items())


def test_official_names_of_the_published_5b():
    cfg = official("5b")
    ours = {n: torch.empty(shape, device="meta") for n, shape in expected_shapes(cfg).items()}
    theirs = to_official(ours, cfg)
    assert sum(x.numel() for x in theirs.values()) == 5_046_643_744
    assert theirs["layers.31.attention.wk_y.weight"].shape == (3072, 4096)
    assert theirs["cap_embedder.1.weight"].shape == (1024, 4096)
    assert theirs["final_layer.linear.weight"].shape == (32, 3072)


def test_a_checkpoint_that_does_not_fit_is_described():
    theirs, cfg = weights("flag_dit_t2i"), CONFIGS["flag_dit_t2i"]
    without = {n: x for n, x in theirs.items() if "wo.weight" not in n}
    with pytest.raises(CheckpointError, match=r"missing blocks.0.attention.wo.weight, blocks.1"):
        convert_official(without, cfg)
    with pytest.raises(CheckpointError, match=r"unknown surprise"):
        convert_official(theirs | {"surprise": torch.zeros(1)}, cfg)
    with pytest.raises(CheckpointError, match=r"w1.weight is \(256, 96\) instead of \(512, 96\)"):
        convert_official(theirs, replace(cfg, ffn_dim=512))
    with pytest.raises(CheckpointError, match="one modality"):
        convert_official(theirs, replace(cfg, modalities={"image": 4, "video": 4}))
    with pytest.raises(CheckpointError, match="missing"):
        to_official({}, cfg)
