"""One rank of `parity.py`: three steps of a tiny model on each mesh of a world, written down for comparison."""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from _shards import gathered
from safetensors.torch import save_file

from flagdit.batch import PackedBatch, PackedText, Segment
from flagdit.config.schema import (
    FlowConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Recipe,
    TrainConfig,
)
from flagdit.config.validate_start import LORA_TARGETS
from flagdit.flow.objective import FlowMatching, drop_conditions
from flagdit.flow.path import draw_path
from flagdit.flow.timesteps import draw_timesteps
from flagdit.model.sizes import resolve
from flagdit.model.tokens import TokenSpec, pack
from flagdit.parallel.engine import Engine
from flagdit.parallel.mesh import ParallelContext, mesh_of
from flagdit.train.ema import Emas
from flagdit.train.engine import build_engine

STEPS = 3

SHAPES = [(1, 4, 4), (1, 6, 10), (3, 4, 4), (1, 2, 2), (2, 4, 6), (1, 10, 6), (1, 4, 4), (4, 2, 2)]
"""Frames, rows and columns of the eight samples of a global batch: uneven pictures and videos."""

SHAPE = {"dim": 32, "num_layers": 2, "num_heads": 8, "num_kv_heads": 4, "ffn_dim": 64, "cond_dim": 16}
COMMON = {**SHAPE, "patch_size": 2, "text_dim": 12, "modalities": {"image": 3, "video": 2}}
MODELS = {
    "flag": ModelConfig(**COMMON),
    # LayerNorm over all heads together, as official checkpoints have it.
    "next": ModelConfig(**COMMON, block="next", qk_norm="layer", checkpointing="block"),
}


@dataclass(frozen=True)
class Mesh:
    """The shape of a mesh."""

    tensor: int = 1
    sequence: bool = False
    context: int = 1
    ring: int = 1
    data: int = 1

    @property
    def name(self) -> str:
        method = "Ulysses" if self.ring == 1 else "ring" if self.ring == self.context else "both"
        parts = [f"TP{self.tensor}" + (" SP" if self.sequence else "")] if self.tensor > 1 else []
        parts += [f"CP{self.context} {method}"] if self.context > 1 else []
        parts += [f"DP{self.data}"] if self.data > 1 else []
        return " · ".join(parts) or "one process"


@dataclass(frozen=True)
class Case:
    """One line of the parity table."""

    mesh: Mesh
    model: str
    zero: int = 1
    accumulation: int = 1
    precision: str = "fp32"
    offload: bool = False
    checkpointing: str = ""
    kernels: str = "auto"
    lora: bool = False

    @property
    def name(self) -> str:
        extras = [self.precision] * (self.precision != "fp32") + ["offload"] * self.offload
        extras += [self.checkpointing] if self.checkpointing else []
        extras += [self.kernels] if self.kernels != "auto" else []
        extras += ["LoRA"] * self.lora
        return " ".join([self.model, self.mesh.name, f"ZeRO {self.zero}", f"×{self.accumulation}", *extras])

    @property
    def reference(self) -> Case:
        """The same in one process."""
        return Case(Mesh(), self.model, accumulation=1, precision=self.precision, lora=self.lora)

    def recipe(self) -> Recipe:
        model = MODELS[self.model]
        mesh = self.mesh
        return Recipe(
            model=resolve(
                replace(model, checkpointing=self.checkpointing or model.checkpointing, kernels=self.kernels)
            ),
            flow=FlowConfig(caption_dropout=0.3, shift=2.0, shift_tokens=16),
            # Adam divides by √v + eps: a large eps keeps it from enlarging rounding where gradients are nearly zero.
            optimizer=OptimizerConfig(lr=1e-3, eps=1e-4, weight_decay=0.1, grad_clip=0.5),
            lora=LoraConfig(rank=3, targets=list(LORA_TARGETS)) if self.lora else LoraConfig(),
            train=TrainConfig(accumulation=self.accumulation, precision=self.precision),
            parallel=ParallelConfig(
                tensor=mesh.tensor,
                sequence=mesh.sequence,
                context=mesh.context,
                ring=mesh.ring,
                zero=self.zero,
                offload=self.offload,
            ),
        )


