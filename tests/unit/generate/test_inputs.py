"""Files of every modality become samples that the model can make."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from flagdit.data_pipelines.sound import wav
from flagdit.errors import RecipeError
from flagdit.generate import inputs
from flagdit.generate.media import save_samples
from flagdit.generate.pipeline import Pipeline

RATE = 8000


@pytest.fixture
def pipeline_of(recipe, random_model):
    """A function: modality → a pipeline; frames of 12x8 pixels and sounds of 8 bands, 256 samples to a token."""

    def make(modality: str) -> Pipeline:
        channels = 1 if modality == "audio" else 3
        audio = replace(recipe.audio, sample_rate=RATE, mels=8, hop=128, window=512, griffin_lim=4)
        changed = replace(
            recipe,
            model=replace(recipe.model, modalities={modality: channels}, rope_axes=3),
            sample=replace(recipe.sample, modality=modality),
            audio=audio,
        )
        return Pipeline.build(random_model(changed), changed)

    return make


def ramp(frames: int, height: int = 8, width: int = 12) -> torch.Tensor:
    return torch.linspace(-0.8, 0.8, frames).view(1, -1, 1, 1).expand(3, frames, height, width)


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_a_clip_comes_back(pipeline_of, tmp_path, name):
    (file,) = save_samples([ramp(6)], "video", tmp_path / name, rate=RATE, separate=True)
    pipeline = pipeline_of("video")
    clip = inputs.load_sample(file, pipeline, "video")
    assert clip.shape == (3, 6, 8, 12)
    torch.testing.assert_close(clip, ramp(6), atol=0.05, rtol=0)
    assert torch.equal(inputs.load_sample(file, pipeline, "video", frames=4), clip[:, :4])
    assert inputs.load_sample(file, pipeline, "video", size=(6, 4)).shape == (3, 6, 4, 6)
    assert inputs.load_sample(file, pipeline_of("multiview"), "multiview").shape == clip.shape


def test_views_stand_side_by_side_or_below_one_another(pipeline_of, tmp_path):
    pipeline = pipeline_of("multiview")
    (file,) = save_samples([ramp(4)], "multiview", tmp_path / "a.png", rate=RATE, separate=True)
    views = inputs.load_sample(file, pipeline, "multiview", frames=4)
    torch.testing.assert_close(views, ramp(4), atol=1 / 127, rtol=0)
    below = np.concatenate(np.split(np.asarray(Image.open(file)), 4, axis=1), axis=0)
    Image.fromarray(below).save(tmp_path / "below.png")
    assert torch.equal(inputs.load_sample(tmp_path / "below.png", pipeline, "multiview", frames=4), views)
    assert inputs.load_sample(file, pipeline, "multiview").shape == (3, 1, 8, 48)
    with pytest.raises(RecipeError, match="48×8 px are not 5 views of one size; see --frames"):
        inputs.load_sample(file, pipeline, "multiview", frames=5)


def test_a_sound_ends_with_a_whole_token(pipeline_of, tmp_path):
    wave = np.sin(np.arange(1000) / 9).astype(np.float32) * 0.5
    (tmp_path / "a.wav").write_bytes(wav(wave, RATE))
    pipeline = pipeline_of("audio")
    sound = inputs.load_sample(tmp_path / "a.wav", pipeline, "audio")
    assert sound.shape == (1, 1, 1, 1024) and sound[..., 1000:].eq(0).all()
    np.testing.assert_allclose(sound[0, 0, 0, :1000], wave, atol=1e-3)
    assert inputs.load_sample(tmp_path / "a.wav", pipeline, "audio", seconds=0.05).shape[-1] == 512


def test_masks_are_pictures_or_clips(pipeline_of, tmp_path):
    pipeline, clip = pipeline_of("video"), ramp(6)
    left = Image.new("L", (24, 16), 0)
    left.paste(255, (0, 0, 12, 16))
    left.save(tmp_path / "left.png")
    mask = inputs.load_mask(tmp_path / "left.png", pipeline, "video", clip)
    assert mask.shape == (1, 8, 12) and mask[..., :6].all() and not mask[..., 6:].any()
    (moving,) = save_samples([ramp(6)], "video", tmp_path / "m.gif", rate=RATE, separate=True)
    mask = inputs.load_mask(moving, pipeline, "video", clip)
    assert mask.shape == (6, 8, 12) and mask[3:].all() and not mask[:3].any()
    left.save(tmp_path / "views.png")
    mask = inputs.load_mask(tmp_path / "views.png", pipeline_of("multiview"), "multiview", ramp(2))
    assert mask.shape == (2, 8, 12) and mask[0].all() and not mask[1].any()
    with pytest.raises(RecipeError, match=r"Give --between FROM TO"):
        inputs.load_mask(tmp_path / "left.png", pipeline_of("audio"), "audio", torch.zeros(1, 1, 1, 256))


def test_seconds_choose_frames_and_samples():
    mask = inputs.between(ramp(8), "video", RATE, 0.25, 0.5)
    assert mask.shape == (8, 8, 12) and mask.flatten(1).all(1).tolist() == [False] * 2 + [True] * 2 + [False] * 4
    mask = inputs.between(torch.zeros(1, 1, 1, RATE), "audio", RATE, 0.5, 9)
    assert mask.shape == (1, 1, RATE) and mask.nonzero()[0, 2] == RATE // 2 and mask.sum() == RATE // 2
    with pytest.raises(RecipeError, match="nothing is between 2 and 3 of 1 seconds"):
        inputs.between(ramp(8), "video", RATE, 2, 3)
    with pytest.raises(RecipeError, match="nothing is between"):
        inputs.between(ramp(1), "video", RATE, 0.5, 0.2)
    with pytest.raises(RecipeError, match="has no seconds"):
        inputs.between(ramp(1), "image", RATE, 0, 1)


def test_the_ending_says_what_a_file_is(tmp_path):
    assert inputs.modality_for(tmp_path / "a.PNG", ["video", "image"]) == "image"
    assert inputs.modality_for(tmp_path / "a.png", ["video", "multiview"]) == "multiview"
    assert inputs.modality_for(tmp_path / "a.mp4", ["multiview", "image"]) == "multiview"
    assert inputs.modality_for(tmp_path / "a.flac", ["image", "audio"]) == "audio"
    with pytest.raises(RecipeError, match="is a sound, and this model makes image, video"):
        inputs.modality_for(tmp_path / "a.wav", ["image", "video"])
    with pytest.raises(RecipeError, match=r"a\.txt is no picture, clip or sound"):
        inputs.modality_for(tmp_path / "a.txt", ["image"])


def test_files_that_cannot_be_read_are_told(pipeline_of, tmp_path):
    pipeline = pipeline_of("video")
    with pytest.raises(RecipeError, match=r"gone\.mp4: no such file"):
        inputs.load_sample(tmp_path / "gone.mp4", pipeline, "video")
    (tmp_path / "text.mp4").write_text("no clip")
    with pytest.raises(RecipeError, match=r"text\.mp4: the clip cannot be read"):
        inputs.load_sample(tmp_path / "text.mp4", pipeline, "video")
    (tmp_path / "text.wav").write_text("no sound")
    with pytest.raises(RecipeError, match=r"text\.wav: the sound cannot be read"):
        inputs.load_sample(tmp_path / "text.wav", pipeline_of("audio"), "audio")
    with pytest.raises(RecipeError, match="a sound is not of modality video"):
        inputs.load_sample(tmp_path / "text.wav", pipeline, "video")
    (file,) = save_samples([ramp(3)], "video", tmp_path / "a.mp4", rate=RATE, separate=True)
    with pytest.raises(RecipeError, match="3 frames at 8 a second are fewer than 4"):
        inputs.load_sample(file, pipeline, "video", frames=4)
    limited = replace(pipeline.recipe, limits=replace(pipeline.recipe.limits, max_frames=2))
    with pytest.raises(RecipeError, match=r"limits\.max_frames=2"):
        inputs.load_sample(file, replace(pipeline, recipe=limited), "video")
