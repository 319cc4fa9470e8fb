"""Exported diffusers folders, opened by a process that cannot import flagdit, draw what flagdit draws."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from flagdit.batch import PackedText, Segment
from flagdit.checkpoint.export import Options, export_run
from flagdit.checkpoint.importing import import_weights
from flagdit.checkpoint.tensors import InMemory
from flagdit.checkpoint.weights import open_weights, write_run
from flagdit.codecs.text import text_folder
from flagdit.config.load import load_recipe, save_recipe
from flagdit.config.schema import TextConfig
from flagdit.flow.guidance import guided_velocity
from flagdit.flow.solver import integrate
from flagdit.generate.pipeline import load_pipeline
from flagdit.model.flag_dit import FlagDiT
from flagdit.model.tokens import TokenSpec, pack, patchify, unpack

CLEAN = Path(__file__).with_name("clean_diffusers.py")
STEPS, SHIFT = 4, 3.0
PROMPTS = ["a red fox", "a trophy"]
FAMILIES = ["flag_dit_t2i", "next_dit_t2i_gqa"]
PLAIN = Options(dtype="fp32", encoders=False)
VARIANTS = {
    "axial": ["sample.solver=heun", "sample.guidance=3", "sample.shift=2"],
    "next-haar": [
        "model.block=next",
        "model.num_kv_heads=1",
        "codec.kind=haar",
        "codec.factor=2",
        "model.modalities={image: 12}",
        "model.patch_size=2",
        "sample.solver=midpoint",
    ],
    "dct": [
        "codec.kind=dct",
        "codec.factor=4",
        "model.modalities={image: 48}",
        "model.patch_size=2",
        "model.qk_norm=none",
        "sample.guidance=1",
        "sample.solver=rk4",
    ],
    "stock": [
        "model.block=next",
        "model.qk_norm=layer",
        "model.nextline=false",
        "model.time_scale=1",
        "model.ffn_dim=256",
        "model.patch_size=2",
        "model.modalities={image: 4}",
        "codec.kind=diffusers",
        "text.kind=transformers",
        "text.layer=-2",
        "sample.size=64x64",
        "sample.guidance=4",
        "sample.guidance_channels=3",
        "sample.shift=2",
        "sample.steps=4",
    ],
}
SIZES = {**dict.fromkeys(VARIANTS, (24, 16)), "stock": (64, 64)}


def run_clean(cache: Path, *arguments: object) -> str:
    """Runs a script without network, without the user's Python settings, with a module cache of its own."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-I", *map(str, arguments)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def make_run(folder: Path, name: str, *overrides: str) -> Path:
    """A run with random weights and the embedded text encoder."""
    shape = ["model.dim=32", "model.num_layers=2", "model.num_heads=2", "model.ffn_dim=48"]
    common = ["train.ema_decays=[]", "train.device=cpu", "sample.prompts=[]", "sample.every=0", "sample.steps=3"]
    recipe = load_recipe("quickstart", [*shape, *common, f"name={name}", *overrides])
    model = FlagDiT(recipe.model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.2 if p.ndim > 1 else 0.5))
    write_run(folder / name, recipe, 7, InMemory(model.state_dict()), {"format": "test", "name": name})
    return folder / name


def save_autoencoder(folder: Path) -> None:
    """A small random AutoencoderKL of 4 channels at an eighth of the size."""
    torch.manual_seed(0)
    shape = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    AutoencoderKL(**shape, **blocks, scaling_factor=0.5).save_pretrained(folder)


def inputs_of(golden) -> dict[str, torch.Tensor]:
    x = golden.tensors
    given = {name: x[name].float() for name in ("x", "t", "cap_feats", "cap_mask")}
    generator = torch.Generator().manual_seed(3)
    # Square: LuminaPipeline scales positions unless width × height is the square of its default side.
    given["noise"] = torch.randn(2, x["x"].shape[1], 8, 8, generator=generator)
    given["embeds"], given["mask"] = given["cap_feats"][:2].clone(), given["cap_mask"][:2].clone()
    given["null"] = torch.randn(1, *given["embeds"].shape[1:], generator=generator)
    given["null_mask"] = torch.zeros(1, given["null"].shape[1])
    given["null_mask"][:, :3] = 1
    return given


