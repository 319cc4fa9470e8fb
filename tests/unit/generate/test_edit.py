"""Editing: strength says how much, a mask says where, statistics carry a style."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from flagdit.batch import Segment
from flagdit.data_pipelines.sound import wav
from flagdit.errors import RecipeError
from flagdit.flow.noise import draw_noise
from flagdit.generate.edit import FADE, edit, edit_file, match_statistics
from flagdit.generate.media import save_samples
from flagdit.generate.pipeline import Pipeline
from flagdit.model.tokens import patchify

GENERATOR = torch.Generator().manual_seed(3)
PICTURE = torch.rand(3, 1, 8, 12, generator=GENERATOR) * 1.8 - 0.9


@pytest.fixture
def pipeline(recipe, random_model):
    return Pipeline.build(random_model(recipe), replace(recipe, sample=replace(recipe.sample, steps=20)))


def test_more_strength_keeps_less(pipeline):
    cfg = pipeline.recipe.sample
    distances = []
    for strength in (0.05, 0.3, 0.6, 1.0):
        (drawn,) = edit(pipeline, [PICTURE], ["a dog"], cfg, strength=strength)
        distances.append(float((drawn - PICTURE).square().mean()))
    assert distances == sorted(distances) and distances[0] < 0.05 < distances[-1]
    from_noise = pipeline.generate(["a dog"], cfg, sizes=[(12, 8)])[0]
    torch.testing.assert_close(edit(pipeline, [PICTURE], ["a dog"], cfg, strength=1.0)[0], from_noise)


def test_a_later_start_skips_steps(pipeline):
    told = []
    cfg = pipeline.recipe.sample
    edit(pipeline, [PICTURE], ["a dog"], cfg, strength=0.25, on_step=lambda step, *, finished: told.append(step))
    assert told == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("kind", ["pixels", "haar"])
def test_what_is_not_masked_stays(recipe, random_model, kind):
    if kind == "haar":
        model = replace(recipe.model, modalities={"image": 12})
        recipe = replace(recipe, model=model, codec=replace(recipe.codec, kind="haar", factor=2))
    pipeline = Pipeline.build(random_model(recipe), recipe)
    mask = torch.zeros(1, 8, 12, dtype=torch.bool)
    mask[:, 1:5, 2:9] = True
    for solver in ("euler", "heun"):
        cfg = replace(recipe.sample, solver=solver)
        (drawn,) = edit(pipeline, [PICTURE], ["a dog"], cfg, strength=1.0, masks=[mask])
        outside = ~mask[None].expand_as(PICTURE)
        assert (drawn - PICTURE)[outside].abs().max() == 0
        assert (drawn - PICTURE)[~outside].abs().mean() > 0.05


def test_the_model_sees_what_is_not_masked(painting):
    """Whenever the model looks, held latents are on their straight way from noise to the picture."""
    pipeline = painting(steps=5)
    mask = torch.zeros(1, 8, 12, dtype=torch.bool)
    mask[:, :, :6] = True
    seen = []
    inner = pipeline.model.forward

    def watch(x, t_S, batch, inference=None):
        seen.append((float(t_S[0]), x["image"]))
        return inner(x, t_S, batch, inference)

    pipeline.model.forward = watch
    edit(pipeline, [PICTURE], ["a dog"], pipeline.recipe.sample, strength=0.6, masks=[mask])
    assert [t for t, _ in seen] == pytest.approx([0.4, 0.6, 0.8])
    batch = pipeline.batch([Segment(0, "image", (3, 1, 8, 12))], pipeline.features(["a dog"]), None)
    noise, data = draw_noise(batch, pipeline.recipe.sample.seed)["image"], patchify(PICTURE, (1, 2, 2))
    held = [i for i in range(24) if i % 6 >= 3]
    for t, x_NP in seen:
        torch.testing.assert_close(x_NP[held], (t * data + (1 - t) * noise)[held])


def test_statistics_are_taken_channel_by_channel():
    style = torch.randn(3, 1, 6, 6, generator=GENERATOR) * torch.tensor([0.1, 2.0, 0.5])[:, None, None, None] + 1
    matched = match_statistics(PICTURE, style)
    axes = (1, 2, 3)
    torch.testing.assert_close(matched.mean(axes), style.mean(axes))
    torch.testing.assert_close(matched.std(axes, correction=0), style.std(axes, correction=0))
    torch.testing.assert_close(match_statistics(PICTURE, PICTURE), PICTURE)
    flat = match_statistics(torch.zeros(3, 1, 4, 4), style)
    assert flat.isfinite().all()


def test_a_style_moves_the_result_towards_its_statistics(pipeline):
    style = (
        torch.rand(3, 1, 8, 8, generator=GENERATOR) * 0.2 + torch.tensor([0.7, -0.7, 0.0])[:, None, None, None]
    ).clamp(-1, 1)
    plain, styled = (
        edit(pipeline, [PICTURE], ["a dog"], pipeline.recipe.sample, strength=0.1, style=s)[0] for s in (None, style)
    )
    far = [(p.mean((1, 2, 3)) - style.mean((1, 2, 3))).abs().sum() for p in (plain, styled)]
    assert far[1] < 0.5 * far[0]


def test_what_cannot_be_edited_is_told(pipeline):
    cfg = pipeline.recipe.sample
    for strength in (0.0, 1.5):
        with pytest.raises(RecipeError, match="above 0 and at most 1"):
            edit(pipeline, [PICTURE], ["a"], cfg, strength=strength)
    with pytest.raises(RecipeError, match="mask of 8x8 does not fit a picture of 12x8"):
        edit(pipeline, [PICTURE], ["a"], cfg, masks=[torch.zeros(1, 8, 8, dtype=torch.bool)])
    with pytest.raises(RecipeError, match="Try 10x8 or 12x8"):
        edit(pipeline, [PICTURE[..., :11]], ["a"], cfg)


def test_files_in_files_out(recipe, save_run, tmp_path):
    run = save_run(recipe)
    Image.new("RGBA", (13, 9), (200, 40, 40, 255)).save(tmp_path / "in.png")
    mask = Image.new("L", (26, 18), 0)
    mask.paste(255, (0, 0, 12, 18))
    mask.save(tmp_path / "mask.png")
    files = edit_file(
        run, tmp_path / "in.png", "a dog", tmp_path / "new/out.png",
        strength=0.9, mask=tmp_path / "mask.png", repeat=2, separate=True, settings={"steps": 4},
    )  # fmt: skip
    assert [f.name for f in files] == ["out_0000.png", "out_0001.png"]
    first, second = (Image.open(f) for f in files)
    assert first.size == (12, 8), "cut to what the model can make"
    assert first.getpixel((11, 4)) == (200, 40, 40) and first.tobytes() != second.tobytes()
    (sized,) = edit_file(
        run, tmp_path / "in.png", "a", tmp_path / "s.png", size="8x8", style=tmp_path / "mask.png", separate=True
    )
    assert Image.open(sized).size == (8, 8)
    with pytest.raises(RecipeError, match="no such file"):
        edit_file(run, tmp_path / "nowhere.png", "a", tmp_path / "x.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(RecipeError, match=r"text\.png: the picture cannot be read"):
        edit_file(run, tmp_path / "text.png", "a", tmp_path / "x.png")


@pytest.fixture
def every_modality(recipe):
    """A recipe of all four modalities, whose sounds have 8 bands and 256 samples to a token."""
    audio = replace(recipe.audio, sample_rate=8000, mels=8, hop=128, window=512, griffin_lim=4)
    model = replace(recipe.model, modalities={"image": 3, "video": 3, "multiview": 3, "audio": 1}, rope_axes=3)
    return replace(recipe, model=model, audio=audio)


def test_a_clip_is_edited_in_time_and_place(every_modality, save_run, tmp_path):
    run = save_run(every_modality)
    clip = torch.linspace(-0.8, 0.8, 6).view(1, -1, 1, 1).expand(3, 6, 8, 8)
    (file,) = save_samples([clip], "video", tmp_path / "a.gif", rate=8000, separate=True)
    mask = Image.new("L", (8, 8), 0)
    mask.paste(255, (0, 0, 4, 8))
    mask.save(tmp_path / "m.png")
    seen = {}
    for name, given in {"whole": {}, "part": {"mask": tmp_path / "m.png", "between": (0.25, 0.5)}}.items():
        (out,) = edit_file(
            run, file, "a dog", tmp_path / f"{name}.gif", strength=1.0, separate=True, settings={"steps": 4}, **given
        )
        edited = Image.open(out)
        assert edited.n_frames == 6 and edited.size == (8, 8)
        levels = []
        for i in range(6):
            edited.seek(i)
            levels.append(torch.tensor(list(edited.convert("RGB").getdata())).float().view(8, 8, 3) / 127.5 - 1)
        seen[name] = (torch.stack(levels).permute(3, 0, 1, 2) - clip).abs()
    assert (seen["whole"].mean((0, 2, 3)) > 0.05).all()
    inside = torch.zeros(6, 8, 8, dtype=torch.bool)
    inside[2:4, :, :4] = True
    assert seen["part"][:, inside].mean() > 0.05 and seen["part"][:, ~inside].max() < 0.02


def test_views_are_edited_together(every_modality, save_run, tmp_path):
    run = save_run(every_modality)
    Image.new("RGB", (32, 8), (200, 40, 40)).save(tmp_path / "views.png")
    settings = {"steps": 3, "modality": "multiview", "frames": 4}
    (out,) = edit_file(run, tmp_path / "views.png", "a dog", tmp_path / "v.png", separate=True, settings=settings)
    assert Image.open(out).size == (32, 8)
    with pytest.raises(RecipeError, match=r"v\.wav is no file for multiview"):
        edit_file(run, tmp_path / "views.png", "a dog", tmp_path / "v.wav", settings=settings)


def test_a_sound_is_edited_between_seconds(every_modality, save_run, tmp_path, monkeypatch):
    from flagdit.data_pipelines.sound import read_wav

    run = save_run(every_modality)
    wave = torch.sin(torch.arange(4096) / 9) * 0.5
    (tmp_path / "a.wav").write_bytes(wav(wave.numpy(), 8000))
    monkeypatch.chdir(tmp_path)
    (out,) = edit_file(
        run, tmp_path / "a.wav", "a dog", strength=1.0, between=(0.128, 0.256), settings={"steps": 3, "guidance": 1.0}
    )
    assert str(out) == "edited.wav"
    change = (torch.from_numpy(read_wav(out.read_bytes())[0].copy()) - wave).abs()
    assert change[:1024].max() < 1e-3 and change[2048:].max() < 1e-3
    assert change[1024 + FADE : 2048 - FADE].mean() > 0.05
    assert change[1024:1032].max() < 0.1, "it fades in"
