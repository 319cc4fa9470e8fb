"""Official checkpoints become runs; whatever is wrong with a folder is refused before anything is written."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flagdit.batch import PackedText, Segment
from flagdit.checkpoint import store
from flagdit.checkpoint.export import Options, export_run
from flagdit.checkpoint.importing import import_weights
from flagdit.checkpoint.lumina import expected_shapes
from flagdit.checkpoint.tensors import InMemory
from flagdit.checkpoint.weights import open_weights, write_run
from flagdit.config.load import load_recipe
from flagdit.config.schema import CodecConfig, ModelConfig, Recipe
from flagdit.errors import CheckpointError, RecipeError
from flagdit.generate.pipeline import load_pipeline
from flagdit.model.flag_dit import FlagDiT
from flagdit.model.tokens import TokenSpec, pack, unpack


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    return dict(open_weights(run).tensors.items())


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@torch.no_grad()
def test_parts_give_the_golden_outputs(goldens, save_official, tmp_path, parts, ending):
    for name, golden in goldens.items():
        if parts > golden.info["num_kv_heads"]:
            continue
        folder = save_official(tmp_path / name, golden.weights, parts, ending)
        import_weights(folder, tmp_path / f"run_{name}")
        weights = open_weights(tmp_path / f"run_{name}")
        model = FlagDiT(weights.recipe.model).eval()
        model.load_state_dict(dict(weights.tensors.items()))
        x, spec = golden.tensors, TokenSpec.from_model(weights.recipe.model)
        captions = [f[m.bool()] for f, m in zip(x["cap_feats"], x["cap_mask"], strict=True)]
        latents = [latent[:, None] for latent in x["x"]]
        segments = [Segment(i, "image", tuple(latent.shape)) for i, latent in enumerate(latents)]
        batch = pack(segments, latents, spec, text=PackedText.pack(captions))
        y = torch.stack([v[:, 0] for v in unpack(model(batch.patches, x["t"], batch), segments, spec)])
        assert (y - x["y"]).abs().max() <= 2e-5 * x["y"].abs().max()


def test_the_recipe_is_how_the_official_code_samples(golden, save_official, save_arguments, tmp_path):
    folder = save_official(tmp_path / "official", golden.weights)
    save_arguments(folder, model="NextDiT_2B_patch2", image_size=512, vae="mse", lm="some/llm", snr_type="uniform")
    (folder / "resume_step.txt").write_text("1234\n")
    told = import_weights(folder, tmp_path / "runs" / "theirs", ["sample.steps=9"])
    assert "step 1234" in told
    recipe = load_recipe(tmp_path / "runs" / "theirs" / "recipe.yaml")
    is_next = golden.info["family"] == "next-dit"
    assert (recipe.name, recipe.run_dir) == ("theirs", str(tmp_path / "runs"))
    assert (recipe.codec.kind, recipe.codec.path) == ("diffusers", "stabilityai/sd-vae-ft-mse")
    assert (recipe.text.kind, recipe.text.path, recipe.text.layer) == (
        "transformers",
        "some/llm",
        -2 if is_next else -1,
    )
    assert (recipe.sample.size, recipe.sample.steps, recipe.sample.guidance_channels) == ("512x512", 9, 3)
    assert recipe.model.time_scale == 1 and not recipe.model.learn_sigma and recipe.train.ema_decays == []
    assert store.complete(tmp_path / "runs" / "theirs")[0][0] == 1234
    # Opening it to sample gets as far as the encoder that nobody has given yet, and says so.
    with pytest.raises(RecipeError, match="hub name"):
        load_pipeline(tmp_path / "runs" / "theirs")


def test_averages_or_raw(goldens, save_official, tmp_path):
    golden = goldens["flag_dit_t2i"]
    folder = save_official(tmp_path / "official", golden.weights)
    other = {name: x + 1 for name, x in golden.weights.items()}
    import_weights(folder, tmp_path / "only")
    save_official(folder, other, stem="consolidated_ema")
    for weights, run in ((None, "default"), ("ema", "ema"), ("raw", "raw")):
        import_weights(folder, tmp_path / run, weights=weights)
    assert equal(tensors_of(tmp_path / "raw"), tensors_of(tmp_path / "only"))
    assert equal(tensors_of(tmp_path / "default"), tensors_of(tmp_path / "ema"))
    assert not equal(tensors_of(tmp_path / "default"), tensors_of(tmp_path / "only"))
    (folder / "consolidated_ema.00-of-01.pth").unlink()
    with pytest.raises(CheckpointError, match="no consolidated_ema"):
        import_weights(folder, tmp_path / "never", weights="ema")


def test_a_class_conditional_network(save_official, tmp_path):
    cfg = ModelConfig(dim=96, num_layers=2, num_heads=16, modalities={"image": 4}, text_dim=0, num_classes=10)
    cfg = replace(cfg, qk_norm="layer", rope="raster", nextline=False, nextframe=False, time_scale=1.0)
    weights = {n: torch.randn(shape) for n, shape in expected_shapes(cfg).items()}
    codec, train = CodecConfig("diffusers", "vae"), replace(Recipe().train, ema_decays=[])
    recipe = replace(Recipe(), model=cfg, codec=codec, train=train)
    write_run(tmp_path / "run", recipe, 0, InMemory(weights), {"format": "test", "name": "test"})
    for parts in (1, 2):
        folder = tmp_path / f"official{parts}"
        export_run(tmp_path / "run", folder, "lumina", Options(dtype="fp32", parts=parts))
        tables = [load_file(folder / f"consolidated.{rank:02d}-of-{parts:02d}.safetensors") for rank in range(parts)]
        assert tables[0]["y_embedder.embedding_table.weight"].shape == (11, 96 // parts)
        import_weights(folder, tmp_path / f"again{parts}", heads=16)
        assert equal(tensors_of(tmp_path / f"again{parts}"), weights)


def test_dtypes_and_bits_are_kept(goldens, save_official, tmp_path):
    weights = {name: x.bfloat16() for name, x in goldens["next_dit_t2i_gqa"].weights.items()}
    import_weights(save_official(tmp_path / "official", weights, 2), tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "back", "lumina", Options(dtype=None, parts=2))
    for rank in range(2):
        back = load_file(tmp_path / f"back/consolidated.{rank:02d}-of-02.safetensors")
        theirs = torch.load(tmp_path / f"official/consolidated.{rank:02d}-of-02.pth", weights_only=True)
        for name, x in theirs.items():
            if name.startswith("final_layer.linear"):
                # A part holds two of the four pixels: 8 rows each, the second 4 of them dead.
                assert torch.equal(back[name].unflatten(0, (2, 8))[:, :4], x.unflatten(0, (2, 8))[:, :4])
            elif name != "pad_token":
                assert back[name].dtype == x.dtype and torch.equal(back[name], x), name


class Refused:
    """Checks that an import fails as told and leaves nothing."""

    def __init__(self, tmp_path):
        self.runs = tmp_path / "runs"
        self.runs.mkdir(exist_ok=True)

    def __call__(self, folder, match, **options):
        with pytest.raises((CheckpointError, RecipeError), match=match) as caught:
            import_weights(folder, self.runs / "run", **options)
        assert list(self.runs.iterdir()) == [], "nothing half-written"
        return str(caught.value)


@pytest.fixture
def refused(tmp_path):
    return Refused(tmp_path)


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_missing_surplus_and_mixed_parts(goldens, save_official, tmp_path, refused, ending):
    weights = goldens["flag_dit_t2i"].weights
    folder = save_official(tmp_path / "a", weights, 4, ending)
    (folder / f"consolidated.02-of-04.{ending}").unlink()
    refused(folder, r"missing consolidated.02-of-04")
    folder = save_official(tmp_path / "b", weights, 2, ending)
    shutil.copy(folder / f"consolidated.01-of-02.{ending}", folder / f"consolidated.02-of-02.{ending}")
    refused(folder, r"too many parts: consolidated.02-of-02")
    save_official(folder, weights, 4, ending)
    refused(folder, "split into 2 and into 4 parts")
    refused(tmp_path / "nowhere", "there is no folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"neither a run, nor config.json, nor consolidated")


def test_parts_of_different_checkpoints(goldens, save_official, tmp_path, refused):
    weights = goldens["flag_dit_t2i"].weights
    folder = save_official(tmp_path / "a", weights, 2, "safetensors")
    other = save_official(tmp_path / "b", {n: x * 2 for n, x in weights.items()}, 2, "safetensors")
    shutil.copy(other / "consolidated.01-of-02.safetensors", folder)
    refused(folder, "belong to different checkpoints")
    part = load_file(folder / "consolidated.01-of-02.safetensors")
    part.pop("layers.1.ffn_norm.weight")
    save_file(part, folder / "consolidated.01-of-02.safetensors")
    refused(folder, r"do not belong together: they differ in layers.1.ffn_norm.weight")


def test_swapped_parts(goldens, save_official, tmp_path, refused):
    def swap(folder, ending):
        a, b = (folder / f"consolidated.{rank:02d}-of-02.{ending}" for rank in (0, 1))
        a.rename(folder / "aside")
        b.rename(a)
        (folder / "aside").rename(b)

    folder = save_official(tmp_path / "pth", goldens["flag_dit_t2i"].weights, 2)
    import_weights(folder, tmp_path / "run")
    swap(folder, "pth")
    refused(folder, "saved as part 1 of 2, but its name says 0 of 2")
    export_run(tmp_path / "run", tmp_path / "ours", "lumina", Options(parts=2))
    swap(tmp_path / "ours", "safetensors")
    refused(tmp_path / "ours", r"consolidated.00-of-02.safetensors has changed")
    (tmp_path / "ours" / "manifest.json").unlink()
    refused(tmp_path / "ours", "saved as part 1 of 2, but its name says 0 of 2")


def test_truncated_extra_missing_and_misshapen_tensors(goldens, save_official, tmp_path, refused):
    weights = goldens["next_dit_t2i_gqa"].weights
    for ending in ("pth", "safetensors"):
        folder = save_official(tmp_path / ending, weights, 1, ending)
        file = folder / f"consolidated.00-of-01.{ending}"
        file.write_bytes(file.read_bytes()[:-1000])
        refused(folder, "truncated|not a whole safetensors file")
    refused(save_official(tmp_path / "extra", weights | {"surprise": torch.ones(2)}), "unknown surprise")
    without = {n: x for n, x in weights.items() if n != "layers.1.attention.ky_norm.bias"}
    refused(save_official(tmp_path / "missing", without), r"missing layers.1.attention.ky_norm.bias")
    odd = weights | {"layers.1.feed_forward.w2.weight": torch.ones(96, 128)}
    refused(save_official(tmp_path / "odd", odd), r"w2.weight is \(96, 128\) instead of \(96, 256\)")


def test_a_failure_in_the_middle_leaves_nothing(goldens, save_official, tmp_path, refused, monkeypatch):
    folder = save_official(tmp_path / "a", goldens["flag_dit_t2i"].weights, 2)
    real, calls = os.write, []

    def failing(descriptor, data):
        calls.append(len(data))
        if len(calls) > 5:
            raise OSError(28, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", failing)
    refused(folder, "No space left on device")


def test_overrides_and_existing_folders(goldens, save_official, tmp_path, refused):
    folder = save_official(tmp_path / "a", goldens["flag_dit_t2i"].weights)
    refused(folder, "unknown key codec.paths", overrides=["codec.paths=x"])
    refused(folder, r"model.\* cannot be overridden", overrides=["model.rope_theta=1"])
    import_weights(folder, tmp_path / "run")
    with pytest.raises(CheckpointError, match="exists"):
        import_weights(folder, tmp_path / "run")
    refused(tmp_path / "run", "this is a run already")


def test_malicious_files_beside_weights(goldens, save_official, tmp_path, refused):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    folder = save_official(tmp_path / "a", goldens["flag_dit_t2i"].weights)
    torch.save(Evil(), folder / "model_args.pth")
    refused(folder, "Nothing in it was executed")
    (folder / "model_args.pth").unlink()
    torch.save(goldens["flag_dit_t2i"].weights | {"x": Evil()}, folder / "consolidated.00-of-01.pth")
    refused(folder, "nothing was")
    assert not (tmp_path / "executed").exists()


def test_a_diffusers_folder_that_does_not_fit(goldens, save_official, tmp_path, refused):
    golden = goldens["next_dit_t2i_gqa"]
    import_weights(save_official(tmp_path / "official", golden.weights), tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "folder", "diffusers", Options(dtype="fp32", encoders=False))
    (tmp_path / "folder" / "manifest.json").unlink()
    inner = tmp_path / "folder" / "transformer"
    tensors = load_file(inner / "diffusion_pytorch_model.safetensors")
    import_weights(inner, tmp_path / "again")
    assert equal(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "run")), "the transformer's folder alone will do"

    other = tensors | {"layers.0.attn2.to_q.weight": tensors["layers.0.attn2.to_q.weight"] + 1}
    save_file(other, inner / "diffusion_pytorch_model.safetensors")
    refused(inner, "separate queries for the text")
    save_file(tensors | {"extra": torch.ones(1)}, inner / "diffusion_pytorch_model.safetensors")
    refused(inner, "unknown extra")
    config = json.loads((inner / "config.json").read_text())
    (inner / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
    refused(inner, "missing layers.2")
    (inner / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    refused(inner, "UNet2DModel")
    (inner / "config.json").write_text("{")
    refused(inner, "cannot be read")
