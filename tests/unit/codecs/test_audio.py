"""Sound to log-mel latents and back."""

from dataclasses import replace

import pytest
import torch

from flagdit.codecs.audio import MelCodec, mel_filters
from flagdit.codecs.modality import codec_for, codec_spec_for
from flagdit.config.schema import AudioConfig, Recipe
from flagdit.errors import DataError, RecipeError

CFG = AudioConfig(griffin_lim=24)


def chord(seconds: float = 0.512) -> torch.Tensor:
    time = torch.arange(int(CFG.sample_rate * seconds)) / CFG.sample_rate
    wave = sum(torch.sin(2 * torch.pi * f * time) for f in (220.0, 550.0, 1760.0)) / 5
    return wave[None, None, None]


def test_latents_are_of_order_one_and_show_the_frequencies():
    codec = MelCodec(CFG)
    latent = codec.encode(chord())
    assert latent.shape == (1, 1, 32, 32) and latent.abs().max() < 3
    loudest = latent[0, 0, :, 16]
    bands = mel_filters(CFG)
    at = [int(bands[:, round(f * CFG.window / CFG.sample_rate)].argmax()) for f in (220.0, 550.0, 1760.0)]
    assert set(loudest.topk(3).indices.tolist()) <= {b + d for b in at for d in (-1, 0, 1)}
    silence = codec.encode(torch.zeros(1, 1, 1, 8192))
    assert (silence == silence[0, 0, 0, 0]).all() and -1.6 < silence.mean() < -1.4


def test_there_and_back_keeps_the_spectrum():
    codec = MelCodec(CFG)
    latent = codec.encode(chord())
    sound = codec.decode(latent)
    assert sound.shape == (1, 1, 1, 8192) and torch.isfinite(sound).all() and 0.05 < sound.abs().max() < 1.5
    again = codec.encode(sound)
    loud = latent > 0
    assert (again - latent)[loud].abs().mean() < 0.15
    assert torch.equal(codec.decode(latent), sound), "equal latents sound equal"


def test_filters_cover_the_spectrum():
    filters = mel_filters(replace(CFG, mels=20))
    assert filters.shape == (20, 513) and (filters >= 0).all() and (filters.sum(1) > 0).all()
    widths = (filters > 0).sum(1)
    assert (widths[1:] >= widths[:-1] - 1).all(), "bands widen upwards"


@pytest.mark.parametrize("shape", [(2, 1, 1, 8192), (1, 1, 1, 8000), (1, 1, 1, 0)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(DataError, match="a sound of"):
        MelCodec(CFG).encode(torch.zeros(shape))


def test_impossible_spectrograms_are_refused():
    with pytest.raises(RecipeError, match=r"audio\.hop=600 must be at most half"):
        MelCodec(replace(CFG, hop=600))
    with pytest.raises(RecipeError, match=r"audio\.mels=400 is not possible: .*narrower"):
        MelCodec(replace(CFG, mels=400))


def test_lengths_of_latents():
    codec = MelCodec(CFG)
    assert codec.latent_shape(2.0, 4) == (1, 1, 32, 124)
    assert codec.latent_shape(0.001, 4) == (1, 1, 32, 4)


def test_masks_cover_every_column_that_they_touch():
    codec = MelCodec(AudioConfig())
    mask = torch.zeros(1, 1, 4 * codec.step, dtype=torch.bool)
    mask[..., codec.step] = mask[..., -1] = True
    assert codec.latent_mask(mask).tolist() == [[[[False, True, False, True]]]]


def test_an_autoencoder_over_spectrograms(tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=6, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    codec = MelCodec(replace(CFG, path=str(tmp_path / "vae"), griffin_lim=1))
    assert (codec.channels, codec.factor, codec.step) == (6, 2, 512)
    latent = codec.encode(chord())
    assert latent.shape == (6, 1, 16, 16) and codec.decode(latent).shape == (1, 1, 1, 8192)
    assert codec.spec()["autoencoder.class"] == "AutoencoderKL"


def test_each_modality_has_its_codec():
    recipe = Recipe()
    assert isinstance(codec_for(recipe, "audio"), MelCodec) and codec_for(recipe, "video").channels == 3
    assert codec_spec_for(recipe, "audio") == codec_for(recipe, "audio").spec() != codec_spec_for(recipe, "image")
