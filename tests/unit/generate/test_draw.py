"""Ways to draw: each reaches its feature, excludes the others, and presets cost what they say."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from flagdit.errors import RecipeError
from flagdit.generate.draw import Way, draw
from flagdit.generate.pipeline import Pipeline
from flagdit.generate.presets import PRESETS
from flagdit.generate.sample import sample_to_files, settings_of

PASSES = {"draft": (10, 15), "fast": (20, 30), "standard": (60, 120), "fine": (120, 240)}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_costs_what_it_says(recipe, random_model, name):
    pipeline = Pipeline.build(random_model(recipe), recipe)
    calls = []
    pipeline.model.register_forward_pre_hook(lambda module, args: calls.append(len(args[1])))
    pipeline.generate(["a dog"], settings_of(recipe, name, {"guidance": 3.0, "size": "4x4"}))
    assert (len(calls), sum(calls)) == PASSES[name]


def test_given_settings_win_over_a_preset(recipe):
    cfg = settings_of(recipe, "fast", {"steps": 7, "solver": None, "train_size": "16"})
    assert (cfg.steps, cfg.solver, cfg.schedule, cfg.train_size) == (7, "midpoint", "sigmoid", "16x16")
    with pytest.raises(RecipeError, match="Use one of draft, fast"):
        settings_of(recipe, "slow", {})
    with pytest.raises(RecipeError, match=r"scaling=magic.*none, linear"):
        settings_of(recipe, None, {"scaling": "magic"})
    with pytest.raises(RecipeError, match="guidance_interval"):
        settings_of(recipe, None, {"guidance_interval": [0.5, 0.2]})


def test_frames_are_of_the_modality_that_the_recipe_names(recipe):
    clips = replace(recipe, model=replace(recipe.model, modalities={"video": 3, "audio": 1}))
    clips = replace(clips, sample=replace(clips.sample, modality="video", frames=8))
    assert settings_of(clips, None, {"modality": "audio"}).frames == 1
    assert settings_of(clips, None, {"modality": "video"}).frames == settings_of(clips, None, {}).frames == 8
    assert settings_of(clips, None, {"modality": "audio", "frames": 3}).frames == 3  # which is refused when it is drawn


def test_ways_exclude_each_other():
    with pytest.raises(RecipeError, match="--upscale and --share exclude"):
        Way(upscale=0.5, share=0.5).check()
    with pytest.raises(RecipeError, match="--region and --window exclude"):
        Way.of(regions=["4x4+0+0 a"], window="8x8", first_frame=None)
    for way in (Way(wrap=True), Way(loop=True), Way(window_frames=3), Way(first_frame=torch.zeros(3, 1, 2, 2))):
        with pytest.raises(RecipeError, match="no effect"):
            way.check()


def test_every_way_gives_its_pictures(painting, level):
    pipeline = painting(train_size="8x8")
    cfg, prompts = pipeline.recipe.sample, ["a dog", "a red cat"]

    def shapes(way, conditions=prompts, size=(16, 8)):
        sizes = [size] * max(len(conditions), 1)
        return [tuple(p.shape[1:]) for p in draw(pipeline, conditions, cfg, way, sizes=sizes)]

    assert shapes(Way()) == shapes(Way(upscale=0.5)) == shapes(Way(share=0.5)) == [(1, 8, 16)] * 2
    assert shapes(Way(window=(8, 8))) == [(1, 8, 16)]
    regions = Way.of(regions=["8x8+0+0 a dog", "8x8+8+0 a cat"], window=None, first_frame=None)
    assert shapes(regions, []) == shapes(regions, ["blue"]) == [(1, 8, 16)]
    with pytest.raises(RecipeError, match="2 prompts beside regions"):
        shapes(regions)
    video = painting("video", frames=6)
    way = Way(scenes=True, loop=True, window_frames=4, first_frame=torch.zeros(3, 1, 4, 4))
    (drawn,) = draw(video, prompts, video.recipe.sample, way, sizes=[(8, 8)])
    assert drawn.shape == (3, 6, 8, 8) and drawn[:, 0].abs().max() < 1e-4, "the first frame, at the video's size"


def test_ways_from_the_command_to_files(recipe, save_run, tmp_path):
    run = save_run(recipe)
    (file,) = sample_to_files(
        run,
        ["a dog", "a cat"],
        tmp_path / "p.png",
        sizes=["24x8"],
        way=Way(window=(8, 8)),
        separate=True,
        captions=True,
    )
    assert Image.open(file).size == (24, 8)
    sets = [
        sample_to_files(run, ["a dog", "a cat"], tmp_path / f"{i}.png", way=Way(share=1.0), repeat=n, separate=True)
        for i, n in enumerate((1, 2))
    ]
    assert [len(s) for s in sets] == [2, 4]
    first, again = ([Path(f).read_bytes() for f in s] for s in sets)
    assert again[:2] == first and again[2:] != first
