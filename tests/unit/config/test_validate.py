"""Rules between keys. Each mistake is refused with its key and, where there is one, the nearest value that works."""

from pathlib import Path

import pytest

from flagdit.config.load import load_recipe
from flagdit.config.validate import divisors, nearest, parse_size
from flagdit.errors import RecipeError

MISTAKES = [
    (["model.num_heads=5"], "model.num_heads=5 must divide model.dim=128; try 4 or 8"),
    (["model.num_heads=128"], "must be even"),
    (["model.num_kv_heads=3"], "model.num_kv_heads=3 must divide model.num_heads=4; try 2 or 4"),
    (["model.num_classes=10"], "follows text or classes"),
    (["model.modalities={}"], "model.modalities is empty"),
    (["model.modalities={image: 0}"], "model.modalities.image=0"),
    (["model.rope_axes=4"], "model.rope_axes=4"),
    (["model.rope=raster", "model.rope_axes=3"], "no meaning with model.rope=raster"),
    (["model.block=best"], "model.block=best is not one of flag, next"),
    (["model.dim=0"], "model.dim=0 must be at least 1"),
    (["flow.caption_dropout=1.5"], "flow.caption_dropout=1.5"),
    (["flow.shift=0"], "flow.shift=0"),
    (["codec.kind=diffusers"], "needs codec.path"),
    (["codec.kind=haar", "codec.factor=3"], "codec.factor=3"),
    (["codec.path=vae"], "only read with codec.kind=diffusers"),
    (["text.kind=transformers"], "needs text.path"),
    (["text.path=t5"], "only read with text.kind=transformers"),
    (["text.prompt_template=photo"], "must contain {}"),
    (["train.accumulation=7"], "train.accumulation=7 must divide data.batch_size=64; try 4 or 8"),
    (["optimizer.betas=[0.9]"], "optimizer.betas=[0.9]"),
    (["optimizer.warmup_steps=2000"], "optimizer.warmup_steps=2000 must be at most train.steps=1000"),
    (["optimizer.decay_steps=950"], "try optimizer.decay_steps=900"),
    (["optimizer.schedule=cosine"], "only read with optimizer.schedule=wsd"),
    (["train.ema_decays=[1.0]"], "train.ema_decays: 1.0"),
    (["train.ema_decays=[0.9, 0.9]"], "names a decay twice"),
    (["data.max_bad_samples=2"], "data.max_bad_samples=2"),
    (["validation.timesteps=[]"], "validation.timesteps is empty"),
    (["validation.timesteps=[1.0]"], "validation.timesteps: 1.0"),
    (["sample.modality=audio"], "sample.modality=audio is not among"),
    (["sample.prompts=[]"], "needs sample.prompts"),
    (["sample.ema=2"], "sample.ema=2 counts train.ema_decays"),
    (["sample.shift=0"], "sample.shift=0"),
    (["sample.guidance_channels=4"], "more than model.modalities.image=3"),
    (["sample.size=24"], "'24' is not a size"),
    (["sample.size=25x24"], "the width must be a multiple of 4 pixels (codec × patch); try 24 or 28"),
    (["codec.kind=haar", "sample.size=24x20"], "the height must be a multiple of 8"),
    (["sample.solver=magic"], "sample.solver=magic is not one of euler"),
    (["train.steps=0"], "train.steps=0 must be at least 1"),
]


@pytest.mark.parametrize(("overrides", "words"), MISTAKES, ids=[m[1][:40] for m in MISTAKES])
def test_a_mistake_is_refused_with_its_key(overrides, words):
    with pytest.raises(RecipeError) as caught:
        load_recipe("quickstart", overrides)
    assert words in str(caught.value)


def test_all_broken_rules_are_told_at_once():
    with pytest.raises(RecipeError) as caught:
        load_recipe("quickstart", ["model.num_heads=5", "train.accumulation=7", "sample.size=25x24"])
    assert all(word in str(caught.value) for word in ("3 problems", "num_heads", "accumulation", "sample.size"))


def test_every_rule_has_a_mistake_above():
    source = Path(load_recipe.__code__.co_filename).with_name("validate.py").read_text()
    assert source.count("yield f") + source.count("yield (") + source.count('yield "') <= len(MISTAKES)


def test_nearest_and_divisors():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert nearest(5, divisors(12)) == "4 or 6"
    assert nearest(20, divisors(12)) == "12"


def test_sizes():
    assert parse_size("48x32") == parse_size("48X32") == (48, 32)
    for wrong in ("48", "x32", "0x4", "-4x4", "axb"):
        with pytest.raises(RecipeError, match="WIDTHxHEIGHT"):
            parse_size(wrong)
