"""Opens exported folders where the framework that made them cannot be imported; run by test_diffusers.py.

    python -I clean_diffusers.py JOBS.json

A job is {folder, inputs, outputs, prompts?}. With prompts: they become pixels, from the `noise` of the inputs. Without:
one forward of x, t, cap_feats, cap_mask, and samples from noise, embeds, mask, null, null_mask. All fp32.
"""

import sys


class Blocker:
    """Makes an import of the framework fail, however it is installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "flagdit":
            raise ImportError(f"{name} must not be imported here")
        return None


sys.meta_path.insert(0, Blocker())

import json  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from diffusers import DiffusionPipeline  # noqa: E402
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

STEPS = 4


def of_own_code(pipe, x):
    with torch.no_grad():
        y = pipe.transformer(x["x"], x["t"], x["cap_feats"], x["cap_mask"]).sample
    embeds = [e[: int(m.sum())] for e, m in zip(x["embeds"], x["mask"], strict=True)]
    null = x["null"][0, : int(x["null_mask"].sum())]
    return y, pipe(prompt_embeds=embeds, negative_prompt_embeds=null, latents=x["noise"], output_type="latent").images


def of_stock(pipe, x, size):
    rotary = get_2d_rotary_pos_embed_lumina(pipe.transformer.head_dim, 384, 384)
    with torch.no_grad():
        y = pipe.transformer(x["x"], x["t"], x["cap_feats"], x["cap_mask"], rotary, cross_attention_kwargs={}).sample
    count = len(x["noise"])
    samples = pipe(
        prompt_embeds=x["embeds"],
        prompt_attention_mask=x["mask"],
        negative_prompt_embeds=x["null"].expand(count, -1, -1),
        negative_prompt_attention_mask=x["null_mask"].expand(count, -1),
        width=size[0],
        height=size[1],
        sigmas=[1 - i / STEPS for i in range(STEPS)],
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        latents=x["noise"],
        proportional_attn=False,
        output_type="latent",
    ).images
    return y.chunk(2, dim=1)[0], samples


def run(job):
    folder = job["folder"]
    x = load_file(job["inputs"])
    index = json.loads((Path(folder) / "model_index.json").read_text())
    own = (Path(folder) / "pipeline.py").exists()
    code = {"custom_pipeline": folder, "trust_remote_code": True} if own else {}
    # A stock pipeline wants to hear of every part that is not in the folder.
    absent = {name: None for name, kind in index.items() if kind == [None, None]}
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **code, **absent)
    pipe.set_progress_bar_config(disable=True)
    print(type(pipe).__name__, type(pipe.transformer).__name__, pipe.transformer.dtype)
    if "prompts" in job:
        size = index.get("_trained_size", [0, 0])
        stock = {"width": size[0], "height": size[1], "num_inference_steps": STEPS, "guidance_scale": 4.0}
        stock["sigmas"] = [1 - i / STEPS for i in range(STEPS)]
        given = {"latents": x["noise"]} if own else {"latents": x["noise"][:, :, 0], **stock}
        pixels = 2 * pipe(job["prompts"], output_type="pt", **given).images - 1
        save_file({"pixels": pixels.contiguous()}, job["outputs"])
        return
    y, samples = of_own_code(pipe, x) if own else of_stock(pipe, x, index["_trained_size"])
    save_file({"y": y.contiguous(), "samples": samples.contiguous()}, job["outputs"])


torch.set_num_threads(1)
for job in json.loads(Path(sys.argv[1]).read_text()):
    run(job)
assert "flagdit" not in sys.modules
