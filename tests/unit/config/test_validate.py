"""Ranges, choices and rules across keys: one bad recipe for each, and what the message names."""

from dataclasses import replace

import pytest

from flagdit.config.schema import Recipe
from flagdit.config.validate import RULES, parse_size, problems_of, validate
from flagdit.errors import RecipeError


def changed(**keys) -> Recipe:
    """The default recipe with `block__key=value` set."""
    recipe = Recipe()
    for name, value in keys.items():
        block, _, leaf = name.partition("__")
        if leaf:
            recipe = replace(recipe, **{block: replace(getattr(recipe, block), **{leaf: value})})
        else:
            recipe = replace(recipe, **{block: value})
    return recipe


BAD = [
    ({"name": "a/b"}, "name='a/b'", "one folder"),
    ({"name": ""}, "name=''", "one folder"),
    ({"seed": -1}, "seed=-1", "at least 0"),
    ({"model__dim": 0}, "model.dim=0", "at least 1"),
    ({"model__block": "nxt"}, "model.block=nxt", "did you mean next"),
    ({"train__device": "tpu"}, "train.device=tpu", "cuda"),
    ({"optimizer__lr": float("nan")}, "optimizer.lr=nan", "finite"),
    ({"train__ema_decays": [0.9, float("inf")]}, "train.ema_decays=inf", "finite"),
    ({"model__num_heads": 5}, "model.num_heads=5 must divide model.dim=512", "try 4 or 8"),
    ({"model__num_heads": 512}, "heads of 1 channels", "try 128 heads"),
    ({"model__num_heads": 256}, "heads of 2 channels", "try 128 heads"),
    ({"model__dim": 9, "model__num_heads": 3}, "heads of 3 channels", "multiple of 4"),
    ({"model__num_kv_heads": 3}, "model.num_kv_heads=3 must divide model.num_heads=8", "try 2 or 4"),
    ({"model__rope_axes": 4}, "model.rope_axes=4", "2 (row, column) or 3"),
    ({"model__rope_axes": 3, "model__rope": "raster"}, "no effect with model.rope=raster", "model.rope=axial"),
    ({"train__init_ema": 0}, "train.init_ema=0 has no effect without train.init_from", "name a run"),
    ({"lora__rank": 4}, "train.init_from names none", "run folder"),
    ({"lora__rank": 4, "lora__targets": ["w9"], "train__init_from": "runs/x"}, "names w9", "use some of wq"),
    ({"lora__rank": 4, "lora__targets": [], "train__init_from": "runs/x"}, "lora.targets is empty", "use some of wq"),
    ({"parallel__context": 4, "parallel__ring": 3}, "parallel.ring=3 must divide parallel.context=4", "try 2 or 4"),
    ({"parallel__zero": 0}, "parallel.zero=0", "same numbers in less memory"),
    ({"parallel__zero": 3, "parallel__offload": True}, "parallel.offload=true", "parallel.zero=2"),
    ({"parallel__zero": 3, "model__checkpointing": "selective"}, "model.checkpointing=selective", "block"),
    ({"parallel__zero": 3, "train__compile": True}, "train.compile=true", "parallel.zero=2"),
    ({"model__num_classes": 10}, "model.num_classes=10 and model.text_dim=384 exclude", "model.text_dim=0"),
    ({"model__num_classes": 10, "model__text_dim": 0, "sample__prompts": ["10"]}, "holds '10'", "0 to 9"),
    ({"flow__caption_dropout": 1.0}, "flow.caption_dropout=1", "below 1"),
    ({"flow__shift": 0.0}, "flow.shift=0", "more than 0"),
    ({"sample__guidance_interval": [0.5, 0.2]}, "sample.guidance_interval=[0.5, 0.2]", "rising times"),
    ({"sample__guidance_interval": [0.5]}, "sample.guidance_interval=[0.5]", "two"),
    ({"sample__guidance_rescale": 1.5}, "sample.guidance_rescale=1.5", "up to 1"),
    ({"sample__guidance_reuse": 2, "sample__solver": "dopri5"}, "does not go with sample.solver=dopri5", "midpoint"),
    ({"sample__train_size": "24"}, "sample.train_size='24' is not a size", "WIDTHxHEIGHT"),
    ({"sample__scaling": "ntkk"}, "sample.scaling=ntkk", "did you mean ntk"),
    ({"sample__shift": 0.0}, "sample.shift=0", "more than 0"),
    ({"sample__solver": "dopri5", "sample__rtol": 0.0}, "sample.rtol=0", "more than 0"),
    ({"model__modalities": {}}, "model.modalities is empty", "at least one"),
    ({"model__modalities": {"image": 0}}, "model.modalities.image=0", "at least 1"),
    ({"model__modalities": {"image": 4}}, "codec.kind=pixels makes latents of 3", "model.modalities={image: 3}"),
    ({"codec__kind": "dct", "codec__factor": 4}, "makes latents of 48", "{image: 48}"),
    ({"sample__modality": "vidoe"}, "sample.modality=vidoe", "use image"),
    ({"sample__guidance_channels": 4}, "sample.guidance_channels=4 is more than the 3", "use 0"),
    ({"codec__kind": "diffusers"}, "needs codec.path", "folder"),
    ({"codec__path": "vae"}, "codec.path=vae has no effect", "codec.kind=diffusers"),
    ({"codec__kind": "haar", "codec__factor": 3, "model__modalities": {"image": 27}}, "codec.factor=3", "2, 4 or 8"),
    ({"text__kind": "transformers"}, "needs text.path", "folder"),
    ({"model__modalities": {"image": 3, "audio": 4}}, "model.modalities.audio=4", "set it to 1"),
    ({"model__modalities": {"image": 3, "audio": 1}, "audio__mels": 33}, "audio.mels=33", "try 32 or 34"),
    ({"audio__hop": 600}, "audio.hop=600 must be at most half of audio.window=1024", "try 256"),
    ({"data__sets": {"a": 1.0, "b": 0.0}}, "data.sets gives b the weight 0", "leave it out"),
    ({"text__path": "t5"}, "text.path=t5 has no effect", "text.kind=transformers"),
    ({"text__prompt_template": "a photo"}, "text.prompt_template='a photo'", "{} once"),
    ({"train__accumulation": 7}, "train.accumulation=7 must divide data.batch_size=64", "try 4 or 8"),
    ({"data__max_bad_samples": 2.0}, "data.max_bad_samples=2", "up to 1"),
    ({"train__steps": 50}, "optimizer.warmup_steps=100 is more than train.steps=50", "try 5"),
    ({"optimizer__schedule": "wsd"}, "needs optimizer.decay_steps", "try 200"),
    ({"optimizer__schedule": "wsd", "optimizer__decay_steps": 950}, "do not fit", "at most 900"),
    ({"optimizer__final_lr": 1.5}, "optimizer.final_lr=1.5", "up to 1"),
    ({"optimizer__betas": [0.9]}, "optimizer.betas=[0.9]", "two rates"),
    ({"optimizer__betas": [0.9, 1.0]}, "optimizer.betas=[0.9, 1.0]", "below 1"),
    ({"train__ema_decays": [1.0]}, "train.ema_decays=[1.0]", "below 1"),
    ({"train__ema_decays": [0.9, 0.9]}, "train.ema_decays=[0.9, 0.9]", "twice"),
    ({"sample__ema": 1}, "sample.ema=1", "use 0 to 0, or -1"),
    ({"validation__timesteps": [1.0]}, "validation.timesteps=[1.0]", "below 1"),
    ({"validation__timesteps": []}, "validation.timesteps=[]", "below 1"),
    ({"sample__every": 5}, "sample.every=5 asks for picture grids", "name some prompts"),
    ({"sample__every": 10}, "sample.prompts is empty", "sample.every=0"),
    ({"sample__size": "24"}, "sample.size='24'", "WIDTHxHEIGHT"),
    ({"sample__size": "25x24"}, "sample.size=25x24 must be a multiple of 2 pixels", "try 24x24 or 26x24"),
    (
        {"sample__size": "50x20", "codec__kind": "haar", "codec__factor": 8, "model__modalities": {"image": 192}},
        "must be a multiple of 16 pixels (model.patch_size=2 · codec.factor=8)",
        "try 48x16 or 64x32",
    ),
    ({"checkpoint__keep": 0, "checkpoint__keep_every": 9}, "checkpoint.keep_every=9 has no effect", "at least 1"),
    ({"checkpoint__keep_best": 2}, "checkpoint.keep_best=2 needs the held-out loss", "validation.every=1000"),
    ({"checkpoint__keep_best": 1, "validation__every": 300}, "no multiple of", "validation.every=1000"),
    ({"checkpoint__busy": "skip"}, "checkpoint.busy=skip has no effect", "checkpoint.asynchronous=true"),
]


