"""Run by every rank: three steps of a tiny model on each mesh that a world has, written down for comparison.

Not a test by itself: `test_parity.py` starts it and compares what it writes with one process.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from flagdit.batch import PackedBatch, PackedText, Segment
from flagdit.config.schema import FlowConfig, ModelConfig, OptimizerConfig, ParallelConfig, Recipe, TrainConfig
from flagdit.flow.noise import draw_noise
from flagdit.flow.objective import FlowMatching, drop_conditions
from flagdit.flow.timesteps import draw_timesteps
from flagdit.model.sizes import resolve
from flagdit.model.tokens import TokenSpec, pack
from flagdit.parallel.engine import Engine
from flagdit.parallel.mesh import ParallelContext, mesh_of
from flagdit.train.engine import build_engine

STEPS = 3

MODELS = {
    # Flag-DiT over images and videos with text; Next-DiT with grouped queries and LayerNorm over all heads.
    "flag": ModelConfig(
        dim=32, num_layers=2, num_heads=8, num_kv_heads=4, ffn_dim=64, cond_dim=16, patch_size=2, text_dim=12,
        modalities={"image": 3, "video": 2}, rope="axial", rope_axes=2,
    ),
    "next": ModelConfig(
        block="next", dim=32, num_layers=2, num_heads=8, num_kv_heads=4, ffn_dim=64, cond_dim=16, patch_size=2,
        text_dim=12, modalities={"image": 3, "video": 2}, qk_norm="layer",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Mesh:
    """One column of the parity table."""

    tensor: int = 1
    sequence: bool = False
    context: int = 1
    ring: int = 1
    data: int = 1

    @property
    def world(self) -> int:
        return self.tensor * self.context * self.data

    @property
    def name(self) -> str:
        method = {1: "ulysses", self.context: "ring"}.get(self.ring, "ulysses+ring")
        parts = [f"TP{self.tensor}" + (" SP" if self.sequence else "")] if self.tensor > 1 else []
        parts += [f"CP{self.context} {method}"] if self.context > 1 else []
        parts += [f"DP{self.data}"] if self.data > 1 else []
        return " · ".join(parts) or "one process"


def meshes(world: int) -> list[Mesh]:
    """All meshes of the table with that many ranks."""
    found = []
    for tensor in (1, 2, 4, 8):
        for context in (1, 2, 4, 8):
            if world % (tensor * context):
                continue
            for ring in (1, 2, 4, 8):
                if context % ring or 8 // tensor % (context // ring):
                    continue
                for sequence in (False, True) if tensor > 1 else (False,):
                    found.append(Mesh(tensor, sequence, context, ring, world // (tensor * context)))
    return found


def recipe_of(
    model: str, mesh: Mesh, zero: int, accumulation: int, precision: str = "fp32", offload: bool = False
) -> Recipe:
    return Recipe(
        model=resolve(MODELS[model]),
        flow=FlowConfig(caption_dropout=0.3, shift=2.0, shift_tokens=16),
        optimizer=OptimizerConfig(lr=1e-3, eps=1e-4, weight_decay=0.1, grad_clip=0.5),
        train=TrainConfig(accumulation=accumulation, precision=precision),
        parallel=ParallelConfig(
            tensor=mesh.tensor, sequence=mesh.sequence, context=mesh.context, ring=mesh.ring, zero=zero, offload=offload
        ),
    )


SHAPES = [(1, 4, 4), (1, 6, 10), (3, 4, 4), (1, 2, 2), (2, 4, 6), (1, 10, 2), (1, 4, 4), (4, 2, 2)]
"""Frames, rows and columns of the eight samples of a global batch: uneven pictures and videos."""


def packs(recipe: Recipe, step: int, parts: int) -> list[PackedBatch]:
    """The global batch of a step in equal parts."""
    generator = torch.Generator().manual_seed(step)
    samples = []
    for i, (f, h, w) in enumerate(SHAPES):
        modality = "video" if f > 1 else "image"
        shape = (recipe.model.modalities[modality], f, h, w)
        text = torch.randn(1 + (3 * i + step) % 5, recipe.model.text_dim, generator=generator)
        samples.append((Segment(8 * step + i, modality, shape), torch.randn(shape, generator=generator), text))
    size = len(samples) // parts
    spec = TokenSpec.from_model(recipe.model)
    result = []
    for first in range(0, len(samples), size):
        segments, latents, texts = zip(*samples[first : first + size], strict=True)
        result.append(pack(segments, latents, spec, text=PackedText.pack(texts)))
    return result


def randomize(engine: Engine, seed: int = 7) -> None:
    """Gives zero-initialized parameters values too, else most gradients would be zero."""
    shapes = {name: tuple(t.shape) for name, t in whole_weights(engine.mesh, engine).items()}
    generator = torch.Generator().manual_seed(seed)
    values = {n: 0.2 * torch.randn(shape, generator=generator) + ("norm" in n) for n, shape in sorted(shapes.items())}
    state = engine.state()["optimizer"]
    moments = {f"{n}.{m}": torch.zeros(s) for n, s in shapes.items() for m in ("exp_avg", "exp_avg_sq")}
    engine.load({"model": values, "optimizer": {**moments, "step": torch.zeros_like(state["step"])}})


def whole_weights(mesh: ParallelContext, engine: Engine) -> dict[str, torch.Tensor]:
    """Whole weights on every rank."""
    holder = [engine.gather(engine.weights())]
    if mesh.world > 1:
        torch.distributed.broadcast_object_list(holder, src=0)
    return holder[0]


def train(recipe: Recipe, mesh: ParallelContext) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    """Losses and norms of three steps; on rank 0, the first step's gradients and the last weights."""
    _, engine = build_engine(recipe, mesh)
    randomize(engine)
    objective = FlowMatching(recipe.flow)
    null = torch.zeros(1, recipe.model.text_dim)
    numbers: dict[str, list[float]] = {"loss": [], "grad_norm": []}
    tensors: dict[str, torch.Tensor] = {}
    parts = mesh.data.size * recipe.train.accumulation
    for step in range(STEPS):
        mine = packs(recipe, step, parts)[mesh.data.rank :: mesh.data.size]
        count = engine.total_samples(torch.tensor(float(sum(objective.count(b) for b in mine)))).item()
        total = torch.zeros(())
        for i, batch in enumerate(mine):
            batch = drop_conditions(batch, recipe.flow, 0, null_text_LY=null, null_label=0)
            t_S = draw_timesteps(batch, recipe.flow, 0)
            batch = engine.share(batch)
            loss = objective.loss(engine.model, batch, draw_noise(batch, 0), t_S, denominator=count)
            engine.backward(loss.total, last=i == len(mine) - 1)
            total += loss.total.detach()
        numbers["loss"].append(engine.total(total).item())
        numbers["grad_norm"].append(engine.grad_norm().item())
        if step == 0:
            gathered = engine.gather({n: g.float() for n, g in engine.gradients().items()})
            tensors |= {f"grad.{n}": g.clone() for n, g in gathered.items()}
        engine.step(lr=recipe.optimizer.lr)
    tensors |= {f"weight.{n}": w.clone() for n, w in engine.gather(engine.weights()).items()}
    return numbers, tensors


def main(world: int, out: Path, only: str = "") -> None:
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group("gloo")
    for mesh in meshes(world):
        # The batch only has to divide; the samples are made here.
        first = recipe_of("flag", mesh, 1, 1)
        with mesh_of(first, "cpu") as place:
            for model in MODELS:
                for zero in (1, 2, 3) if world > 1 else (1,):
                    for accumulation in (1, 2):
                        name = f"{model} {mesh.name} zero{zero} acc{accumulation}"
                        if only and not all(word in name for word in only.split()):
                            continue
                        recipe = recipe_of(model, mesh, zero, accumulation)
                        numbers, tensors = train(replace(recipe), place)
                        if place.is_first:
                            save_file(tensors, out / f"{name}.safetensors")
                            (out / f"{name}.json").write_text(json.dumps(numbers))
                            print(name, numbers, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
