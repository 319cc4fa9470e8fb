"""One rank of `reshard.py`: writes a state from each mesh of a world, then reads what all meshes wrote."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from _parity_ranks import Case, Mesh, accumulate, groups_of_its_own, packs, randomize

from flagdit.checkpoint import store
from flagdit.config.load import save_recipe
from flagdit.config.schema import CodecConfig
from flagdit.parallel.mesh import ParallelContext, mesh_of
from flagdit.parallel.shards import Shards
from flagdit.train.ema import Emas
from flagdit.train.engine import build_engine

STEP = 2
"""Optimizer steps that the state has seen."""

PLACES = {
    "TP1 DP1": Mesh(),
    "TP2 DP1": Mesh(tensor=2, sequence=True),
    "DP2": Mesh(data=2),
    "TP2 DP2": Mesh(tensor=2, sequence=True, data=2),
    "CP2 DP2": Mesh(context=2, data=2),
    "TP4": Mesh(tensor=4, sequence=True),
    "DP4": Mesh(data=4),
}
ORIGIN = "TP1 DP1"
EXPECTED = "losses.json"
"""The next three losses where nothing was saved or loaded."""


@dataclass(frozen=True)
class Place:
    """A mesh and a ZeRO stage, by the name under which its checkpoint lies."""

    name: str
    mesh: Mesh
    zero: int

    @property
    def world(self) -> int:
        return self.mesh.tensor * self.mesh.context * self.mesh.data


def places(wanted: str) -> list[Place]:
    """All places, or those whose names are listed, separated by commas; the origin always."""
    found = [Place(ORIGIN, Mesh(), 1)]
    for name, mesh in PLACES.items():
        if name != ORIGIN:
            found += [Place(f"{name} ZeRO {zero}", mesh, zero) for zero in (1, 2, 3)]
    chosen = wanted.split(",") if wanted else [place.name for place in found if "DP2 ZeRO" not in place.name[:8]]
    return [place for place in found if place.name in (ORIGIN, *chosen)]


class State:
    """An engine with an average, on a mesh."""

    def __init__(self, place: Place, mesh: ParallelContext):
        self.recipe = Case(place.mesh, "flag", place.zero).recipe()
        self.mesh, self.ranks = mesh, mesh.own_group()
        _, self.engine = build_engine(self.recipe, mesh)
        self.emas = Emas(self.engine.weights(), [0.5], warmup=False)

    def shards(self) -> dict[str, Shards]:
        return {**self.engine.state(), "ema_0.5": self.engine.shards(self.emas[0])}

    def train(self, first: int, steps: int) -> list[float]:
        """Losses of some steps."""
        losses = []
        size, rank = self.mesh.data.size, self.mesh.data.rank
        for step in range(first, first + steps):
            losses.append(accumulate(self.engine, self.recipe, packs(self.recipe, step, size)[rank::size]))
            self.engine.grad_norm()
            self.engine.step(lr=self.recipe.optimizer.lr)
            self.emas.update(step)
        return losses

    def save(self, run: Path) -> None:
        """Writes a run folder."""
        if self.mesh.is_first:
            run.mkdir()
            train = replace(self.recipe.train, ema_decays=[0.5])
            codec = CodecConfig(kind="diffusers", path="somewhere")  # whose latents may have any number of channels
            save_recipe(replace(self.recipe, train=train, codec=codec, name="run"), run / "recipe.yaml")
        store.save(run, STEP, self.shards(), {"data": "made up", "base": None}, ranks=self.ranks)

    def load(self, run: Path) -> None:
        store.load_into(store.find(run), self.shards(), self.ranks)
        self.engine.restored()

    def differing(self, origin: Path) -> list[str]:
        """Tensors of which this rank's part is not, bit by bit, that of the first checkpoint."""
        found = []
        for group, shards in self.shards().items():
            source = store.open_group(store.find(origin), group)
            assert source.entries.keys() == shards.keys()
            for name, shard in shards.items():
                whole = source.read(name)
                parts = [(memory.cpu(), box.of(whole)) for box, memory in shard.parts]
                if not all(torch.equal(_bits(ours), _bits(theirs)) for ours, theirs in parts):
                    found.append(f"{group}/{name}")
        return found


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32)


def write(place: Place, mesh: ParallelContext, folder: Path) -> None:
    """Saves the one state from this place: the origin has trained it, and trains on; the others load it."""
    state = State(place, mesh)
    if place.name == ORIGIN:
        randomize(state.engine)
        state.emas = Emas(state.engine.weights(), [0.5], warmup=False)
        state.train(0, STEP)
        state.save(folder / place.name)
        (folder / EXPECTED).write_text(json.dumps(state.train(STEP, 3)))
    else:
        state.load(folder / ORIGIN)
        state.save(folder / place.name)


def read(place: Place, state: State, others: list[Place], folder: Path) -> list[dict]:
    """What became of every place's checkpoint here: names of tensors that differ, and the next three losses."""
    rows = []
    for other in others:
        state.load(folder / other.name)
        differing = [name for found in state.mesh.from_all(state.differing(folder / ORIGIN)) for name in found]
        rows.append({"from": other.name, "to": place.name, "differing": differing, "losses": state.train(STEP, 3)})
    return rows


def await_file(file: Path) -> None:
    """Until another world has written its part."""
    deadline = time.monotonic() + 600
    while not file.exists():
        assert time.monotonic() < deadline, f"{file} does not appear"
        time.sleep(0.2)


def main(world: int, folder: Path, wanted: str) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo")
    everywhere = places(wanted)
    here = [place for place in everywhere if place.world == world]
    rows: list[dict] = []
    if world > 1:
        await_file(folder / "written_1.json")
    for phase in ("written", "read"):
        for place in here:
            recipe = Case(place.mesh, "flag", place.zero).recipe()
            with groups_of_its_own(), mesh_of(recipe, "cpu") as mesh:
                if phase == "written":
                    write(place, mesh, folder)
                else:
                    rows += read(place, State(place, mesh), everywhere, folder)
        if int(dist.get_rank() if world > 1 else 0) == 0:
            (folder / f"{phase}_{world}.json").write_text(json.dumps(rows))
        for other in {place.world for place in everywhere}:
            await_file(folder / f"written_{other}.json")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "")
