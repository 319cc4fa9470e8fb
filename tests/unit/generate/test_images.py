"""Pixels to pictures and sheets."""

import numpy as np
import pytest
import torch
from PIL import Image

from flagdit.errors import RecipeError
from flagdit.generate.images import CAPTION_HEIGHT, CAPTION_WIDTH, check_name, grid, save_image, to_image, zoom_for


def test_levels_are_rounded_and_cut():
    row = torch.tensor([-2.0, -1.0, 0.0, 1 / 255, 1.0, 3.0, 0.5])
    image = to_image(row.expand(3, 1, 2, 7))
    assert image.size == (7, 2) and image.mode == "RGB"
    assert np.asarray(image)[1, :, 0].tolist() == [0, 0, 128, 128, 255, 255, 191]


def test_every_level_survives_the_way_to_pixels_and_back():
    levels = torch.arange(256).float().expand(3, 1, 1, 256)
    assert np.asarray(to_image(levels / 127.5 - 1))[0, :, 2].tolist() == list(range(256))


def test_frames_stand_side_by_side():
    video = torch.full((3, 2, 4, 5), -1.0)
    video[0, 1] = 1.0
    pixels = np.asarray(to_image(video))
    assert pixels.shape == (4, 10, 3)
    assert (pixels[:, :5] == 0).all() and (pixels[:, 5:] == [255, 0, 0]).all()


def square(colour, width=4, height=4):
    return Image.new("RGB", (width, height), colour)


def test_grid_places_pictures_row_by_row():
    sheet = np.asarray(grid([square("red"), square("lime"), square("blue")], columns=2, zoom=3, gap=1))
    assert sheet.shape == (25, 25, 3)
    assert (sheet[:12, :12] == [255, 0, 0]).all() and (sheet[:12, 13:] == [0, 255, 0]).all()
    assert (sheet[13:, :12] == [0, 0, 255]).all() and (sheet[13:, 13:] == 255).all()
    assert (sheet[12] == 255).all() and (sheet[:, 12] == 255).all()


def test_grid_of_mixed_sizes_centres_each_picture():
    sheet = np.asarray(grid([square("red", 8, 2), square("blue", 2, 6)], columns=2, gap=0))
    assert sheet.shape == (6, 16, 3)
    assert (sheet[2:4, :8] == [255, 0, 0]).all() and (sheet[:, 11:13] == [0, 0, 255]).all()
    assert (sheet == 255).all(-1).sum() == 6 * 16 - 16 - 12


def test_grid_is_as_square_as_it_gets():
    assert [grid([square("red")] * n, gap=0).size for n in (1, 2, 4, 5)] == [(4, 4), (8, 4), (8, 8), (12, 8)]


def test_captions_stand_under_their_pictures_and_are_cut_to_the_cell():
    long = "a very long caption " * 20
    sheet = np.asarray(grid([square("red"), square("red")], columns=2, gap=4, captions=["dog", long]))
    assert sheet.shape == (4 + CAPTION_HEIGHT, 2 * CAPTION_WIDTH + 4, 3)
    dark = (sheet < 100).all(-1)
    assert dark[4:, :CAPTION_WIDTH].any() and dark[4:, CAPTION_WIDTH + 4 :].any()
    assert not dark[:, CAPTION_WIDTH : CAPTION_WIDTH + 4].any(), "a caption ran out of its cell"


def test_small_pictures_are_enlarged():
    assert [zoom_for([square("red", n, 8)]) for n in (8, 24, 64, 128, 500)] == [16, 5, 2, 1, 1]


def test_pictures_are_saved_in_new_folders(tmp_path):
    save_image(square("red"), tmp_path / "a/b/c.png")
    assert Image.open(tmp_path / "a/b/c.png").size == (4, 4)


def test_what_cannot_be_saved_is_told(tmp_path):
    for name in ("x", "x.txt", "x.npy"):
        with pytest.raises(RecipeError, match=r"End it in \.png"):
            check_name(tmp_path / name)
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="cannot be written"):
        save_image(square("red"), tmp_path / "file/x.png")
