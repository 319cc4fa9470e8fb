"""The batches of a run, in its order, from any point on.

The state of a loader is one integer: the number of the next global batch. Ranks, accumulation, loader processes,
prefetch and the point of a continuation change nothing of what a global batch holds.
"""

from __future__ import annotations

import ctypes
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils import MP_STATUS_CHECK_INTERVAL
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from flagdit.batch import PackedBatch
from flagdit.config.schema import Recipe
from flagdit.data_pipelines.batches import Batches, Part
from flagdit.data_pipelines.check import check_shares, check_training, check_validation
from flagdit.data_pipelines.mixture import Mixture, mixture_of, open_mixture
from flagdit.data_pipelines.packs import BadSample, Loaded, PackReader, make_pack, placeholder
from flagdit.errors import DataError
from flagdit.model.tokens import TokenSpec

WORST_BATCH = 0.5
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class Loader:
    """Endless iterator over global batches, each a list of the packs (micro-batches) of one optimizer step.

    Every rank yields `train.accumulation` packs a step. A sample that cannot be read is left out of its pack, recorded
    in `bad` and never replaced; where no sample of a pack is left, a weightless pack stands in its place.

    Attributes:
        step: number of the next global batch: the loader's whole state.
        bad: every bad sample that this rank has met, once, in the order of discovery.
        num_samples: samples in the splits.
    """

    def __init__(self, recipe: Recipe, mixture: Mixture, start_step: int, data_rank: int, data_size: int):
        """See `build_loader`."""
        self.recipe, self.mixture, self.step = recipe, mixture, start_step
        self.bad: list[BadSample] = []
        self._known_bad: set[int] = set()
        self.num_samples = sum(len(m.dataset.split(recipe.data.split)) for m in mixture.members)
        self._batches = Batches(recipe, mixture)
        workers = recipe.data.workers
        loader = DataLoader(
            PackReader(recipe, mixture),
            batch_size=None,
            sampler=_Plan(self._batches, recipe.train.accumulation, start_step, data_rank, data_size),
            num_workers=workers,
            prefetch_factor=recipe.data.prefetch if workers else None,
            timeout=recipe.limits.stall_seconds if workers else 0,
            collate_fn=_as_it_is,
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # else it would draw from, and so disturb, the global one
            pin_memory=recipe.train.device != "cpu" and torch.cuda.is_available(),
        )
        with _own_signals():
            self._loaded: Iterator[Loaded] = _Workers(loader) if workers else iter(loader)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> list[PackedBatch]:
        """This rank's packs of global batch `step`.

        Raises:
            DataError: too many bad samples, a worker died, or reading stalls.
        """
        try:
            loaded = next(self._loaded).unwrapped()
        except (RuntimeError, EOFError, OSError) as error:
            raise self._worker_error(error) from error
        if loaded.error is not None:
            raise loaded.error
        self._count(loaded)
        self.step += 1
        return loaded.packs

    def ids_of(self, k: int) -> list[int]:
        """Sample ids of global batch k, over all ranks, whether they can be read or not."""
        return [i for part in self._batches.batch_of(k) for i in part.ids.tolist()]

    def _worker_error(self, error: Exception) -> Exception:
        """What has become of the loader processes, in words; the error itself when it was none of them."""
        workers = self.recipe.data.workers
        if "timed out" in str(error):
            return DataError(
                f"nothing was read in {self.recipe.limits.stall_seconds:g} s (limits.stall_seconds)",
                where=", ".join(self.mixture.weights),
                fix="Look after the file system or the network; the same command continues the run.",
            )
        # A worker killed while it handed over a tensor shows as a broken connection, not as torch's own error.
        sentinels = [w.sentinel for w in getattr(self._loaded, "_workers", ())]
        dead = wait(sentinels, timeout=5.0) if sentinels else []
        if not dead:
            return error
        return DataError(
            f"{len(dead)} of {workers} loader processes died ({type(error).__name__}: {error})",
            fix="Often memory ran out: lower data.workers or data.prefetch. The same command continues the run.",
        )

    def _count(self, loaded: Loaded) -> None:
        fresh = [b for b in loaded.bad if b.sample_id not in self._known_bad]
        self.bad += fresh
        self._known_bad |= {b.sample_id for b in fresh}
        limit = self.recipe.data.max_bad_samples
        if len(loaded.bad) > WORST_BATCH * loaded.samples and fresh:
            what = f"{len(loaded.bad)} of the {loaded.samples} samples of one batch cannot be read"
        elif fresh and len(self.bad) > limit * self.num_samples:
            what = (
                f"{len(self.bad)} of {self.num_samples} samples cannot be read, more than "
                f"data.max_bad_samples={limit:g} of them"
            )
        else:
            return
        raise DataError(
            f"{what} (last {fresh[-1].key}: {fresh[-1].reason})",
            where=", ".join(self.mixture.weights),
            fix="Copy or encode the data set again; a share that you can accept goes into data.max_bad_samples.",
        )