@pytest.mark.parametrize(("keys", "fault", "fix"), BAD, ids=[str(b[0]) for b in BAD])
def test_bad_recipe_is_told_with_fault_and_fix(keys, fault, fix):
    with pytest.raises(RecipeError) as caught:
        validate(changed(**keys))
    message = str(caught.value)
    assert fault in message and fix in message
    assert len(message.splitlines()) == 1, "one fault, one line"


GOOD = [
    {},
    {"train__precision": "bf16", "train__device": "cpu"},
    {"model__size": "5b", "model__num_heads": 7},  # judged where the sizes are known
    {"model__num_classes": 10, "model__text_dim": 0, "sample__prompts": ["0", "9"]},
    {"model__text_dim": 0},
    {"model__rope": "raster", "model__num_heads": 256},
    {"model__rope_axes": 3},
    {"train__ema_decays": []},
    {"sample__ema": -1},
    {"checkpoint__keep_best": 1, "checkpoint__keep_every": 5000, "validation__every": 500},
    {"checkpoint__busy": "skip", "checkpoint__asynchronous": True},
    {"optimizer__schedule": "wsd", "optimizer__decay_steps": 900},
    {"codec__kind": "diffusers", "codec__path": "vae", "model__modalities": {"image": 16}},
    {"codec__kind": "haar", "model__modalities": {"image": 12}},
    {"model__modalities": {"audio": 1, "image": 3}, "sample__modality": "audio"},
]


@pytest.mark.parametrize("keys", GOOD, ids=str)
def test_good_recipes_pass(keys):
    assert problems_of(changed(**keys)) == []


def test_every_rule_is_seen_to_complain():
    silent = [rule.__name__ for rule in RULES if not any(list(rule(changed(**keys))) for keys, _, _ in BAD)]
    assert not silent


def test_all_problems_at_once_and_none_twice():
    recipe = changed(model__num_heads=5, train__accumulation=7, model__block="x", sample__size="1", data__batch_size=0)
    with pytest.raises(RecipeError) as caught:
        validate(recipe)
    lines = str(caught.value).splitlines()
    # accumulation is not held against a batch size that is wrong by itself
    assert lines[0] == "recipe run has 4 problems:" and len(lines) == 5


@pytest.mark.parametrize(("text", "size"), [("48x32", (48, 32)), ("8×8", (8, 8)), (" 24x40 ", (24, 40))])
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "48", "48x", "x32", "0x8", "-8x8", "48x32x3", "a x b", "1.5x2", "9999999x1"])
def test_bad_sizes(text):
    with pytest.raises(RecipeError, match="WIDTHxHEIGHT"):
        parse_size(text)
