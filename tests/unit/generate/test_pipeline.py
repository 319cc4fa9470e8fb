"""Sampling: a picture depends on its seed, id and prompt alone; run folders are opened or told apart."""

from dataclasses import replace

import pytest
import torch

from flagdit.batch import PackedText, Segment
from flagdit.checkpoint.weights import weights_group
from flagdit.codecs.latents import BlockCodec
from flagdit.config.load import save_recipe
from flagdit.errors import CheckpointError, FlagDiTError, RecipeError
from flagdit.flow.noise import draw_noise
from flagdit.generate import pipeline as pipeline_module
from flagdit.generate.pipeline import Pipeline, load_pipeline, split
from flagdit.model.tokens import TokenSpec, pack, unpack

SIZES = [(8, 8), (12, 8), (8, 4), (8, 8)]
PROMPTS = ["a dog", "a red cat on a mat", "", "a dog"]


@pytest.fixture
def pipeline(recipe, random_model):
    return Pipeline.build(random_model(recipe), recipe)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_pictures_have_the_asked_sizes_in_the_asked_order(pipeline):
    pixels = pipeline.generate(PROMPTS, pipeline.recipe.sample, sizes=SIZES)
    assert [tuple(p.shape) for p in pixels] == [(3, 1, h, w) for w, h in SIZES]
    for p in pixels:
        assert p.dtype == torch.float32 and p.isfinite().all() and p.abs().max() <= 1 and p.std() > 0.01


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_picture_does_not_depend_on_its_neighbours(pipeline, guidance):
    cfg = replace(pipeline.recipe.sample, guidance=guidance)
    together = pipeline.generate(PROMPTS, cfg, sizes=SIZES)
    for i, (prompt, size) in enumerate(zip(PROMPTS, SIZES, strict=True)):
        (alone,) = pipeline.generate([prompt], cfg, sizes=[size], first_id=i)
        close(alone, together[i])
    for budget in (1, 60, 100):
        for a, b in zip(pipeline.generate(PROMPTS, cfg, sizes=SIZES, pack_tokens=budget), together, strict=True):
            close(a, b)


def test_a_picture_depends_on_seed_id_and_prompt(pipeline):
    cfg = pipeline.recipe.sample

    def one(prompt="a dog", seed=0, first_id=0, **changes):
        return pipeline.generate([prompt], replace(cfg, seed=seed, **changes), first_id=first_id)[0]

    base = one()
    assert torch.equal(base, one())
    for other in (
        one("a cat"),
        one(seed=1),
        one(first_id=1),
        one(guidance=1.0),
        one(guidance=5.0),
        one(guidance=5.0, guidance_channels=1),
        one(solver="rk4"),
        one(steps=4),
        one(shift=3.0),
    ):
        assert (base - other).abs().max() > 1e-3


def test_noise_is_that_of_the_sample_id_and_seed(recipe, random_model):
    """With a velocity of zero the picture is its noise."""
    model = random_model(recipe)
    for p in model.heads.parameters():
        p.detach().zero_()
    drawn = Pipeline.build(model, recipe).generate(["a", "b"], replace(recipe.sample, seed=7), first_id=40)
    spec = TokenSpec.from_model(model.cfg)
    segments = [Segment(i, "image", (3, 1, 8, 8)) for i in (40, 41)]
    noise = draw_noise(pack(segments, None, spec), 7)["image"]
    for picture, latent in zip(drawn, unpack({"image": noise}, segments, spec), strict=True):
        torch.testing.assert_close(picture, latent.clamp(-1, 1))


def test_guidance_is_towards_the_prompt_and_away_from_the_empty_one(pipeline):
    """One Euler step from the same noise: the guided picture is v_null + scale·(v_cond − v_null), by hand."""
    cfg = replace(pipeline.recipe.sample, steps=1)
    spec = TokenSpec.from_model(pipeline.model.cfg)
    segments = [Segment(0, "image", (3, 1, 8, 8))]
    with torch.no_grad():
        ends = {}
        for name, prompt in (("cond", "a dog"), ("null", "")):
            text = PackedText.pack(pipeline.text_encoder.encode([prompt]))
            batch = pack(segments, None, spec, text=text)
            noise = draw_noise(batch, cfg.seed)
            ends[name] = pipeline.model(noise, torch.zeros(1), batch)["image"]
        by_hand = noise["image"] + ends["null"] + 3.0 * (ends["cond"] - ends["null"])
    (picture,) = pipeline.generate(["a dog"], replace(cfg, guidance=3.0))
    close(picture, unpack({"image": by_hand}, segments, spec)[0].clamp(-1, 1))


