"""Codecs: exact inverses, scale, orthonormality, diffusers folders, and every wrong input."""

import json
from pathlib import Path

import pytest
import torch

from flagdit.codecs.latents import BlockCodec, build_codec, codec_spec, dct_matrix, haar_matrix
from flagdit.config.schema import CodecConfig
from flagdit.errors import DataError, RecipeError

BLOCKS = [(kind, factor) for kind in ("haar", "dct") for factor in (2, 4, 8)]


def smooth_picture(rows: int, columns: int, frames: int = 1, seed: int = 0) -> torch.Tensor:
    """Pixels with a decaying spectrum, as pictures have."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(3, frames, max(rows // 8, 2), max(columns // 8, 2), generator=g) * 2 - 1
    fine = torch.nn.functional.interpolate(coarse, size=(rows, columns), mode="bilinear")
    return (fine + 0.1 * torch.randn(3, frames, rows, columns, generator=g)).clamp(-1, 1)


@pytest.mark.parametrize(("kind", "factor"), BLOCKS)
@pytest.mark.parametrize(("frames", "rows", "columns"), [(1, 1, 1), (1, 3, 5), (4, 7, 2)])
def test_block_codecs_invert_to_rounding(kind: str, factor: int, frames: int, rows: int, columns: int):
    codec = build_codec(CodecConfig(kind=kind, factor=factor))
    pixels = torch.rand(3, frames, rows * factor, columns * factor) * 2 - 1
    latent = codec.encode(pixels)
    assert latent.shape == (3 * factor**2, frames, rows, columns) and latent.dtype == torch.float32
    assert (codec.channels, codec.factor) == (3 * factor**2, factor)
    torch.testing.assert_close(codec.decode(latent), pixels, rtol=0, atol=3e-7)
    noise = torch.randn_like(latent)
    torch.testing.assert_close(codec.encode(codec.decode(noise)), noise, rtol=0, atol=5e-6)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_bases_are_orthonormal_and_start_with_the_mean(n: int):
    for basis in (haar_matrix(n), dct_matrix(n)):
        torch.testing.assert_close(basis @ basis.T, torch.eye(n, dtype=torch.float64))
        torch.testing.assert_close(basis[0], torch.full((n,), n**-0.5, dtype=torch.float64))


def test_haar_of_two_pixels_is_sum_and_difference():
    pixels = torch.tensor([[1.0, 0.0], [0.5, -0.5]]).expand(3, 1, 2, 2)
    low, across, down, diagonal = build_codec(CodecConfig(kind="haar", factor=2)).encode(pixels)[::3, 0, 0, 0].tolist()
    assert (low, across, down, diagonal) == (0.5 / 1, 1.0 / 0.25, 0.5 / 0.25, 0.0)


@pytest.mark.parametrize(("kind", "factor"), BLOCKS)
def test_first_channels_are_a_small_copy_and_all_have_one_scale(kind: str, factor: int):
    codec = BlockCodec(kind, factor)
    pixels = smooth_picture(64, 96)
    latent = codec.encode(pixels)
    small = torch.nn.functional.avg_pool2d(pixels[:, 0], factor) * factor / codec.divisor[0, 0].float()
    torch.testing.assert_close(latent[:3, 0], small)
    assert latent.flatten(1).std(dim=1).min() > 0.1 and latent.flatten(1).std(dim=1).max() < 3
    assert (codec.divisor.log2() % 1 == 0).all(), "a power of two scales without rounding"


def test_frames_do_not_touch_each_other():
    codec = build_codec(CodecConfig(kind="dct", factor=4))
    pixels = torch.rand(3, 3, 8, 12)
    together = codec.encode(pixels)
    for i in range(3):
        torch.testing.assert_close(together[:, i : i + 1], codec.encode(pixels[:, i : i + 1]), rtol=0, atol=1e-6)


def test_masks_cover_every_latent_that_they_touch():
    mask = torch.zeros(2, 4, 8, dtype=torch.bool)
    mask[0, 0, 3] = mask[0, 3, 7] = True
    latent = BlockCodec("haar", 2).latent_mask(mask)
    assert latent.shape == (1, 2, 2, 4) and not latent[0, 1].any()
    assert latent[0, 0].tolist() == [[False, True, False, False], [False, False, False, True]]


def test_pixels_pass_unchanged():
    codec = build_codec(CodecConfig(kind="pixels"))
    pixels = torch.rand(3, 2, 5, 7)
    assert torch.equal(codec.encode(pixels), pixels) and torch.equal(codec.decode(pixels), pixels)


def test_wrong_size_names_the_size_that_works():
    with pytest.raises(DataError, match=r"26×17 px.*multiples of 4.*Make it 24×16"):
        build_codec(CodecConfig(kind="haar", factor=4)).encode(torch.zeros(3, 1, 17, 26))


def test_wrong_channels_are_refused():
    codec = build_codec(CodecConfig(kind="haar", factor=2))
    with pytest.raises(DataError, match="not 3×frames"):
        codec.encode(torch.zeros(4, 1, 8, 8))
    with pytest.raises(DataError, match="3 channels for a codec of 12"):
        codec.decode(torch.zeros(3, 1, 8, 8))


def test_factor_three_is_refused():
    with pytest.raises(RecipeError, match=r"codec\.factor=3.*2, 4, 8"):
        build_codec(CodecConfig(kind="haar", factor=3))


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("autoencoders") / "vae"
    AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=5,
        scaling_factor=0.25,
        shift_factor=0.5,
    ).save_pretrained(folder)
    return folder


def test_autoencoder_kl_folder(vae_folder: Path):
    from diffusers import AutoencoderKL

    cfg = CodecConfig(kind="diffusers", path=str(vae_folder))
    codec = build_codec(cfg)
    assert (codec.channels, codec.factor) == (5, 4)
    pixels = smooth_picture(16, 24, frames=2)
    latent = codec.encode(pixels)
    assert latent.shape == (5, 2, 4, 6) and latent.dtype == torch.float32
    peer = AutoencoderKL.from_pretrained(vae_folder).eval()
    with torch.no_grad():
        z = peer.encode(pixels.transpose(0, 1)).latent_dist.mean
        decoded = peer.decode(z).sample.transpose(0, 1)
    torch.testing.assert_close(latent, ((z - 0.5) * 0.25).transpose(0, 1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(codec.decode(latent), decoded, rtol=1e-4, atol=1e-5)
    assert torch.equal(codec.encode(pixels), latent), "the mean, not a draw"
    assert codec.spec() == codec_spec(cfg) and json.loads(json.dumps(codec.spec())) == codec.spec()
    assert not any(p.requires_grad for p in codec.model.parameters())


def test_autoencoder_dc_folder(tmp_path: Path):
    from diffusers import AutoencoderDC

    AutoencoderDC(
        latent_channels=4,
        encoder_block_types=("ResBlock",) * 2,
        decoder_block_types=("ResBlock",) * 2,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        scaling_factor=0.5,
    ).save_pretrained(tmp_path)
    codec = build_codec(CodecConfig(kind="diffusers", path=str(tmp_path)))
    latent = codec.encode(smooth_picture(16, 8))
    assert (codec.channels, codec.factor) == (4, 2) and latent.shape == (4, 1, 8, 4)
    raw = codec.model.encode(smooth_picture(16, 8).transpose(0, 1)).latent
    torch.testing.assert_close(latent, 0.5 * raw.transpose(0, 1))
    assert codec.decode(latent).shape == (3, 1, 16, 8)


def test_per_channel_statistics_are_applied_and_inverted(vae_folder: Path, tmp_path: Path):
    for file in vae_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "latents_mean": [0.1, 0.2, 0.3, 0.4, 0.5],
        "latents_std": [1.0, 2.0, 4.0, 0.5, 0.25],
        "scaling_factor": 1.0,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    plain = build_codec(CodecConfig(kind="diffusers", path=str(vae_folder)))
    scaled = build_codec(CodecConfig(kind="diffusers", path=str(tmp_path)))
    pixels = smooth_picture(8, 8)
    z = plain.encode(pixels) / 0.25 + 0.5
    mean, std = (torch.tensor(config[k]).view(-1, 1, 1, 1) for k in ("latents_mean", "latents_std"))
    torch.testing.assert_close(scaled.encode(pixels), (z - mean) / std)
    torch.testing.assert_close(scaled.decode((z - mean) / std), plain.decode((z - 0.5) * 0.25), rtol=1e-4, atol=1e-5)
    assert plain.spec() != scaled.spec(), "another scaling is another codec"


def test_spec_follows_the_weights_not_the_folder_name(vae_folder: Path, tmp_path: Path):
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for file in vae_folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    cfg = CodecConfig(kind="diffusers", path=str(copy))
    assert codec_spec(cfg) == codec_spec(CodecConfig(kind="diffusers", path=str(vae_folder)))
    weights = next(copy.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert codec_spec(cfg) != codec_spec(CodecConfig(kind="diffusers", path=str(vae_folder)))


@pytest.mark.parametrize("read", [build_codec, codec_spec])
def test_hub_name_is_answered_with_the_local_folder(read):
    with pytest.raises(
        RecipeError, match=r"codec\.path: 'stabilityai/sd-vae-ft-mse' is not a folder.*hub name.*local folder"
    ):
        read(CodecConfig(kind="diffusers", path="stabilityai/sd-vae-ft-mse"))


def test_missing_and_mistaken_folders(vae_folder: Path, tmp_path: Path):
    with pytest.raises(RecipeError, match=r"codec\.path is not set"):
        build_codec(CodecConfig(kind="diffusers"))
    with pytest.raises(RecipeError, match=r"no config\.json.*Did you mean .*vae"):
        build_codec(CodecConfig(kind="diffusers", path=str(vae_folder.parent)))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RecipeError, match="cannot be read"):
        build_codec(CodecConfig(kind="diffusers", path=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(RecipeError, match="_class_name"):
        build_codec(CodecConfig(kind="diffusers", path=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(RecipeError, match="UNet2DConditionModel, not an autoencoder"):
        build_codec(CodecConfig(kind="diffusers", path=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(RecipeError, match="cannot be loaded as AutoencoderKL"):
        build_codec(CodecConfig(kind="diffusers", path=str(tmp_path)))
