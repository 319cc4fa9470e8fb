"""Canvases of views: weights, windows, cover, wrapping; regions and panoramas show what each part was asked for."""

from dataclasses import replace

import pytest
import torch

from flagdit.errors import RecipeError
from flagdit.generate.canvas import View, draw_canvas, ramp, windows
from flagdit.generate.compose import Region, compose, panorama
from flagdit.generate.pipeline import Pipeline

FULL = torch.tensor(1.0)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("length", "window", "overlap", "wrap"),
    [
        (12, 4, 0.5, False),
        (13, 4, 0.3, False),
        (9, 4, 0, True),
        (12, 5, 0.6, True),
        (3, 4, 0.5, False),
        (4, 4, 0, True),
    ],
)
def test_windows_cover_and_overlap(length, window, overlap, wrap):
    starts = windows(length, window, overlap, wrap)
    window = min(window, length)
    covered = {(s + i) % length for s in starts for i in range(window)}
    assert covered == set(range(length)) and starts == sorted(set(starts)) and starts[0] == 0
    if not wrap:
        assert starts[-1] == length - window
    gaps = [b - a for a, b in zip(starts, starts[1:] + ([length] if wrap and len(starts) > 1 else []), strict=False)]
    assert all(gap <= max(1, window * (1 - overlap)) for gap in gaps)


def test_an_overlap_of_one_would_never_end():
    with pytest.raises(RecipeError, match="overlap of 1"):
        windows(8, 4, 1.0, wrap=False)


def test_a_ramp_rises_from_both_ends():
    assert ramp(6, 2).tolist() == pytest.approx([1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3])
    assert ramp(3, 0).tolist() == [1, 1, 1] and (ramp(5, 9) > 0).all()


def test_one_view_of_the_whole_is_the_picture_itself(recipe, random_model):
    """The same noise, the same numbers as sampling without a canvas."""
    pipeline = Pipeline.build(random_model(recipe), recipe)
    view = View("a dog", (0, 0, 0), (1, 4, 6), FULL)
    drawn = draw_canvas(pipeline, [view], recipe.sample, size=(12, 8), sample_id=5)
    close(drawn, pipeline.generate(["a dog"], recipe.sample, sizes=[(12, 8)], first_id=5)[0])


def test_views_may_run_in_several_packs(recipe, random_model):
    pipeline = Pipeline.build(random_model(recipe), recipe)
    views = [View(p, (0, 0, x), (1, 4, 4), FULL) for p, x in (("a dog", 0), ("a red cat", 2), ("a cat", 4))]
    together = draw_canvas(pipeline, views, recipe.sample, size=(16, 8))
    close(draw_canvas(pipeline, views, recipe.sample, size=(16, 8), pack_tokens=1), together)


def test_a_wrapped_view_joins_the_edges(recipe, random_model):
    """A canvas of one window that starts at column 2 and runs around is the plain picture, rolled, of rolled noise."""
    pipeline = Pipeline.build(random_model(recipe), replace(recipe, sample=replace(recipe.sample, steps=1)))
    cfg = pipeline.recipe.sample
    view = View("a dog", (0, 0, 2), (1, 4, 4), FULL)
    around = draw_canvas(pipeline, [view], cfg, size=(8, 8), wrap=(False, False, True))
    plain = draw_canvas(pipeline, [replace(view, start=(0, 0, 0))], cfg, size=(8, 8))
    assert (around - plain).abs().max() > 1e-3
    with pytest.raises(RecipeError, match="columns 2 to 5 leaves a canvas of 4"):
        draw_canvas(pipeline, [view], cfg, size=(8, 8))


def test_what_no_view_covers_is_told(painting):
    pipeline = painting()
    view = View("a dog", (0, 0, 0), (1, 4, 2), FULL)
    with pytest.raises(RecipeError, match=r"frame 0, row 0, column 2.*regions that cover it"):
        draw_canvas(pipeline, [view], pipeline.recipe.sample, size=(8, 8))


