"""The attention backend of a run: shown, refused before anything is written, replaced where a run is only sampled."""

from pathlib import Path

import pytest
import torch

from flagdit.config.load import load_recipe, to_yaml
from flagdit.errors import RecipeError
from flagdit.generate.pipeline import load_pipeline
from flagdit.train.loop import train


@pytest.mark.parametrize("asked", ["auto", "sdpa"])
def test_the_first_line_names_the_backend(tiny, capsys, asked):
    folder = train(tiny(model__attention=asked))
    assert "fp32, attention sdpa, kernels reference on cpu" in capsys.readouterr().out.splitlines()[0]
    assert load_recipe(folder / "recipe.yaml").model.attention == asked


def test_a_backend_that_cannot_serve_is_refused_before_the_folder_changes(tiny):
    recipe = tiny(model__attention="flash3")
    with pytest.raises(RecipeError, match=r"model\.attention=flash3 cannot serve this run: it runs on CUDA devices"):
        train(recipe)
    assert [path.name for path in (Path(recipe.run_dir) / recipe.name).iterdir()] == [".lock"]


def test_a_run_trained_with_another_backend_can_be_sampled_here(tiny):
    folder = train(tiny())
    recipe = tiny(model__attention="flash3")
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    pipeline = load_pipeline(folder, device="cpu")
    assert pipeline.model.attention_backend.name == "sdpa"
    assert torch.isfinite(pipeline.generate(["a"], recipe.sample)[0]).all()


def test_the_backend_may_change_when_a_run_goes_on(tiny):
    train(tiny(train__steps=2))
    train(tiny(train__steps=4, model__attention="sdpa"))
