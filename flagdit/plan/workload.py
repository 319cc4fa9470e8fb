"""What one rank computes in one micro-batch: the mesh, the pack and its share of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flagdit.config.schema import ModelConfig, ParallelConfig, Recipe
from flagdit.config.validate import parse_size
from flagdit.model.sizes import resolve
from flagdit.model.tokens import TokenSpec, num_tokens
from flagdit.parallel.mesh import check_mesh

AUTOENCODER_FACTOR = 8
"""Pixels per latent where only the autoencoder's folder could tell: that of the common picture autoencoders."""


@dataclass(frozen=True)
class Workload:
    """A recipe on so many GPUs.

    Attributes:
        model: with its size applied.
        gpus: ranks of the run.
        seqlens: tokens of each sample of a pack (one micro-batch of one data rank), special tokens included.
        patches: patch tokens among them.
        text_seqlens: text tokens of each sample; empty without text.
        accumulation: micro-batches per step.
        steps: of the run.
        emas: averages kept beside the weights.
        width: bytes of a parameter and an activation: 2 or 4.
    """

    model: ModelConfig
    parallel: ParallelConfig
    gpus: int
    seqlens: tuple[int, ...]
    patches: int
    text_seqlens: tuple[int, ...]
    accumulation: int
    steps: int
    emas: int
    width: int

    @property
    def tokens(self) -> int:
        """Of a pack."""
        return sum(self.seqlens)

    @property
    def text_tokens(self) -> int:
        """Of a pack."""
        return sum(self.text_seqlens)

    @property
    def shards(self) -> int:
        """Ranks over which ZeRO spreads states: data × context."""
        return self.gpus // self.parallel.tensor

    @property
    def data(self) -> int:
        """Ranks that hold different packs."""
        return self.shards // self.parallel.context

    @property
    def tokens_per_step(self) -> int:
        return self.tokens * self.data * self.accumulation


def workload_of(recipe: Recipe, gpus: int, sample_tokens: int = 0, text_tokens: int = 0) -> Workload:
    """What a recipe gives each rank.

    Args:
        recipe: any that validates.
        gpus: ranks of the run; a multiple of tensor × context.
        sample_tokens: mean tokens of a sample; 0: those of `sample.size` × `sample.frames`.
        text_tokens: mean tokens of a caption; 0: `text.max_length`.

    Raises:
        RecipeError: the mesh does not divide the GPUs, or the batch not the data ranks.
    """
    p, m = recipe.parallel, resolve(recipe.model)
    check_mesh(replace(recipe, model=m), gpus)
    patches, special = sample_of(recipe, m)
    length = sample_tokens or patches + special
    packs = gpus // (p.tensor * p.context) * recipe.train.accumulation
    # A micro-batch joins so many samples or, with a token budget, packs; a sample longer than the budget is one.
    share, budget = recipe.data.batch_size // packs, recipe.data.pack_tokens
    samples = share * (max(budget // length, 1) if budget else 1)
    return Workload(
        model=m,
        parallel=p,
        gpus=gpus,
        seqlens=(length,) * samples,
        patches=round(samples * length * patches / (patches + special)),
        text_seqlens=(text_tokens or recipe.text.max_length,) * samples if m.text_dim else (),
        accumulation=recipe.train.accumulation,
        steps=recipe.train.steps,
        emas=len(recipe.train.ema_decays),
        width=2 if recipe.train.precision == "bf16" else 4,
    )


def sample_of(recipe: Recipe, model: ModelConfig) -> tuple[int, int]:
    """Patch tokens and special tokens of a sample of `sample.size` × `sample.frames`."""
    width, height = parse_size(recipe.sample.size)
    factor = {"pixels": 1, "diffusers": AUTOENCODER_FACTOR}.get(recipe.codec.kind, recipe.codec.factor)
    unit = factor * model.patch_size
    rows, columns = -(-height // unit) * model.patch_size, -(-width // unit) * model.patch_size
    modality = recipe.sample.modality
    shape = (model.modalities[modality], recipe.sample.frames, rows, columns)
    total = num_tokens(shape, modality, TokenSpec.from_model(model))
    bare = num_tokens(shape, modality, TokenSpec(model.patch_size, False, False))
    return bare, total - bare
