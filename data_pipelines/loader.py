"""Encoded samples to packs, in the order of the run.

The state of a loader is one integer: the number of the next global batch. Workers, prefetch and the point of a
continuation change nothing of what a batch holds.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from multiprocessing.connection import wait
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from flagdit.batch import PackedBatch, PackedText, Segment
from flagdit.config.schema import Recipe
from flagdit.data_pipelines.check import check_dataset, check_validation
from flagdit.data_pipelines.index import Dataset, Encoded
from flagdit.data_pipelines.order import batches_per_epoch, global_batch
from flagdit.errors import DataError, FlagDiTError, RecipeError
from flagdit.model.tokens import TokenSpec, pack

WORST_BATCH = 0.5


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be read and was left out of its batch."""

    step: int
    sample_id: int
    key: str
    reason: str


@dataclass
class _Loaded:
    """What a worker makes of one global batch."""

    packs: list[PackedBatch]
    bad: list[BadSample]
    error: FlagDiTError | None = None  # as a value: the DataLoader would turn it into a traceback of a worker

    def pin_memory(self) -> _Loaded:
        """Called by the DataLoader's pinning thread."""
        return replace(self, packs=[_pinned(p) for p in self.packs])


def _pinned(batch: PackedBatch) -> PackedBatch:
    pinned: dict[str, Any] = {}
    for name, value in vars(batch.layout).items():
        if isinstance(value, Tensor):
            pinned[name] = value.pin_memory()
        elif isinstance(value, dict):
            pinned[name] = {modality: x.pin_memory() for modality, x in value.items()}
    return replace(
        batch,
        layout=replace(batch.layout, **pinned),
        patches={m: x.pin_memory() for m, x in batch.patches.items()},
        text=batch.text and replace(batch.text, features_MY=batch.text.features_MY.pin_memory()),
        labels_S=None if batch.labels_S is None else batch.labels_S.pin_memory(),
    )


class _Packs(TorchDataset):
    """Global batch number → the packs of one data rank. Lives in the workers."""

    def __init__(self, recipe: Recipe, dataset: Dataset, data_rank: int, data_size: int):
        self.recipe, self.dataset = recipe, dataset
        self.data_rank, self.data_size = data_rank, data_size
        self.ids = dataset.split(recipe.data.split)
        self.spec = TokenSpec.from_model(recipe.model)

    def __getitem__(self, k: int) -> _Loaded:
        cfg = self.recipe
        packs: list[PackedBatch] = []
        bad: list[BadSample] = []
        try:
            epoch, positions = global_batch(cfg.seed, len(self.ids), cfg.data.batch_size, k)
            parts = np.split(positions + self.ids.start, cfg.train.accumulation * self.data_size)
            for part in parts[self.data_rank :: self.data_size]:
                samples = []
                for sample_id in part.tolist():
                    try:
                        samples.append(self.dataset.read(sample_id))
                    except DataError as error:
                        bad.append(BadSample(k, sample_id, self.dataset.key(sample_id), error.what))
                packs.append(
                    _pack(samples, self.dataset, cfg, self.spec, epoch)
                    if samples
                    else placeholder(self.dataset, cfg, epoch)
                )
        except FlagDiTError as error:
            return _Loaded([], bad, error)
        return _Loaded(packs, bad)


def _pack(samples: Sequence[Encoded], dataset: Dataset, recipe: Recipe, spec: TokenSpec, epoch: int) -> PackedBatch:
    segments = []
    for s in samples:
        c, f, h, w = s.latent_CFHW.shape
        segments.append(Segment(s.sample_id, dataset.modality, (c, f, h, w), s.key))
    texts = [s.text_LY for s in samples if s.text_LY is not None]
    return pack(
        segments,
        [s.latent_CFHW for s in samples],
        spec,
        text=PackedText.pack(texts) if recipe.model.text_dim else None,
        labels=[s.label for s in samples] if recipe.model.num_classes else None,
        epoch=epoch,
    )