@pytest.fixture(scope="module")
def drawn(goldens, save_official, tmp_path_factory):
    """Folder of all that the clean process was given and made, and the lines that it printed, by name of the job."""
    root = tmp_path_factory.mktemp("drawn")
    jobs = []
    for name in FAMILIES:
        run = root / "runs" / name
        import_weights(save_official(root / "official" / name, goldens[name].weights), run)
        given = inputs_of(goldens[name])
        height, width = given["noise"].shape[2:]
        recipe = load_recipe(run / "recipe.yaml")
        sample = replace(recipe.sample, solver="euler", steps=STEPS, shift=SHIFT, size=f"{8 * width}x{8 * height}")
        save_recipe(replace(recipe, sample=sample), run / "recipe.yaml")
        save_file(given, root / f"{name}.in")
        jobs.append({"folder": name})
    save_autoencoder(root / "vae")
    for name, overrides in VARIANTS.items():
        folders = [f"codec.path={root}/vae", f"text.path={text_folder(TextConfig())}"] if name == "stock" else []
        run = make_run(root / "runs", name, *overrides, *folders)
        shape = load_pipeline(run).latent_shape(SIZES[name], 1, "image")
        noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(5))
        save_file({"noise": noise}, root / f"{name}.in")
        jobs.append({"folder": name, "prompts": PROMPTS})
    for job in jobs:
        name = job["folder"]
        export_run(root / "runs" / name, root / name, "diffusers", Options(dtype="fp32") if "prompts" in job else PLAIN)
        job |= {"folder": str(root / name), "inputs": str(root / f"{name}.in"), "outputs": str(root / f"{name}.out")}
    (root / "jobs.json").write_text(json.dumps(jobs))
    lines = run_clean(root / "cache", CLEAN, root / "jobs.json").splitlines()
    return root, dict(zip([*FAMILIES, *VARIANTS], lines, strict=True))