def test_each_region_shows_its_prompt(painting, level):
    pipeline = painting()
    regions = [Region("a dog", 0, 0, 8, 8), Region("a red cat", 12, 4, 8, 8)]
    drawn = compose(pipeline, regions, pipeline.recipe.sample, size=(20, 12), background="blue sky", fade=0)
    assert drawn.shape == (3, 1, 12, 20)

    def mix(prompt):  # the background counts a twentieth
        return (level(prompt) + 0.05 * level("blue sky")) / 1.05

    close(drawn[:, 0, :8, :8], torch.full((3, 8, 8), mix("a dog")))
    close(drawn[:, 0, 4:, 12:], torch.full((3, 8, 8), mix("a red cat")))
    close(drawn[:, 0, :4, 12:], torch.full((3, 4, 8), level("blue sky")))
    # the model sees the regions at their own size
    sizes = {s.shape for _, batch, _ in pipeline.model.calls for s in batch.segments}
    assert sizes == {(3, 1, 8, 8), (3, 1, 12, 20)}


def test_regions_that_cover_need_no_background(painting, level):
    pipeline = painting()
    halves = [Region("a dog", 0, 0, 4, 8), Region("a cat", 4, 0, 4, 8)]
    drawn = compose(pipeline, halves, pipeline.recipe.sample, size=(8, 8))
    close(drawn[..., :4], torch.full((3, 1, 8, 4), level("a dog")))
    with pytest.raises(RecipeError, match="nothing says what to draw"):
        compose(pipeline, halves[:1], pipeline.recipe.sample, size=(8, 8))
    with pytest.raises(RecipeError, match=r"a region of 8x8\+1\+0 must be made of multiples of 2 pixels"):
        compose(pipeline, [Region("a dog", 1, 0, 8, 8)], pipeline.recipe.sample, size=(16, 8), background="")


def test_regions_as_text():
    assert Region.parse("24x16+8+0 a dog, 3x3+1+1") == Region("a dog, 3x3+1+1", 8, 0, 24, 16)
    assert Region.parse("24x16+8+0 a dog").place == "24x16+8+0"
    assert Region.parse(" 4x4+0+0:  a cat ") == Region("a cat", 0, 0, 4, 4)
    for text in ("24x16 a dog", "24x16+0+0", "a dog", "24x16+-1+0 a dog"):
        with pytest.raises(RecipeError, match="is not a region"):
            Region.parse(text)


def test_a_panorama_goes_through_its_prompts(painting, level):
    pipeline = painting()
    drawn = panorama(pipeline, ["a dog", "a cat"], pipeline.recipe.sample, size=(40, 8), window=(8, 8))
    columns = drawn.mean((0, 1, 2))
    close(columns[:8], torch.full((8,), level("a dog")))
    close(columns[-8:], torch.full((8,), level("a cat")))
    low, high = sorted((level("a dog"), level("a cat")))
    assert ((columns > low - 1e-4) & (columns < high + 1e-4)).all()
    assert {s.shape for _, batch, _ in pipeline.model.calls for s in batch.segments} == {(3, 1, 8, 8)}


def test_the_edges_of_a_wrapped_panorama_meet(recipe, random_model):
    """Shifting the noise around shifts the panorama: no column is special where it wraps."""
    pipeline = Pipeline.build(random_model(recipe), recipe)
    drawn = panorama(pipeline, ["a dog"], recipe.sample, size=(24, 8), window=(8, 8), wrap=True)
    open_ends = panorama(pipeline, ["a dog"], recipe.sample, size=(24, 8), window=(8, 8))
    assert drawn.shape == open_ends.shape == (3, 1, 8, 24) and (drawn - open_ends).abs().max() > 1e-3


def test_a_tall_panorama_has_windows_below_each_other(painting):
    pipeline = painting()
    drawn = panorama(pipeline, ["a dog"], pipeline.recipe.sample, size=(8, 24), window=(16, 8))
    assert drawn.shape == (3, 1, 24, 8) and drawn.std() < 1e-4
