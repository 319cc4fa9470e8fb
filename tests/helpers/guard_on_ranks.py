"""Run by every rank of torchrun: takes steps that go wrong on one rank alone and writes what became of the weights.

guard_on_ranks.py DATA OUT    writes OUT/RANK.json: mesh → case → [weights unchanged, equal to an honest step]
"""

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from run_files import same

from flagdit.config.load import load_recipe
from flagdit.data_pipelines.loader import build_loader
from flagdit.parallel.mesh import mesh_of
from flagdit.train import step as step_module
from flagdit.train.display import SilentDisplay
from flagdit.train.folder import RunFolder
from flagdit.train.run import Run, build
from flagdit.train.step import take_step

MESHES = {
    "DP2 CP2 ZeRO 1": ["parallel.context=2"],
    "TP2 DP2 ZeRO 3": ["parallel.tensor=2", "parallel.sequence=false", "parallel.zero=3"],
}
RANK = 2
"""The one on which things go wrong."""


@contextmanager
def bad_sample(run: Run, times: int = 10**9) -> Iterator[None]:
    """Not a number in what the model is to predict for this rank's first sample, at the first so many forwards."""
    honest, left = step_module.draw_path, [times]

    def draw(batch, *rest):
        path = honest(batch, *rest)
        if left[0]:
            left[0] -= 1
            path.velocity["image"][0, 0] = math.nan
        return path

    with patch.object(step_module, "draw_path", draw):
        yield


@contextmanager
def bad_gradient(run: Run) -> Iterator[None]:
    """One element of this rank's gradients is infinite; the loss is fine."""
    honest = run.engine.grad_norm

    def grad_norm():
        next(iter(run.engine.gradients().values())).view(-1)[0] = math.inf
        return honest()

    with patch.object(run.engine, "grad_norm", grad_norm):
        yield


@contextmanager
def bad_judgement(run: Run) -> Iterator[None]:
    """This rank alone sees another loss than all the others."""
    with patch.object(run.guard, "verdict", lambda loss, norm: "seen here only"):
        yield


CASES: dict[str, Callable] = {
    "sample": bad_sample,
    "gradient": bad_gradient,
    "judgement": bad_judgement,
    "accident": lambda run: bad_sample(run, times=1),
}


def state_of(run: Run) -> dict[str, torch.Tensor]:
    """This rank's part of weights, moments and averages, and the weights that its model computes with."""
    groups = run.shards()
    return {
        f"{group}/{name}/{i}": memory.detach().clone()
        for group, shards in groups.items()
        for name, shard in shards.items()
        for i, (_, memory) in enumerate(shard.parts)
    }


def two_steps(recipe, out: Path, mesh, spoilt: Callable | None) -> tuple[dict, dict, dict]:
    """The state at the start, after an honest step, and after one that may be spoilt on rank RANK."""
    run = build(recipe, RunFolder(out), SilentDisplay(), mesh)
    loader = build_loader(recipe, 0, mesh.data.rank, mesh.data.size)
    states = [state_of(run)]
    for trouble in (None, spoilt):
        with trouble(run) if trouble and mesh.rank == RANK else nullcontext():
            take_step(run, next(loader), 0.0)
        states.append(state_of(run))
    return tuple(states)


def main() -> None:
    data, out = sys.argv[1], Path(sys.argv[2])
    dist.init_process_group("gloo")  # once: the meshes below form their groups in it
    found: dict[str, dict[str, list[bool]]] = {}
    for name, keys in MESHES.items():
        common = [f"data.path={data}", "data.batch_size=16", "optimizer.warmup_steps=1", "train.device=cpu"]
        recipe = load_recipe("quickstart", [*common, "model.num_layers=2", *keys])
        found[name] = {}
        with mesh_of(recipe, "cpu") as mesh:
            _, _, honest = two_steps(recipe, out, mesh, None)
            for case, trouble in CASES.items():
                folder = out / f"{name}_{case}"
                folder.mkdir(exist_ok=True)
                _, before, after = two_steps(recipe, folder, mesh, trouble)
                found[name][case] = [same(before, after), same(after, honest)]
    (out / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