class _Workers(_MultiProcessingDataLoaderIter):
    """Torch's own iterator looks after its workers only when nothing has come for as long as a source may stall."""

    def _try_get_data(self, timeout: float = MP_STATUS_CHECK_INTERVAL) -> tuple[bool, Any]:
        end = time.monotonic() + timeout
        while (left := end - time.monotonic()) > MP_STATUS_CHECK_INTERVAL:
            found, data = super()._try_get_data(MP_STATUS_CHECK_INTERVAL)
            if found:
                return found, data
        return super()._try_get_data(max(left, 0.0))


@contextmanager
def _own_signals() -> Iterator[None]:
    """Takes back the signal handler that torch installs, which would raise in the middle of a training step when a
    worker dies. `Loader.__next__` notices too, within seconds, where the error can be told as one."""
    mine = signal.getsignal(signal.SIGCHLD)
    yield
    if mine is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, mine)


class _Plan(Iterable[tuple[int, list[Part]]]):
    """(k, this rank's parts of global batch k) from `start` on. Lives in the training process: packing is planned
    once, and loader processes only read."""

    def __init__(self, batches: Batches, micro_batches: int, start: int, data_rank: int, data_size: int):
        self.batches, self.micro_batches, self.start = batches, micro_batches, start
        self.data_rank, self.data_size = data_rank, data_size

    def __iter__(self) -> Iterator[tuple[int, list[Part]]]:
        k = self.start
        while True:
            shared = self.batches.shared(k, self.micro_batches, self.data_size)
            yield k, [shares[self.data_rank] for shares in shared]
            k += 1


def _as_it_is(x: Any) -> Any:
    return x


def _begin_worker(worker: int) -> None:
    """What a loader process does first.

    A terminal or a scheduler signals every process of a run. The training process ends its step and saves; workers that
    died before would spoil that, so they leave signals to it and end when it does.

    And it keeps the memory that it frees, for the next batch needs as much: the C library would give it back to the
    system, whose page faults take longer than reading a sample.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 25)
        mallopt(M_TRIM_THRESHOLD, 1 << 28)


def build_loader(recipe: Recipe, start_step: int = 0, data_rank: int = 0, data_size: int = 1) -> Loader:
    """One data rank's part of the run's data, from global batch `start_step` on.

    Global batch k has `data.batch_size` samples or budgeted packs (less only where samples are bad), the same whatever
    `start_step`, `data_size`, `train.accumulation`, `data.workers` and `data.prefetch` are. Each of the `data_size`
    ranks yields `train.accumulation` packs of it.

    Raises:
        RecipeError: the batch cannot be shared out evenly, or is larger than the data.
        DataError: no such data set, or one that does not suit the recipe (every fault listed).
    """
    check_shares(recipe, data_size)
    mixture = open_mixture(recipe)
    check_training(recipe, mixture)
    return Loader(recipe, mixture, start_step, data_rank, data_size)


def validation_batches(recipe: Recipe, data_rank: int = 0, data_size: int = 1) -> list[PackedBatch]:
    """One data rank's part of up to `validation.samples` samples of the validation split, spread evenly over it,
    always the same ones.

    Packs hold what a micro-batch of training holds, and each sample is in a pack of one rank. Every rank has as many
    packs: where they do not come out even, weightless ones are added. Epoch is 0.

    Raises:
        DataError: no such data set or split, one that does not suit the recipe, or a sample that cannot be read: a loss
            over fewer samples would not be comparable.
    """
    mixture = mixture_of(recipe, {recipe.validation.path: 1.0}) if recipe.validation.path else open_mixture(recipe)
    check_validation(recipe, mixture)
    split = recipe.validation.split
    ids = [m.first_id + i for m in mixture.members for i in m.dataset.splits.get(split, ())]
    number = min(recipe.validation.samples, len(ids))
    chosen = [ids[i * len(ids) // number] for i in range(number)]
    parts = _validation_parts(recipe, mixture, chosen, data_size)
    packs = [
        make_pack([(i, mixture.read(i)) for i in part], [0] * len(part), mixture, recipe)
        for part in parts[data_rank::data_size]
    ]
    return packs + [placeholder(mixture, recipe)] * (-(-len(parts) // data_size) - len(packs))


def _validation_parts(recipe: Recipe, mixture: Mixture, chosen: list[int], data_size: int) -> list[list[int]]:
    """Sample ids of every pack, in order: as many samples, or tokens, as a micro-batch of training has."""
    share = max(recipe.data.batch_size // (recipe.train.accumulation * data_size), 1)
    budget = recipe.data.pack_tokens * share
    tokens = mixture.tokens(np.array(chosen), TokenSpec.from_model(recipe.model)).tolist()
    parts: list[list[int]] = []
    filled = 0
    for sample_id, n in zip(chosen, tokens, strict=True):
        full = filled + n > budget if budget else len(parts[-1]) == share if parts else True
        if not parts or full:
            parts.append([])
            filled = 0
        parts[-1].append(sample_id)
        filled += n
    return parts
