"""`flagdit sample` behind its options: which pictures, of which sizes, in which files."""

from dataclasses import replace

import pytest
from PIL import Image

from flagdit.errors import RecipeError
from flagdit.generate.sample import read_prompts, sample_to_files, steps_shown


def test_the_recipe_says_what_is_not_given(recipe, save_run, tmp_path):
    (file,) = sample_to_files(save_run(recipe), [], tmp_path / "grid.png")
    assert Image.open(file).size == (2 * 128 + 4, 128), "two prompts of 8 px, enlarged 16 times"


def test_files_one_by_one_have_their_own_sizes(recipe, save_run, tmp_path):
    run = save_run(recipe)
    out = tmp_path / "new/x.png"
    files = sample_to_files(run, ["a", "b"], out, sizes=["8x12", "4x6"], repeat=2, separate=True)
    assert [f.name for f in files] == ["x_0000.png", "x_0001.png", "x_0002.png", "x_0003.png"]
    pictures = [Image.open(f) for f in files]
    assert [p.size for p in pictures] == [(8, 12), (8, 12), (4, 6), (4, 6)]
    assert pictures[0].tobytes() != pictures[1].tobytes(), "repeats come from different noise"


def test_settings_replace_those_of_the_recipe(recipe, save_run, tmp_path):
    run = save_run(recipe)

    def drawn(**settings):
        (file,) = sample_to_files(run, ["a dog"], tmp_path / "x.png", settings=settings)
        return file.read_bytes()

    base = drawn()
    assert base == drawn(seed=None, steps=None) == drawn(seed=recipe.sample.seed)
    assert len({base, drawn(seed=1), drawn(steps=5), drawn(guidance=1.0), drawn(solver="heun")}) == 5


def test_captions_make_the_sheet_higher(recipe, save_run, tmp_path):
    run = save_run(recipe)
    (plain,) = sample_to_files(run, ["a"], tmp_path / "a.png")
    (with_text,) = sample_to_files(run, ["a"], tmp_path / "b.png", captions=True)
    assert Image.open(with_text).size[1] > Image.open(plain).size[1]


def test_class_models_take_labels(class_recipe, save_run, tmp_path):
    run = save_run(class_recipe)
    for conditions in ([], [1, 2], ["1"]):
        assert sample_to_files(run, conditions, tmp_path / "x.png")


def test_models_without_conditions_need_no_prompt(recipe, save_run, tmp_path):
    recipe = replace(
        recipe, model=replace(recipe.model, text_dim=0), sample=replace(recipe.sample, prompts=[], every=0)
    )
    assert len(sample_to_files(save_run(recipe), [], tmp_path / "x.png", repeat=3, separate=True)) == 3


def test_bad_requests_are_told_before_anything_is_drawn(recipe, save_run, tmp_path):
    run = save_run(replace(recipe, sample=replace(recipe.sample, prompts=[], every=0)))
    out = tmp_path / "x.png"
    with pytest.raises(RecipeError, match="nothing to sample"):
        sample_to_files(run, [], out)
    with pytest.raises(RecipeError, match="2 sizes for 3 prompts"):
        sample_to_files(run, ["a", "b", "c"], out, sizes=["8x8", "4x4"])
    with pytest.raises(RecipeError, match="not a size"):
        sample_to_files(run, ["a"], out, sizes=["8"])
    with pytest.raises(RecipeError, match="Try 8x8 or 10x8"):
        sample_to_files(run, ["a"], out, sizes=["9x8"])
    with pytest.raises(RecipeError, match="not a picture file"):
        sample_to_files(tmp_path / "no run", ["a"], tmp_path / "x.txt")
    assert not out.exists()


def test_prompt_files(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffa dog\n\n  a näh cat  \r\n", encoding="utf-8")
    assert read_prompts(file) == ["a dog", "a näh cat"]
    file.write_text(" \n\n")
    with pytest.raises(RecipeError, match="prompt file is empty"):
        read_prompts(file)
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(RecipeError, match="not UTF-8"):
        read_prompts(file)
    with pytest.raises(RecipeError, match="No such file"):
        read_prompts(tmp_path / "nowhere.txt")


def test_progress_is_for_terminals(monkeypatch):
    with steps_shown("x", 2, 3) as quiet:
        assert quiet is None
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with steps_shown("x", 2, 3) as bar:
        assert bar is not None
        bar(1, finished=0)
        bar(3, finished=1)