def placeholder(dataset: Dataset, recipe: Recipe, epoch: int) -> PackedBatch:
    """A weightless pack: one patch of zeros for every modality of the model, with the null caption or class.

    It stands where a pack has no readable sample, so that every parameter gets a gradient and no collective waits.
    """
    model = recipe.model
    side = model.patch_size
    segments = [Segment(0, m, (channels, 1, side, side), "placeholder") for m, channels in model.modalities.items()]
    text = None
    if model.text_dim:
        assert dataset.null_text is not None, "checked when the loader was built"
        text = PackedText.pack([dataset.null_text] * len(segments))
    batch = pack(
        segments,
        [torch.zeros(s.shape) for s in segments],
        TokenSpec.from_model(model),
        text=text,
        labels=[model.num_classes] * len(segments) if model.num_classes else None,
        epoch=epoch,
    )
    return replace(batch, weightless=True)


class Loader:
    """Endless iterator over global batches, each a list of the packs (micro-batches) of one optimizer step.

    Every rank yields `train.accumulation` packs a step. A sample that cannot be read is left out of its pack, recorded
    in `bad` and never replaced; where no sample of a pack is left, a weightless pack stands in its place.

    Attributes:
        step: number of the next global batch: the loader's whole state.
        bad: every bad sample that this rank has met, once, in the order of discovery.
        batches_per_epoch: global batches in one pass over the split.
    """

    def __init__(self, recipe: Recipe, dataset: Dataset, start_step: int, data_rank: int, data_size: int):
        """See `build_loader`."""
        self._share = recipe.data.batch_size // data_size
        self.recipe, self.dataset, self.step = recipe, dataset, start_step
        self.bad: list[BadSample] = []
        self.num_samples = len(dataset.split(recipe.data.split))
        self.batches_per_epoch = batches_per_epoch(self.num_samples, recipe.data.batch_size)
        workers = recipe.data.workers
        loader = DataLoader(
            _Packs(recipe, dataset, data_rank, data_size),
            batch_size=None,
            sampler=_From(start_step),
            num_workers=workers,
            prefetch_factor=recipe.data.prefetch if workers else None,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_signals_to_the_parent,
            generator=torch.Generator(),  # else it would draw from, and so disturb, the global one
            pin_memory=recipe.train.device != "cpu" and torch.cuda.is_available(),
        )
        with _own_signals():
            self._loaded = iter(loader)
        self._known_bad: set[int] = set()

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> list[PackedBatch]:
        """The packs of global batch `step`.

        Raises:
            DataError: too many bad samples, or a worker died.
        """
        try:
            loaded = next(self._loaded)
        except (RuntimeError, EOFError, OSError) as error:
            # A worker killed while it handed over a tensor shows as a broken connection, not as torch's own error.
            sentinels = [w.sentinel for w in getattr(self._loaded, "_workers", ())]
            dead = wait(sentinels, timeout=5.0) if sentinels else []
            if not dead:
                raise
            raise DataError(
                f"{len(dead)} of {self.recipe.data.workers} loader processes died ({type(error).__name__}: {error})",
                fix="Often memory ran out: lower data.workers or data.prefetch. The same command continues the run.",
            ) from error
        if loaded.error is not None:
            raise loaded.error
        self._count(loaded.bad)
        self.step += 1
        return loaded.packs

    def _count(self, bad: Sequence[BadSample]) -> None:
        fresh = [b for b in bad if b.sample_id not in self._known_bad]
        self.bad += fresh
        self._known_bad |= {b.sample_id for b in fresh}
        limit = self.recipe.data.max_bad_samples
        if len(bad) > WORST_BATCH * self._share and fresh:
            what = f"{len(bad)} of the {self._share} samples of one batch cannot be read"
        elif fresh and len(self.bad) > limit * self.num_samples:
            what = (
                f"{len(self.bad)} of {self.num_samples} samples cannot be read, more than "
                f"data.max_bad_samples={limit:g} of them"
            )
        else:
            return
        raise DataError(
            f"{what} (last {fresh[-1].key}: {fresh[-1].reason})",
            where=str(self.dataset.path),
            fix="Copy or encode the data set again; a share that you can accept goes into data.max_bad_samples.",
        )


