"""Sizes beyond training: settings follow from the recipe, stages grow, sets share attention."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from flagdit.errors import RecipeError
from flagdit.generate.inference import shared
from flagdit.generate.pipeline import Pipeline
from flagdit.generate.resolution import resize, stages, upscale
from flagdit.model.flag_dit import Inference
from flagdit.model.rope import RopeScaling


@pytest.fixture
def pipeline(recipe, random_model):
    return Pipeline.build(random_model(recipe), recipe)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_trained_size_gives_factors_and_base(pipeline):
    cfg = replace(pipeline.recipe.sample, train_size="8x12", scaling="ntk", watershed=0.7)
    assert pipeline.inference(cfg) == Inference(RopeScaling("ntk", trained=(6, 4), watershed=0.7), proportional_base=30)
    assert pipeline.inference(replace(cfg, scaling="none", proportional=False)) == Inference()
    assert pipeline.inference(pipeline.recipe.sample) == Inference()


def test_raster_models_count_tokens_and_videos_frames(recipe, random_model):
    def inference(**changes):
        sample = replace(recipe.sample, modality="video", train_size="8x8", train_frames=5, scaling="linear")
        model = replace(recipe.model, modalities={"video": 3}, **changes)
        changed = replace(recipe, model=model, sample=sample)
        return Pipeline.build(random_model(changed), changed).inference(sample)

    tokens = 5 * (4 * 5 + 1)
    assert inference(rope="raster").rope == RopeScaling("linear", trained=(tokens,))
    assert inference(rope="axial", rope_axes=3).rope == RopeScaling("linear", trained=(5, 4, 4))
    assert inference().proportional_base == tokens


def test_scaling_changes_larger_pictures_only(pipeline):
    cfg = pipeline.recipe.sample
    plain = pipeline.generate(["a dog"] * 2, cfg, sizes=[(8, 8), (16, 8)])
    for scaling in ("linear", "ntk", "time_aware", "time_switch"):
        found = pipeline.generate(
            ["a dog"] * 2, replace(cfg, train_size="8x8", scaling=scaling, proportional=False), sizes=[(8, 8), (16, 8)]
        )
        close(found[0], plain[0])
        assert (found[1] - plain[1]).abs().max() > 1e-4
    before = {name: p.clone() for name, p in pipeline.model.state_dict().items()}
    assert all(torch.equal(p, before[n]) for n, p in pipeline.model.state_dict().items()), "no state"
    again = pipeline.generate(["a dog"] * 2, cfg, sizes=[(8, 8), (16, 8)])
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))


def test_proportional_attention_knows_the_trained_length(pipeline):
    cfg = replace(pipeline.recipe.sample, train_size="8x8", scaling="none")
    at_home = pipeline.generate(["a dog"], cfg, sizes=[(8, 8)])[0]
    close(at_home, pipeline.generate(["a dog"], pipeline.recipe.sample, sizes=[(8, 8)])[0])
    large, plain = (pipeline.generate(["a dog"], c, sizes=[(16, 16)])[0] for c in (cfg, pipeline.recipe.sample))
    assert (large - plain).abs().max() > 1e-3


def test_the_shift_grows_with_the_tokens(pipeline):
    cfg = replace(pipeline.recipe.sample, shift=2.0, shift_tokens=20)
    mixed = pipeline.generate(["a dog"] * 3, cfg, sizes=[(8, 8), (16, 16), (8, 8)])
    close(mixed[0], pipeline.generate(["a dog"], replace(cfg, shift_tokens=0), sizes=[(8, 8)])[0])
    alone = pipeline.generate(
        ["a dog"], replace(cfg, shift=2.0 * (72 / 20) ** 0.5, shift_tokens=0), sizes=[(16, 16)], first_id=1
    )
    close(mixed[1], alone[0])


def test_stages_keep_the_aspect_ratio_and_grow_by_two_at_most():
    assert stages((24, 24), (24, 24), 4) == [(24, 24)]
    assert stages((24, 24), (26, 26), 2) == [(26, 26)], "too little to gain"
    assert stages((24, 24), (48, 48), 4) == [(24, 24), (48, 48)]
    assert stages((1024, 1024), (4096, 2048), 16) == [(1456, 720), (2432, 1216), (4096, 2048)]
    for last in [(96, 24), (40, 200), (512, 512)]:
        plan = stages((24, 24), last, 4)
        areas = [w * h for w, h in plan]
        assert plan[-1] == last and areas == sorted(areas) and all(w % 4 == h % 4 == 0 for w, h in plan)
        assert all(b <= 4 * a * 1.5 for a, b in pairwise(areas))


def test_upscaling_refines_what_was_drawn_small(painting, level):
    pipeline = painting(train_size="8x8")
    (drawn,) = upscale(pipeline, ["a dog"], pipeline.recipe.sample, sizes=[(32, 16)], strength=0.5)
    assert drawn.shape == (3, 1, 16, 32)
    close(drawn, torch.full_like(drawn, level("a dog")))
    sizes = [batch.segments[0].shape[2:] for _, batch, _ in pipeline.model.calls]
    assert list(dict.fromkeys(sizes)) == [(6, 12), (10, 20), (16, 32)] or len(set(sizes)) == len(
        stages((8, 8), (32, 16), 2)
    )
    starts = [float(t[0]) for t, batch, _ in pipeline.model.calls if batch.segments[0].shape[2:] == (16, 32)]
    assert min(starts) == 0.5
    with pytest.raises(RecipeError, match="Give --train-size"):
        upscale(pipeline, ["a"], replace(pipeline.recipe.sample, train_size=None), sizes=[(8, 8)])


def test_resizing_keeps_flat_pictures_flat():
    flat = torch.full((3, 2, 8, 8), 0.3)
    assert resize(flat, (20, 12)).shape == (3, 2, 12, 20)
    close(resize(flat, (20, 12)), torch.full((3, 2, 12, 20), 0.3))


def test_a_set_shares_attention_until_a_time(pipeline):
    cfg = replace(pipeline.recipe.sample, guidance=3.0)
    prompts = ["a dog", "a red cat", "blue sky"]
    alone = pipeline.generate(prompts, cfg)

    def drawn(until, count=3):
        return pipeline.generate(prompts, cfg, inference=shared(Inference(), count, until))

    for a, b in zip(drawn(0.0), alone, strict=True):
        close(a, b)
    for a, b in zip(drawn(1.0, count=1), alone, strict=True):
        close(a, b)
    early, whole = drawn(0.5), drawn(1.0)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(early, alone, strict=True))
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(whole, early, strict=True))
    with pytest.raises(RecipeError, match="sets of 2 samples"):
        drawn(1.0, count=2)


def test_samples_of_a_set_depend_on_each_other_and_halves_of_guidance_do_not(pipeline):
    cfg = replace(pipeline.recipe.sample, guidance=3.0)
    inference = Inference(sets=(2,))
    first = pipeline.generate(["a dog", "a red cat"], cfg, inference=inference)[0]
    other = pipeline.generate(["a dog", "blue sky"], cfg, inference=inference)[0]
    assert (first - other).abs().max() > 1e-3