@torch.no_grad()
def forward_and_samples(run: Path, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What flagdit computes from the inputs of a job without prompts."""
    weights = open_weights(run)
    cfg = weights.recipe.model
    model = FlagDiT(cfg).eval()
    model.load_state_dict(dict(weights.tensors.items()))
    spec = TokenSpec.from_model(cfg)
    captions = [f[m.bool()] for f, m in zip(given["cap_feats"], given["cap_mask"], strict=True)]
    latents = [x[:, None] for x in given["x"]]
    segments = [Segment(i, "image", tuple(x.shape)) for i, x in enumerate(latents)]
    batch = pack(segments, latents, spec, text=PackedText.pack(captions))
    y = torch.stack([v[:, 0] for v in unpack(model(batch.patches, given["t"], batch), segments, spec)])

    embeds = [e[m.bool()] for e, m in zip(given["embeds"], given["mask"], strict=True)]
    segments = [Segment(i, "image", (x.shape[0], 1, *x.shape[1:])) for i, x in enumerate(given["noise"])]
    batch = pack(segments, None, spec, text=PackedText.pack(embeds))
    null = given["null"][0, given["null_mask"][0].bool()]
    velocity = guided_velocity(model, batch, scale=4.0, channels=3, null_text_LY=null)
    noise = {"image": torch.cat([patchify(x[:, None], (1, cfg.patch_size, cfg.patch_size)) for x in given["noise"]])}
    solution = integrate(velocity, noise, solver="euler", steps=STEPS, shift=SHIFT)
    return y, torch.stack([x[:, 0] for x in unpack(solution.x, segments, spec)])


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("name", FAMILIES)
def test_one_forward_and_sampling(name, drawn, goldens):
    root, lines = drawn
    stock = "LuminaPipeline LuminaNextDiT2DModel torch.float32"
    own = "FlagDiTPipeline FlagDiTTransformer torch.float32"
    assert lines[name] == (stock if name.startswith("next") else own)
    theirs = load_file(root / f"{name}.out")
    y, samples = forward_and_samples(root / "runs" / name, load_file(root / f"{name}.in"))
    assert relative(theirs["y"], y) < 1e-5
    assert relative(theirs["y"], goldens[name].tensors["y"]) < 2e-5, "and the official code agrees"
    assert relative(theirs["samples"], samples) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_prompts_to_pixels_with_the_files_of_the_folder_alone(name, drawn):
    root, lines = drawn
    assert lines[name].startswith("LuminaPipeline" if name == "stock" else "FlagDiTPipeline")
    pipeline = load_pipeline(root / "runs" / name)
    sample, spec = pipeline.recipe.sample, TokenSpec.from_model(pipeline.model.cfg)
    noise = load_file(root / f"{name}.in")["noise"]
    segments = [Segment(i, "image", tuple(x.shape)) for i, x in enumerate(noise)]
    text = PackedText.pack(pipeline.text_encoder.encode(PROMPTS))
    batch = pack(segments, None, spec, text=text)
    velocity = guided_velocity(
        pipeline.model,
        batch,
        scale=sample.guidance,
        channels=sample.guidance_channels,
        null_text_LY=pipeline.null_text_LY,
    )
    start = {"image": torch.cat([patchify(x, (1, spec.patch_size, spec.patch_size)) for x in noise])}
    solution = integrate(velocity, start, solver=sample.solver, steps=sample.steps, shift=sample.shift)
    mine = torch.stack([pipeline.codec.decode(x)[:, 0] for x in unpack(solution.x, segments, spec)])
    assert mine.shape == (2, 3, *SIZES[name][::-1])
    assert relative(load_file(root / f"{name}.out")["pixels"], mine.clamp(-1, 1)) < 1e-4


def test_the_example_of_the_folder_draws(drawn, tmp_path):
    root, _ = drawn
    out = tmp_path / "fox.png"
    told = run_clean(tmp_path / "cache", root / "axial" / "example.py", "a red fox", out, "--steps", "2")
    assert told.strip() == str(out)
    assert Image.open(out).size == (24, 24)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("classes", ["model.text_dim=0", "model.num_classes=5", "model.nextline=false", "model.rope=raster"]),
        ("video", ["model.text_dim=0", "model.modalities={video: 3}", "model.rope_axes=3", "sample.modality=video"]),
    ],
)
def test_classes_and_frames(name, overrides, tmp_path):
    from flagdit.checkpoint.standalone.modeling_flag_dit import FlagDiTTransformer

    run = make_run(tmp_path / "runs", name, *overrides)
    export_run(run, tmp_path / name, "diffusers", PLAIN)
    theirs = FlagDiTTransformer.from_pretrained(tmp_path / name / "transformer", low_cpu_mem_usage=False)
    mine = load_pipeline(run).model
    spec = TokenSpec.from_model(mine.cfg)
    (modality,) = mine.cfg.modalities
    x = torch.randn(2, 3, 3 if modality == "video" else 1, 8, 12, generator=torch.Generator().manual_seed(2))
    segments = [Segment(i, modality, tuple(v.shape)) for i, v in enumerate(x)]
    labels = [4, 5] if name == "classes" else None
    batch = pack(segments, list(x), spec, labels=labels)
    t = torch.tensor([0.2, 0.9])
    wanted = torch.stack(unpack(mine(batch.patches, t, batch), segments, spec))
    found = theirs(x, t, class_labels=None if labels is None else torch.tensor(labels)).sample
    assert relative(found, wanted) < 1e-5