@contextmanager
def _own_signals() -> Iterator[None]:
    """Takes back the signal handler that torch installs, which would raise in the middle of a training step when a
    worker dies. `Loader.__next__` notices too, within seconds, where the error can be told as one."""
    mine = signal.getsignal(signal.SIGCHLD)
    yield
    if mine is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, mine)


class _From(Iterable[int]):
    """start, start+1, …"""

    def __init__(self, start: int):
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return count(self.start)


def _as_it_is(x: Any) -> Any:
    return x


def _leave_signals_to_the_parent(worker: int) -> None:
    """A terminal or a scheduler signals every process of a run. The training process ends its step and saves; workers
    that died before would spoil that. They end when it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def build_loader(recipe: Recipe, start_step: int = 0, data_rank: int = 0, data_size: int = 1) -> Loader:
    """One data rank's part of the run's data, from global batch `start_step` on.

    Global batch k has `data.batch_size` samples (fewer only where samples are bad), the same whatever `start_step`,
    `data_size`, `train.accumulation`, `data.workers` and `data.prefetch` are. Each of the `data_size` ranks yields
    `train.accumulation` packs of it. `PackedBatch.epoch` is set.

    Raises:
        RecipeError: the batch cannot be shared out evenly.
        DataError: no such data set, or one that does not suit the recipe (every fault listed).
    """
    check_shares(recipe, data_size)
    dataset = Dataset.open(recipe.data.path)
    check_dataset(recipe, dataset)
    return Loader(recipe, dataset, start_step, data_rank, data_size)


def check_shares(recipe: Recipe, data_size: int) -> None:
    """Whether every rank and micro-batch gets as many samples.

    Raises:
        RecipeError: not so; names the nearest batch sizes and the accumulations that fit.
    """
    size, parts = recipe.data.batch_size, recipe.train.accumulation * data_size
    if size % parts == 0:
        return
    sizes = [n for n in (size // parts * parts, (size // parts + 1) * parts) if n]
    fitting = [a for a in range(1, size + 1) if size % (a * data_size) == 0]
    fitting = sorted(sorted(fitting, key=lambda a: abs(a - recipe.train.accumulation))[:2])
    raise RecipeError(
        f"data.batch_size={size} cannot be shared out evenly over {data_size} data ranks with "
        f"train.accumulation={recipe.train.accumulation}",
        fix=f"Try data.batch_size={' or '.join(map(str, sizes))}"
        + (f", or train.accumulation={' or '.join(map(str, fitting))}." if fitting else "."),
    )


def validation_batches(recipe: Recipe, data_rank: int = 0, data_size: int = 1) -> list[PackedBatch]:
    """One data rank's part of up to `validation.samples` samples of the validation split, spread evenly over it,
    always the same ones.

    Packs have as many samples as a micro-batch of training, and each sample is in a pack of one rank. Every rank has as
    many packs: where they do not come out even, weightless ones are added. Epoch is 0.

    Raises:
        DataError: no such data set or split, one that does not suit the recipe, or a sample that cannot be read: a loss
            over fewer samples would not be comparable.
    """
    dataset = Dataset.open(recipe.validation.path or recipe.data.path)
    check_validation(recipe, dataset)
    ids = dataset.split(recipe.validation.split)
    number = min(recipe.validation.samples, len(ids))
    chosen = [ids[i * len(ids) // number] for i in range(number)]
    size = max(recipe.data.batch_size // (recipe.train.accumulation * data_size), 1)
    parts = [chosen[i : i + size] for i in range(0, number, size)]
    spec = TokenSpec.from_model(recipe.model)
    packs = [_pack([dataset.read(i) for i in part], dataset, recipe, spec, 0) for part in parts[data_rank::data_size]]
    missing = -(-len(parts) // data_size) - len(packs)
    return packs + [placeholder(dataset, recipe, 0)] * missing