def test_class_models_take_ids_as_numbers_or_text(class_recipe, random_model):
    pipeline = Pipeline.build(random_model(class_recipe), class_recipe)
    cfg = class_recipe.sample
    a, b = pipeline.generate([0, 3], cfg), pipeline.generate(["0", "3"], cfg)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert (pipeline.generate([1], cfg)[0] - a[0]).abs().max() > 1e-3
    for bad in (4, "4", "a dog", -1, ""):
        with pytest.raises(RecipeError, match="class ids from 0 to 3"):
            pipeline.generate([0, bad], cfg)


def test_text_models_take_no_class_ids(pipeline):
    with pytest.raises(RecipeError, match="follows prompts"):
        pipeline.generate(["a dog", 3], pipeline.recipe.sample)


def test_models_without_conditions_ignore_them(recipe, random_model):
    recipe = replace(recipe, model=replace(recipe.model, text_dim=0))
    pipeline = Pipeline.build(random_model(recipe), recipe)
    a, b = (pipeline.generate([c], recipe.sample)[0] for c in ("", "a dog"))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"size": "9x8"}, "Try 8x8 or 10x8"),
        ({"size": "8x11"}, "Try 8x10 or 8x12"),
        ({"size": "1x1"}, "Try 2x2"),
        ({"size": "big"}, "WIDTHxHEIGHT"),
        ({"frames": 2}, "no frames"),
        ({"modality": "video"}, "not one of this model's"),
        ({"solver": "magic"}, "euler"),
    ],
)
def test_what_cannot_be_sampled_is_told(pipeline, changes, told):
    with pytest.raises(FlagDiTError, match=told):
        pipeline.generate(["a dog"], replace(pipeline.recipe.sample, **changes))


def test_frames_are_made_for_modalities_that_have_them(recipe, random_model):
    model = replace(recipe.model, modalities={"video": 3})
    recipe = replace(recipe, model=model, sample=replace(recipe.sample, modality="video", frames=3))
    (video,) = Pipeline.build(random_model(recipe), recipe).generate(["a dog"], recipe.sample)
    assert video.shape == (3, 3, 8, 8)


def test_latents_are_decoded_by_the_codec(recipe, random_model):
    model = replace(recipe.model, modalities={"image": 12})
    recipe = replace(recipe, model=model, codec=replace(recipe.codec, kind="haar", factor=2))
    pipeline = Pipeline.build(random_model(recipe), recipe)
    assert isinstance(pipeline.codec, BlockCodec)
    assert pipeline.generate(["a dog"], recipe.sample)[0].shape == (3, 1, 8, 8)
    with pytest.raises(RecipeError, match=r"multiples of 4 pixels.*Try 8x8 or 8x12"):
        pipeline.generate(["a dog"], replace(recipe.sample, size="8x10"))


def test_a_codec_or_text_encoder_of_another_width_is_refused(recipe, random_model, letters):
    model = random_model(recipe)
    with pytest.raises(RecipeError, match="latents of 12 channels"):
        Pipeline.build(model, replace(recipe, codec=replace(recipe.codec, kind="dct")))
    other = replace(recipe, model=replace(recipe.model, text_dim=13))
    with pytest.raises(RecipeError, match=r"12 wide, but model.text_dim=13"):
        Pipeline.build(random_model(other), other)


def test_progress_counts_steps_and_finished_pictures(pipeline):
    told = []
    pipeline.generate(
        ["a", "b", "c"],
        pipeline.recipe.sample,
        pack_tokens=1,
        on_step=lambda step, *, finished: told.append((finished, step)),
    )
    assert told == [(i, s) for i in range(3) for s in (1, 2, 3)]


def test_nothing_to_generate(pipeline):
    assert pipeline.generate([], pipeline.recipe.sample) == []


