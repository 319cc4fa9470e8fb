"""What a run is made of, and how its state is saved and taken back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flagdit.checkpoint import store
from flagdit.checkpoint.weights import ORIGIN, weights_group
from flagdit.config.load import to_yaml
from flagdit.config.schema import ModelConfig, Recipe
from flagdit.data_pipelines.mixture import Mixture, open_mixture
from flagdit.errors import CheckpointError, RecipeError
from flagdit.flow.objective import FlowMatching
from flagdit.model.flag_dit import FlagDiT
from flagdit.model.ops import choose_kernels
from flagdit.model.sizes import resolve
from flagdit.model.tokens import TokenSpec, num_tokens
from flagdit.parallel.engine import Engine, Tensors
from flagdit.parallel.mesh import ParallelContext
from flagdit.parallel.shards import Shards
from flagdit.train.display import Display
from flagdit.train.ema import Emas
from flagdit.train.engine import DTYPES, build_engine
from flagdit.train.folder import RunFolder, append_line, recipe_hash
from flagdit.train.guard import Guard
from flagdit.train.metrics import Meter, peak_tflops
from flagdit.train.saving import Saver, Snapshot
from flagdit.train.start import first_values
from flagdit.train.wandb_log import WandbLog


@dataclass
class Run:
    """Everything that a step and the hooks touch.

    Attributes:
        model_config: the model's shape with its named size applied.
        attention: name of the attention backend.
        kernels: what the blocks run on: triton or reference.
        content: names the data set by what is in it.
        model: the network itself, as the engine left it.
        null_text_LY: features of the empty caption; None for models without text.
        base: fingerprint of the frozen weights that adapters stand on; None without adapters.
        step: optimizer steps done, skipped ones included; also the number of the next global batch.
        validated: step and value of the last held-out loss.
    """

    recipe: Recipe
    folder: RunFolder
    model_config: ModelConfig
    attention: str
    kernels: str
    content: str
    model: FlagDiT
    engine: Engine
    emas: Emas
    objective: FlowMatching
    null_text_LY: Tensor | None
    guard: Guard
    meter: Meter
    display: Display
    saver: Saver
    base: str | None = None
    wandb: WandbLog | None = None
    step: int = 0
    validated: tuple[int, float] = (-1, 0.0)

    def log(self, line: dict[str, Any]) -> None:
        """Writes a line to metrics.jsonl and, where it is on, to wandb; rank 0 does."""
        if self.engine.mesh.is_first:
            append_line(self.folder.metrics, line)
        if self.wandb:
            self.wandb.metrics(line)

    def averaged(self, index: int) -> tuple[str, Tensors]:
        """The weights to look at, with their name: an average by its place in train.ema_decays, or the raw ones for -1
        and for runs without averages."""
        group = weights_group(self.recipe, index)
        return ("raw weights", self.engine.weights()) if group == "model" else (group, self.emas[index])

    def save(self, *, final: bool) -> None:
        """Saves a checkpoint of this step, then removes those that no rule of the recipe keeps; see `Saver.save`."""
        state = {
            "batch": self.step,
            "recipe": recipe_hash(self.recipe),
            "data": self.content,
            "base": self.base,
            "guard": self.guard.state(),
            "meter": self.meter.state(),
            "wandb": self.folder.wandb_id.read_text() if self.folder.wandb_id.exists() else None,
        }
        measured, loss = self.validated
        snapshot = Snapshot(
            self.step,
            self.shards(),
            state,
            documents={"recipe.yaml": to_yaml(self.recipe)},
            validation=loss if measured == self.step else None,
        )
        self.saver.save(snapshot, final=final)

    def shards(self) -> dict[str, Shards]:
        """This rank's part of a checkpoint's tensors, by group."""
        averages = {group: self.engine.shards(parts) for group, parts in self.emas.state().items()}
        return {**self.engine.state(), **averages}

    def restore(self, checkpoint: store.Checkpoint) -> None:
        """Takes back what `save` wrote.

        Raises:
            CheckpointError: the checkpoint belongs to another recipe, or was imported.
            RecipeError: the data set is not the one that the run was trained on.
        """
        if ORIGIN in checkpoint.state:
            raise CheckpointError(
                "this folder holds imported weights, without the optimizer state that continuing needs",
                where=str(self.folder.path),
                fix=f"Start a run of your own from them: name=… train.init_from={self.folder.path}.",
            )
        if checkpoint.state.get("base") != self.base:
            raise CheckpointError(
                f"the adapters of this run stand on other weights than train.init_from={self.recipe.train.init_from}",
                where=str(self.folder.path),
                fix="Give the run folder that it was started from.",
            )
        if checkpoint.state["recipe"] != recipe_hash(self.recipe):
            raise CheckpointError(
                "the checkpoint was made with another recipe than the run folder's recipe.yaml",
                where=str(self.folder.path),
                fix="Restore the recipe.yaml that belongs to these checkpoints.",
            )
        if checkpoint.state["data"] != self.content:
            raise RecipeError(
                f"{_named(self.recipe)} holds another data set than the one this run was trained on",
                where=str(self.folder.path),
                fix="Give the folder of that data set, or give the new run another name with name=….",
            )
        self.take_weights(checkpoint)
        self.guard.load(checkpoint.state["guard"])
        self.meter.load(checkpoint.state["meter"])
        self.step = checkpoint.state["batch"]
        known = checkpoint.state["wandb"]
        if known and self.engine.mesh.is_first and not self.folder.wandb_id.exists():
            self.folder.wandb.mkdir(exist_ok=True)
            self.folder.wandb_id.write_text(known)

    def take_weights(self, checkpoint: store.Checkpoint) -> None:
        """Weights, moments and averages of a checkpoint of this run; counters stay."""
        store.load_into(checkpoint.path, self.shards(), self.saver.ranks)
        self.engine.restored()


def build(recipe: Recipe, folder: RunFolder, display: Display, mesh: ParallelContext) -> Run:
    """A run at step 0.

    Raises:
        RecipeError: model.attention or model.kernels cannot serve on the mesh's device, or train.init_from holds
            another network.
        CheckpointError: train.init_from cannot be read.
        DataError: the data set cannot be opened.
    """
    mixture = open_mixture(recipe)
    model_config = resolve(recipe.model)
    kernels = choose_kernels(model_config, mesh.device, DTYPES[recipe.train.precision])
    start = first_values(recipe, folder.path)
    model, engine = build_engine(recipe, mesh, longest_sample(mixture, model_config), start.value)
    return Run(
        recipe=recipe,
        folder=folder,
        model_config=model_config,
        attention=model.attention_backend.name,
        kernels=kernels,
        content=mixture.content,
        model=model,
        engine=engine,
        emas=Emas(engine.weights(), recipe.train.ema_decays, recipe.train.ema_warmup),
        objective=FlowMatching(recipe.flow),
        null_text_LY=mixture.null_text if recipe.model.text_dim else None,
        guard=Guard(recipe.guard, folder.ledger, writes=mesh.is_first),
        meter=Meter(peak_tflops(mesh.device, recipe.log.peak_tflops, mesh.world)),
        display=display,
        saver=Saver(folder.path, recipe.checkpoint, mesh, display.note),
        base=start.fingerprint,
    )


def _named(recipe: Recipe) -> str:
    return f"data.sets={recipe.data.sets}" if recipe.data.sets else f"data.path={recipe.data.path}"


def longest_sample(mixture: Mixture, cfg: ModelConfig) -> int:
    """Tokens of the longest sample of the data.

    Raises:
        DataError: a size that is not a multiple of the patch.
    """
    spec = TokenSpec.from_model(cfg)
    sets = [member.dataset for member in mixture.members]
    return max((num_tokens(shape, d.modality, spec) for d in sets for shape, _ in d.shapes), default=0)
