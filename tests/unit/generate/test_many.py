"""Prompt files: no picture twice, none missing, the same on any number of ranks and after interruptions."""

import json
import wave
from dataclasses import replace

import pytest
from PIL import Image

from flagdit.errors import RecipeError
from flagdit.generate.draw import Way, draw
from flagdit.generate.many import draw_many, sample_many
from flagdit.generate.pipeline import Pipeline

PROMPTS = ["a dog", "a red cat", "blue sky", "a cat on a mat", "a dog"]


@pytest.fixture
def pipeline(recipe, random_model):
    return Pipeline.build(random_model(recipe), recipe)


def pictures(folder):
    return {f.name: Image.open(f).convert("RGB").tobytes() for f in folder.glob("*.png")}


def near(a, b):
    """Equal up to one level: packs of other samples round otherwise."""
    assert a.keys() == b.keys()
    assert all(max(abs(x - y) for x, y in zip(a[k], b[k], strict=True)) <= 1 for k in a)


def test_ranks_share_the_pictures_out(pipeline, tmp_path):
    cfg = pipeline.recipe.sample
    assert draw_many(pipeline, PROMPTS, tmp_path / "one", cfg, repeat=2) == 10
    alone = pictures(tmp_path / "one")
    assert sorted(alone) == [f"{i:06d}.png" for i in range(10)]
    assert len(set(alone.values())) == 10, "equal prompts have noise of their own"
    counts = [draw_many(pipeline, PROMPTS, tmp_path / "three", cfg, repeat=2, rank=r, size=3) for r in range(3)]
    assert counts == [4, 3, 3]
    near(pictures(tmp_path / "three"), alone)


def test_an_interrupted_run_goes_on(pipeline, tmp_path):
    cfg, out = pipeline.recipe.sample, tmp_path / "out"

    class Killed(Exception):
        pass

    def kill(done, of):
        raise Killed

    with pytest.raises(Killed):
        draw_many(pipeline, PROMPTS, out, cfg, chunk=2, on_chunk=kill)
    first = {f: f.stat().st_mtime_ns for f in out.glob("*.png")}
    assert len(first) == 2
    told = []
    assert draw_many(pipeline, PROMPTS, out, cfg, chunk=2, on_chunk=lambda *n: told.append(n)) == 3
    assert told == [(4, 5), (5, 5)] and all(f.stat().st_mtime_ns == t for f, t in first.items())
    draw_many(pipeline, PROMPTS, tmp_path / "whole", cfg)
    near(pictures(out), pictures(tmp_path / "whole"))
    assert draw_many(pipeline, PROMPTS, out, cfg) == 0
    assert not list(out.glob("*.tmp*"))


def test_a_folder_of_another_request_is_told(recipe, pipeline, tmp_path):
    cfg, out = pipeline.recipe.sample, tmp_path / "out"
    draw_many(pipeline, PROMPTS[:1], out, cfg)
    for prompts, repeat in ((PROMPTS[:2], 1), (PROMPTS[:1], 2)):
        with pytest.raises(RecipeError, match="other prompts or settings"):
            draw_many(pipeline, prompts, out, cfg, repeat=repeat)
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("")
    with pytest.raises(RecipeError, match="not empty"):
        draw_many(pipeline, PROMPTS, other, cfg)
    (out / "settings.json").write_text("{")
    with pytest.raises(RecipeError, match="damaged"):
        draw_many(pipeline, PROMPTS[:1], out, cfg)


def test_a_rank_that_does_not_write_still_draws(pipeline, tmp_path):
    assert draw_many(pipeline, PROMPTS[:2], tmp_path / "out", pipeline.recipe.sample, writes=False) == 2
    assert not list((tmp_path / "out").iterdir())


def test_from_a_run_folder(recipe, save_run, tmp_path):
    run = save_run(recipe)
    told = sample_many(run, PROMPTS[:2], tmp_path / "out", sizes=["4x8"], repeat=2, settings={"steps": 2})
    assert told == f"{tmp_path}/out: 4 of 4 pictures drawn now"
    assert Image.open(tmp_path / "out/000003.png").size == (4, 8)
    settings = json.loads((tmp_path / "out/settings.json").read_text())
    assert settings["prompts"] == PROMPTS[:2] and settings["sample"]["steps"] == 2
    with pytest.raises(RecipeError, match="one size"):
        sample_many(run, PROMPTS, tmp_path / "x", sizes=["4x8", "8x8"])


def test_a_folder_goes_on_with_the_weights_that_began_it(recipe, save_run, tmp_path):
    """A newer checkpoint, or another average, would mix pictures of two models."""
    run = save_run(recipe)
    sample_many(run, PROMPTS[:1], tmp_path / "out", step=5)
    for weights in ({"step": 10}, {"step": 5, "ema": 1}, {}):
        with pytest.raises(RecipeError, match="another checkpoint"):
            sample_many(run, PROMPTS[:1], tmp_path / "out", **weights)
    assert "0 of 1 pictures" in sample_many(run, PROMPTS[:1], tmp_path / "out", step=5)


def test_sounds_are_drawn_into_sound_files(recipe, random_model, tmp_path):
    model = replace(recipe.model, modalities={"image": 3, "audio": 1})
    both = Pipeline.build(random_model(replace(recipe, model=model)), replace(recipe, model=model))
    cfg = replace(recipe.sample, modality="audio", seconds=0.1, steps=1)
    assert draw_many(both.of("audio"), PROMPTS[:2], tmp_path / "out", cfg) == 2
    assert sorted(f.name for f in (tmp_path / "out").glob("*.wav")) == ["000000.wav", "000001.wav"]
    with wave.open(str(tmp_path / "out/000001.wav")) as sound:
        assert abs(sound.getnframes() / sound.getframerate() - 0.1) < 0.05
    assert draw_many(both.of("audio"), PROMPTS[:2], tmp_path / "out", cfg) == 0
    with pytest.raises(RecipeError, match="of pictures"):
        draw(both.of("audio"), PROMPTS[:2], cfg, Way(window=(8, 8)), sizes=[(8, 8)])