def test_training_goes_on_after_sampling(pipeline, recipe):
    """Sampling between two steps of a training run leaves nothing behind that backward cannot use."""
    pipeline.generate(["a dog"], recipe.sample)
    model, spec = pipeline.model, TokenSpec.from_model(pipeline.model.cfg)
    batch = pack(
        [Segment(0, "image", (3, 1, 8, 8))],
        [torch.randn(3, 1, 8, 8)],
        spec,
        text=PackedText.pack(pipeline.text_encoder.encode(["a dog"])),
    )
    out = model(batch.patches, torch.tensor([0.5]), batch)["image"]
    out.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_splitting_keeps_order_and_budget():
    assert split([], 10) == []
    assert split([5, 5, 5], 10) == [slice(0, 2), slice(2, 3)]
    assert split([50, 1, 1], 10) == [slice(0, 1), slice(1, 3)]
    for budget in (1, 7, 13, 100):
        costs = [3, 9, 1, 4, 4, 12, 2, 2]
        parts = split(costs, budget)
        assert [i for part in parts for i in range(len(costs))[part]] == list(range(len(costs)))
        assert all(sum(costs[p]) <= budget or p.stop - p.start == 1 for p in parts)


def test_a_run_is_opened_with_the_weights_that_were_asked_for(recipe, save_run, random_model):
    run = save_run(recipe)
    cfg = recipe.sample
    for kwargs, seed in [
        ({}, 11),
        ({"ema": 0}, 11),
        ({"ema": 1}, 12),
        ({"ema": -1}, 10),
        ({"step": 5}, 6),
        ({"step": 5, "ema": -1, "device": "cpu"}, 5),
    ]:
        opened = load_pipeline(run, **kwargs)
        assert not opened.model.training and not any(p.requires_grad for p in opened.model.parameters())
        expected = Pipeline.build(random_model(recipe, seed=seed), recipe).generate(["a dog"], cfg)
        assert torch.equal(opened.generate(["a dog"], cfg)[0], expected[0]), kwargs


def test_bf16_runs_sample_to_fp32_pixels(recipe, save_run):
    recipe = replace(recipe, train=replace(recipe.train, precision="bf16"))
    opened = load_pipeline(save_run(recipe))
    assert opened.model.dtype == torch.bfloat16
    (picture,) = opened.generate(["a dog"], recipe.sample)
    assert picture.dtype == torch.float32 and picture.isfinite().all()


def test_runs_without_averages_sample_from_the_weights(recipe, save_run, random_model):
    recipe = replace(recipe, train=replace(recipe.train, ema_decays=[]))
    opened = load_pipeline(save_run(recipe))
    for name, p in random_model(recipe, seed=10).state_dict().items():
        assert torch.equal(p, opened.model.state_dict()[name])


def test_names_of_averages(recipe):
    assert [weights_group(recipe, i) for i in (-1, 0, 1)] == ["model", "ema_0.9", "ema_0.5"]
    with pytest.raises(RecipeError, match=r"\[0.9, 0.5\]"):
        weights_group(recipe, 2)


def test_what_is_no_run_is_told(recipe, save_run, tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        load_pipeline(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"there is no run here.*runs/quickstart"):
        load_pipeline(tmp_path)
    run = save_run(recipe, steps=())
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        load_pipeline(run)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="there is no"):
        load_pipeline(tmp_path / "file")


def test_bad_runs_are_told(recipe, save_run):
    run = save_run(recipe)
    with pytest.raises(CheckpointError, match="steps 5, 10"):
        load_pipeline(run, step=7)
    with pytest.raises(RecipeError, match="no average number 2"):
        load_pipeline(run, ema=2)
    file = next((run / "checkpoints/step_00000010/ema_0.9").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"damaged.*ema_0.9"):
        load_pipeline(run)
    assert load_pipeline(run, ema=1), "only the file that is needed is looked at"
    save_recipe(replace(recipe, model=replace(recipe.model, dim=64)), run / "recipe.yaml")
    with pytest.raises(CheckpointError, match="do not fit the recipe"):
        load_pipeline(run, step=5)
    (run / "recipe.yaml").write_text("model: {dims: 3}")
    with pytest.raises(RecipeError, match=r"did you mean model.dim"):
        load_pipeline(run)


def test_build_text_encoder_is_looked_up_when_called(recipe, random_model, monkeypatch):
    """A model without text needs no text encoder, installed or not."""

    def missing(cfg):
        raise AssertionError("asked for a text encoder")

    monkeypatch.setattr(pipeline_module, "build_text_encoder", missing)
    recipe = replace(recipe, model=replace(recipe.model, text_dim=0))
    assert Pipeline.build(random_model(recipe), recipe).text_encoder is None
