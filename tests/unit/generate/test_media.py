"""Clips, view sheets and sounds as files that other programs open."""

import wave

import numpy as np
import pytest
import torch
from PIL import Image

from flagdit.errors import RecipeError
from flagdit.generate.media import check_any_name, check_media_name, save_samples


def clip(frames: int, level: float = 0.0) -> torch.Tensor:
    return torch.linspace(-1, 1, frames).view(1, -1, 1, 1).expand(3, frames, 8, 8) * 0.8 + level


def test_an_mp4_has_the_frames(tmp_path):
    import av

    (file,) = save_samples([clip(8), clip(5)], "video", tmp_path / "new" / "a.mp4", rate=16000)
    with av.open(str(file)) as container:
        frames = [f.to_ndarray(format="rgb24").mean() for f in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 8
    assert len(frames) == 8 and frames[-1] > frames[0] + 50


def test_a_gif_has_the_frames(tmp_path):
    (file,) = save_samples([clip(6)], "video", tmp_path / "a.gif", rate=16000)
    assert Image.open(file).n_frames == 6


def test_views_stand_in_rows(tmp_path):
    one, two = (torch.full((3, 4, 8, 8), level) for level in (-1.0, 0.5))
    (file,) = save_samples([one, two], "multiview", tmp_path / "views.png", rate=16000)
    sheet = np.asarray(Image.open(file)).mean(-1)
    height, width = sheet.shape
    assert width == 4 * 8 * (height // 2 // 8) and sheet[2].mean() < 5 and 180 < sheet[-2].mean() < 200


@pytest.mark.parametrize("ending", [".gif", ".mp4"])
def test_views_turn_in_a_clip(tmp_path, ending):
    import av

    (file,) = save_samples([clip(5), clip(5)], "multiview", tmp_path / f"turn{ending}", rate=16000)
    with av.open(str(file)) as container:
        levels = [f.to_ndarray(format="rgb24")[:, :40].mean() for f in container.decode(video=0)]
    assert len(levels) == 5 and levels == sorted(levels) and levels[-1] > levels[0] + 100


def test_sounds_get_a_file_each(tmp_path):
    tone = torch.sin(torch.arange(1600) / 5)[None, None, None]
    (file,) = save_samples([tone], "audio", tmp_path / "a.wav", rate=8000)
    with wave.open(str(file)) as sound:
        assert (sound.getframerate(), sound.getnframes(), sound.getnchannels()) == (8000, 1600, 1)
    files = save_samples([tone, tone], "audio", tmp_path / "b.wav", rate=8000)
    assert [f.name for f in files] == ["b_0000.wav", "b_0001.wav"] and all(f.is_file() for f in files)


def test_names_suit_the_modality(tmp_path):
    for name, modality in (("a.png", "video"), ("a.mp4", "audio"), ("a.wav", "image")):
        check_any_name(tmp_path / name)
        with pytest.raises(RecipeError, match="End it in"):
            check_media_name(tmp_path / name, modality)
    with pytest.raises(RecipeError, match="not a picture file, clip or sound"):
        check_any_name(tmp_path / "a.txt")


def test_one_picture_keeps_its_size_and_several_are_enlarged(tmp_path):
    """What is drawn can be edited: the file of one picture is that picture."""
    picture = torch.rand(3, 1, 8, 12) * 2 - 1
    (file,) = save_samples([picture], "image", tmp_path / "one.png", rate=16000)
    assert Image.open(file).size == (12, 8)
    (file,) = save_samples([picture, picture], "image", tmp_path / "two.png", rate=16000)
    assert Image.open(file).size == (12 * 10 * 2 + 4, 8 * 10)
