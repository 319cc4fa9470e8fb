"""Videos: scenes share out the frames, change smoothly, run around when they loop, and keep a first frame."""

from dataclasses import replace

import pytest
import torch

from flagdit.errors import RecipeError
from flagdit.generate.transition import scenes, schedule, smoothness


def levels(pixels):
    return pixels.mean((0, 2, 3))


def test_every_frame_is_shared_out():
    for count, frames, fade, loop in [
        (1, 8, 4, False),
        (2, 8, 4, False),
        (3, 12, 2, True),
        (3, 10, 0, False),
        (1, 5, 2, True),
    ]:
        share = schedule(count, frames, fade, loop)
        torch.testing.assert_close(share.sum(0), torch.ones(frames))
        assert share.min() >= 0
    assert schedule(2, 8, 4, loop=False)[0].tolist() == pytest.approx([1, 1, 0.875, 0.625, 0.375, 0.125, 0, 0])
    assert schedule(2, 8, 0, loop=False)[0].tolist() == [1] * 4 + [0] * 4
    around = schedule(2, 8, 4, loop=True)
    assert around[1, 0] == pytest.approx(0.375) and around[1, 7] == pytest.approx(0.625), "the last leads to the first"


def test_scenes_show_their_prompts_and_change_smoothly(painting, level):
    pipeline = painting("video", frames=24)
    video = scenes(pipeline, ["a dog", "a red cat"], pipeline.recipe.sample, size=(8, 8), window=8)
    found = levels(video)
    torch.testing.assert_close(found[:7], torch.full((7,), level("a dog")), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[-7:], torch.full((7,), level("a red cat")), rtol=1e-4, atol=1e-5)
    steps = found.diff().abs()
    assert (found.diff() * (level("a red cat") - level("a dog")) >= -1e-6).all(), "one way only"
    assert steps.max() < 0.4 * abs(level("a dog") - level("a red cat")), "in several steps"
    # windows are of the size that was asked for
    assert {s.shape[1] for _, batch, _ in pipeline.model.calls for s in batch.segments} == {8}


def test_a_loop_ends_where_it_began(painting, level):
    pipeline = painting("video", frames=24)
    video = scenes(pipeline, ["a dog", "a red cat"], pipeline.recipe.sample, size=(8, 8), window=8, loop=True)
    found = levels(video)
    largest = float(found.diff().abs().max())
    assert abs(found[0] - found[-1]) <= largest + 1e-4 and largest < 0.4 * abs(level("a dog") - level("a red cat"))


def test_a_first_frame_stays_and_the_rest_is_drawn(painting, level):
    pipeline = painting("video", frames=6)
    picture = torch.rand(3, 1, 8, 8) * 2 - 1
    video = scenes(pipeline, ["a dog"], pipeline.recipe.sample, size=(8, 8), window=4, first_frame=picture)
    torch.testing.assert_close(video[:, :1], picture, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(levels(video)[1:], torch.full((5,), level("a dog")), rtol=1e-4, atol=1e-5)
    with pytest.raises(RecipeError, match="first frame is 4x4"):
        scenes(pipeline, ["a dog"], pipeline.recipe.sample, size=(8, 8), first_frame=torch.zeros(3, 1, 4, 4))


def test_modalities_without_frames_are_told(painting):
    pipeline = painting("image")
    with pytest.raises(RecipeError, match="image has no frames"):
        scenes(pipeline, ["a dog"], pipeline.recipe.sample, size=(8, 8))


def test_smoothness_compares_changes_with_the_rest():
    steady = torch.linspace(0, 1, 12).view(1, 12, 1, 1).expand(3, 12, 4, 4)
    assert smoothness(steady, [6]) == pytest.approx(1, abs=1e-4)
    cut = torch.cat([steady[:, :6], steady[:, 6:] + 1], dim=1)
    assert smoothness(cut, [6]) == pytest.approx(12, rel=1e-3)


def test_views_of_an_object_in_any_number(painting):
    pipeline = painting("multiview", frames=9)
    video = scenes(pipeline, ["a dog"], pipeline.recipe.sample, size=(8, 8), window=4, loop=True)
    assert video.shape == (3, 9, 8, 8)
    (whole,) = pipeline.generate(["a dog"], replace(pipeline.recipe.sample, frames=5))
    assert whole.shape == (3, 5, 8, 8)
