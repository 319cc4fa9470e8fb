"""Run by every rank of torchrun: samples a run on several meshes and writes what came out.

sample_on_ranks.py RUN OUT tensor=2,context=2 tensor=1,context=4 …    files OUT/TENSOR_CONTEXT.pt
sample_on_ranks.py RUN OUT many                                       files OUT/many/*.png
sample_on_ranks.py RUN OUT edit                                       file OUT/edited.png, of OUT/given.png
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from flagdit.checkpoint.weights import load_run_recipe
from flagdit.generate.compose import panorama
from flagdit.generate.edit import edit, edit_file
from flagdit.generate.inference import shared
from flagdit.generate.many import sample_many
from flagdit.generate.mesh import sampling_mesh
from flagdit.generate.pipeline import Pipeline, load_pipeline


def pictures(pipeline: Pipeline) -> list[torch.Tensor]:
    """Samples that use everything that a mesh could get wrong: uneven sizes, guidance, scaling, sets, starts, views.

    Of a model whose recipe asks for one huge picture: that picture.
    """
    cfg = pipeline.recipe.sample
    if not pipeline.model.cfg.num_classes:
        return pipeline.generate([""], cfg)
    scaled = replace(cfg, train_size="8x8", guidance_interval=[0.0, 0.5], guidance_rescale=0.5, schedule="sigmoid")
    drawn = pipeline.generate([0, 1, 2], cfg, sizes=[(8, 8), (12, 8), (4, 6)])
    drawn += pipeline.generate([3, 1], scaled, sizes=[(16, 8), (8, 8)])
    drawn += pipeline.generate([0, 3], cfg, inference=shared(pipeline.inference(scaled), 2, until=0.6))
    right = torch.arange(8).expand(1, 8, 8) >= 3
    drawn += edit(pipeline, [drawn[0]], [2], cfg, strength=0.5, masks=[right])
    drawn.append(panorama(pipeline, [0, 1], cfg, size=(20, 8), window=(8, 8), wrap=True))
    return drawn


def main() -> None:
    run, out, *tasks = sys.argv[1:]
    recipe = load_run_recipe(Path(run))
    dist.init_process_group("gloo")  # once: the meshes below form their groups in it
    for task in tasks:
        if task == "many":
            with sampling_mesh(recipe, tensor=1, context=1) as mesh:
                sample_many(Path(run), ["0", "1", "2", "3", "0"], Path(out) / "many", repeat=2, mesh=mesh)
            continue
        if task == "edit":
            with sampling_mesh(recipe, tensor=2, context=2) as mesh:
                edit_file(Path(run), Path(out) / "given.png", "2", Path(out) / "edited.png", mesh=mesh)
            continue
        sizes = dict(part.split("=") for part in task.split(","))
        tensor, context = int(sizes["tensor"]), int(sizes["context"])
        with sampling_mesh(recipe, tensor=tensor, context=context) as mesh:
            drawn = pictures(load_pipeline(run, mesh=mesh))
            if mesh.is_first:
                torch.save(drawn, Path(out) / f"{tensor}_{context}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