def meshes(world: int) -> Iterator[Mesh]:
    """All meshes with that many ranks, for eight heads."""
    sizes = [n for n in (1, 2, 4, 8) if n <= world]
    for tensor in sizes:
        for context in (n for n in sizes if world % (tensor * n) == 0):
            for ring in (n for n in sizes if context % n == 0):
                if 8 // tensor % (context // ring) == 0:
                    for sequence in (False, True) if tensor > 1 else (False,):
                        yield Mesh(tensor, sequence, context, ring, world // (tensor * context))


def cases(world: int, brief: bool = False) -> list[Case]:
    """The lines of the table for that many ranks.

    Args:
        brief: every ZeRO on every mesh, with one or two micro-batches in turn instead of both.
    """
    if world == 1:
        fp32 = [Case(Mesh(), model, accumulation=n) for model in MODELS for n in (1, 2)]
        return [*fp32, Case(Mesh(), "flag", precision="bf16"), *(Case(Mesh(), model, lora=True) for model in MODELS)]
    shapes = list(meshes(world))
    found = [Case(mesh, "flag", zero, accumulation) for mesh in shapes for zero in (1, 2, 3) for accumulation in (1, 2)]
    if brief:
        found = [case for case in found if (shapes.index(case.mesh) + case.zero + case.accumulation) % 2]
    found += [Case(mesh, "next", zero, 2) for mesh in shapes for zero in ((1, 3) if world == 2 else (1,))]
    if world == 2:
        mesh = Mesh(tensor=2, sequence=True)
        found += [Case(place, "flag", zero, 2, "bf16") for place in (mesh, Mesh(data=2)) for zero in (1, 2, 3)]
        found += [Case(Mesh(data=2), "flag", zero, 2, offload=True) for zero in (1, 2)]
        found += [Case(mesh, "flag", zero, 1, checkpointing="selective") for zero in (1, 2)]
        places = (mesh, Mesh(context=2), Mesh(context=2, ring=2))
        found += [Case(place, model, kernels="triton") for place in places for model in MODELS]
        found += [Case(place, "flag", zero, 2, lora=True) for place in (mesh, Mesh(context=2)) for zero in (1, 3)]
        found += [Case(Mesh(tensor=2), "next", lora=True)]
    else:
        found += [Case(Mesh(tensor=2, sequence=True, data=2), model, 2, lora=True) for model in MODELS]
    return found


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
    """Gives parameters that start at zero values too, else most gradients would be zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, shard in sorted(engine.state()["model"].items()):
        shard.fill(0.2 * torch.randn(shard.shape, generator=generator) + ("norm" in name))
    engine.restored()


def random_value(name: str, shape: torch.Size) -> torch.Tensor:
    """A frozen parameter: zero gates would hide what the adapters behind them do."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return 0.2 * torch.randn(shape, generator=generator) + ("norm" in name)


def accumulate(engine: Engine, recipe: Recipe, batches: list[PackedBatch]) -> float:
    """The gradients of a global batch; its loss."""
    objective = FlowMatching(recipe.flow)
    null = torch.zeros(1, recipe.model.text_dim)
    count = engine.total_samples(torch.tensor(float(sum(objective.count(b) for b in batches)))).item()
    total = torch.zeros(())
    for i, batch in enumerate(batches):
        batch = drop_conditions(batch, recipe.flow, 0, null_text_LY=null, null_label=0)
        t_S = draw_timesteps(batch, recipe.flow, 0)
        batch = engine.share(batch)
        loss = objective.loss(engine.model, batch, draw_path(batch, t_S, 0), denominator=count)
        engine.backward(loss.total, last=i == len(batches) - 1)
        total += loss.total.detach()
    return engine.total(total).item()


def run(case: Case, mesh: ParallelContext) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    """Losses and norms of three steps; on rank 0 the first step's gradients and what the last one left.

    Between the steps a batch is thrown away, and the model computes once with its averages: neither may leave a trace.
    """
    recipe = case.recipe()
    _, engine = build_engine(recipe, mesh, value=random_value if case.lora else None)
    randomize(engine)
    emas = Emas(engine.weights(), [0.5], warmup=False)
    numbers: dict[str, list[float]] = {"loss": [], "grad_norm": [], "ema_loss": []}
    tensors: dict[str, torch.Tensor] = {}
    parts = mesh.data.size * recipe.train.accumulation

    def mine(step: int) -> list[PackedBatch]:
        return packs(recipe, step, parts)[mesh.data.rank :: mesh.data.size]

    for step in range(STEPS):
        if step == 1:
            accumulate(engine, recipe, mine(99))
            engine.grad_norm()
            engine.discard()
        numbers["loss"].append(accumulate(engine, recipe, mine(step)))
        numbers["grad_norm"].append(engine.grad_norm().item())
        if step == 0:
            gradients = engine.shards({n: g.float() for n, g in engine.gradients().items()})
            tensors |= {f"gradient {n}": g for n, g in gathered(mesh, gradients).items()}
        engine.step(lr=recipe.optimizer.lr)
        emas.update(step)
        if step == 1:
            numbers["ema_loss"].append(held_out(engine, recipe, emas, mine(50)))
    state = engine.state()
    kinds = {"weight": state["model"], "average": engine.shards(emas[0]), "moment": state["optimizer"]}
    for kind, shards in kinds.items():
        tensors |= {f"{kind} {n}": w for n, w in gathered(mesh, shards).items() if n != "step"}
    return numbers, tensors


@torch.no_grad()
def held_out(engine: Engine, recipe: Recipe, emas: Emas, batches: list[PackedBatch]) -> float:
    """The loss of the averaged weights."""
    objective = FlowMatching(recipe.flow)
    total = torch.zeros((), dtype=torch.float64)
    with engine.using(emas[0]) as model:
        for batch in batches:
            t_S = torch.full((len(batch.segments),), 0.5)
            batch = engine.share(batch)
            total += objective.loss(model, batch, draw_path(batch, t_S, 0)).per_sample_S.double().sum()
    return engine.total(total).item() / len(SHAPES)


@contextmanager
def groups_of_its_own() -> Iterator[None]:
    """Frees the process groups that are formed inside: a run forms them once, this process hundreds of times."""
    known = set(dist.distributed_c10d._world.pg_map) if dist.is_initialized() else set()
    yield
    for group in set(dist.distributed_c10d._world.pg_map) - known if dist.is_initialized() else ():
        dist.destroy_process_group(group)


def main(world: int, out: Path, brief: bool, only: str) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo")
    wanted = [case for case in cases(world, brief) if all(word in case.name for word in only.split())]
    for shape in dict.fromkeys(case.mesh for case in wanted):
        same = [case for case in wanted if case.mesh == shape]
        with groups_of_its_own(), mesh_of(same[0].recipe(), "cpu") as mesh:
            for case in same:
                with groups_of_its_own():
                    numbers, tensors = run(case, mesh)
                if mesh.is_first:
                    save_file(tensors, out / f"{case.name}.safetensors")
                    (out / f"{case.name}.json").write_text(json.dumps(numbers))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "brief", sys.argv[4])
