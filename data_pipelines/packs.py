"""Samples of one global batch to packs: what a loader process does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import get_worker_info

from flagdit.batch import PackedBatch, PackedText, Segment
from flagdit.config.schema import Recipe
from flagdit.data_pipelines.batches import Part
from flagdit.data_pipelines.index import Encoded
from flagdit.data_pipelines.mixture import Mixture
from flagdit.data_pipelines.parcel import Blocks, free, map_tensors, place_in, unwrap, wrap
from flagdit.errors import DataError, FlagDiTError
from flagdit.model.tokens import Empty, TokenSpec, pack


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be read and was left out of its batch."""

    step: int
    sample_id: int
    key: str
    reason: str


@dataclass
class Loaded:
    """What a loader process makes of its part of one global batch."""

    packs: list[PackedBatch]
    bad: list[BadSample]
    samples: int = 0
    error: FlagDiTError | None = None  # as a value: the DataLoader would turn it into a traceback of a worker
    blocks: list[Tensor] | None = None  # the memory of the packs, while they travel from a loader process
    pinned: bool = False  # whether these are copies of the loader process's blocks

    def wrapped(self, blocks: Blocks) -> Loaded:
        """Ready to travel to the training process."""
        packs, taken = wrap(self.packs, blocks)
        return replace(self, packs=packs, blocks=taken)

    def pin_memory(self) -> Loaded:
        """Called by the DataLoader's pinning thread."""
        if self.blocks is not None:
            pinned = [block.pin_memory() for block in self.blocks]
            for block in self.blocks:
                free(block)
            return replace(self, blocks=pinned, pinned=True)
        return replace(self, packs=[map_tensors(p, lambda x: x.pin_memory()) for p in self.packs])

    def unwrapped(self) -> Loaded:
        """As it was before it travelled."""
        if self.blocks is None:
            return self
        packs = place_in(self.packs, self.blocks) if self.pinned else unwrap(self.packs, self.blocks)
        return replace(self, packs=packs, blocks=None)


class PackReader(TorchDataset):
    """(number of the global batch, this rank's part of it) → packs. Lives in the loader processes."""

    def __init__(self, recipe: Recipe, mixture: Mixture):
        self.recipe, self.mixture = recipe, mixture
        self._blocks = Blocks()

    def __getitem__(self, planned: tuple[int, list[Part]]) -> Loaded:
        """Packs, which are on their way to the training process if this is another one."""
        if get_worker_info() is None:
            return self._load(*planned, torch.empty)
        return self._load(*planned, self._blocks.empty).wrapped(self._blocks)

    def _load(self, k: int, parts: list[Part], empty: Empty) -> Loaded:
        loaded = Loaded([], [], sum(map(len, parts)))
        try:
            for part in parts:
                samples, epochs = [], []
                for sample_id, epoch in zip(part.ids.tolist(), part.epochs.tolist(), strict=True):
                    try:
                        samples.append((sample_id, self.mixture.read(sample_id, epoch)))
                        epochs.append(epoch)
                    except DataError as error:
                        loaded.bad.append(BadSample(k, sample_id, self.mixture.key(sample_id), error.what))
                made = make_pack(samples, epochs, self.mixture, self.recipe, empty) if samples else None
                loaded.packs.append(made or placeholder(self.mixture, self.recipe))
        except FlagDiTError as error:
            return Loaded([], loaded.bad, loaded.samples, error)
        except MemoryError as error:  # of this machine, now: no reason to leave a sample out
            return Loaded([], loaded.bad, loaded.samples, out_of_memory(error))
        return loaded


def out_of_memory(error: MemoryError) -> DataError:
    return DataError(
        f"a process that reads the data ran out of memory ({error})",
        fix="Often there are too many: lower data.workers or data.prefetch. The same command continues the run.",
    )


def make_pack(
    samples: Sequence[tuple[int, Encoded]],
    epochs: Sequence[int],
    mixture: Mixture,
    recipe: Recipe,
    empty: Empty = torch.empty,
) -> PackedBatch:
    """One pack of samples, given with their ids in the run; `empty` makes its tensors."""
    segments = []
    for (sample_id, s), epoch in zip(samples, epochs, strict=True):
        c, f, h, w = s.latent_CFHW.shape
        dataset, _ = mixture.of(sample_id)
        segments.append(Segment(sample_id, dataset.modality, (c, f, h, w), s.key, epoch))
    texts = [s.text_LY for _, s in samples if s.text_LY is not None]
    return pack(
        segments,
        [s.latent_CFHW for _, s in samples],
        TokenSpec.from_model(recipe.model),
        text=PackedText.pack(texts, empty) if recipe.model.text_dim else None,
        labels=[s.label for _, s in samples] if recipe.model.num_classes else None,
        empty=empty,
    )


def placeholder(mixture: Mixture, recipe: Recipe) -> PackedBatch:
    """A weightless pack: one patch of zeros for every modality of the model, with the null caption or class.

    It stands where a pack has no readable sample, so that every parameter gets a gradient and no collective waits.
    """
    model = recipe.model
    side = model.patch_size
    segments = [Segment(0, m, (channels, 1, side, side), "placeholder") for m, channels in model.modalities.items()]
    text = None
    if model.text_dim:
        assert mixture.null_text is not None, "checked when the loader was built"
        text = PackedText.pack([mixture.null_text] * len(segments))
    batch = pack(
        segments,
        [torch.zeros(s.shape) for s in segments],
        TokenSpec.from_model(model),
        text=text,
        labels=[model.num_classes] * len(segments) if model.num_classes else None,
    )
    return replace(batch, weightless=True)
