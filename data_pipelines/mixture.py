"""The data sets of a run as one: who is in it, with which weight, and which sample id means which sample."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flagdit.config.schema import CodecConfig, Recipe
from flagdit.data_pipelines.index import Dataset, Encoded
from flagdit.data_pipelines.remote import Cache
from flagdit.data_pipelines.undecoded import live_codec, open_for_training
from flagdit.errors import DataError, RecipeError
from flagdit.model.tokens import TokenSpec, num_tokens_of_all

PATTERN = 1000
"""Samples after which the shares of a mixture come out even; a weight below 1/PATTERN of the sum is refused."""


@dataclass(frozen=True)
class Member:
    """One data set of the mixture.

    Attributes:
        dataset: it.
        weight: its share of all samples drawn; the shares add up to 1.
        first_id: what its own sample ids are counted from in the run.
    """

    dataset: Dataset
    weight: float
    first_id: int


class Mixture:
    """All data sets of a run; a run with one has a mixture of one. Picklable.

    A sample's id in the run is its id in its data set plus the members' samples before.
    """

    def __init__(self, weights: Mapping[str, float], cache: Cache | None = None, codec: CodecConfig | None = None):
        """Opens the data sets.

        Args:
            weights: folder or address → weight, in any unit.
            cache: for the parts of remote data sets.
            codec: codes raw data sets while they are read; None: all must be encoded.

        Raises:
            DataError: one cannot be opened.
            RecipeError: a weight that is not a positive number, or too small beside the others.
        """
        self.weights, self.cache, self.codec = dict(weights), cache, codec
        total = sum(weights.values())
        low = [path for path, w in weights.items() if not w > 0 or w * PATTERN < total]
        if low:
            raise RecipeError(
                f"data.sets.{low[0]}={weights[low[0]]:g} is less than 1/{PATTERN} of the sum of all weights",
                fix="Raise it, or leave the data set out.",
            )
        members, first = [], 0
        for path, weight in weights.items():
            dataset = open_for_training(path, cache, codec)
            members.append(Member(dataset, weight / total, first))
            first += len(dataset)
        self.members: Sequence[Member] = members
        self._firsts = [m.first_id for m in members]

    def __reduce__(self) -> tuple:
        return (Mixture, (self.weights, self.cache, self.codec))

    def of(self, sample_id: int) -> tuple[Dataset, int]:
        """The data set of a sample of the run, and the sample's id there."""
        member = self.members[bisect_right(self._firsts, sample_id) - 1]
        return member.dataset, sample_id - member.first_id

    def read(self, sample_id: int, epoch: int = 0) -> Encoded:
        """One sample; of several captions, every epoch takes another one. See `Dataset.read`."""
        dataset, local = self.of(sample_id)
        return dataset.read(local, epoch + local)

    def key(self, sample_id: int) -> str:
        """The sample's name for people: "shard/member", after the data set's folder where there are several."""
        dataset, local = self.of(sample_id)
        return dataset.key(local) if len(self.members) == 1 else f"{dataset.path}/{dataset.key(local)}"

    @property
    def content(self) -> str:
        """Names the data by what is in it, wherever it lies."""
        contents = [m.dataset.info["content"] for m in self.members]
        if len(contents) == 1:
            return contents[0]
        return hashlib.sha256(
            "".join(f"{c} {m.weight:.6f} " for c, m in zip(contents, self.members, strict=True)).encode()
        ).hexdigest()[:32]

    @property
    def null_text(self) -> Tensor | None:
        """(L, Y) features of the empty caption; None without text features.

        Raises:
            DataError: the members' differ, so they were encoded by different text encoders.
        """
        first, *rest = [m.dataset for m in self.members]
        for other in rest:
            mine, theirs = first.null_text, other.null_text
            if (mine is None) != (theirs is None) or (
                mine is not None and theirs is not None and not torch.equal(mine, theirs)
            ):
                raise DataError(
                    f"the empty caption has other features than in {first.path}",
                    where=str(other.path),
                    fix="Encode both with the same text encoder.",
                )
        return first.null_text

    def tokens(self, sample_ids: np.ndarray, spec: TokenSpec) -> np.ndarray:
        """(n,) int64 tokens of samples, from the index."""
        found = np.empty(len(sample_ids), np.int64)
        which = np.searchsorted(self._firsts, sample_ids, side="right") - 1
        for i in np.unique(which).tolist():
            dataset, rows = self.members[i].dataset, which == i
            shapes = dataset.columns["shape"][sample_ids[rows] - self._firsts[i]]
            found[rows] = num_tokens_of_all(shapes, dataset.modality, spec)
        return found


def open_mixture(recipe: Recipe) -> Mixture:
    """The data that the recipe trains on: `data.sets`, or else `data.path` alone.

    Raises:
        DataError, RecipeError: see `Mixture`.
    """
    return mixture_of(recipe, recipe.data.sets or {recipe.data.path: 1.0})


def mixture_of(recipe: Recipe, weights: Mapping[str, float]) -> Mixture:
    """Data sets as the recipe reads them.

    Raises:
        DataError, RecipeError: see `Mixture`.
    """
    return Mixture(weights, cache_of(recipe), live_codec(recipe))


def cache_of(recipe: Recipe) -> Cache:
    """Where the recipe keeps copies of remote data."""
    return Cache(recipe.data.cache, recipe.data.cache_gib)


class Shares:
    """How many of the first x samples of the run each member gives: evenly spread, exact over PATTERN."""

    def __init__(self, weights: Sequence[float]):
        exact = np.asarray(weights) * PATTERN
        counts = np.floor(exact).astype(int).clip(min=1)
        for i in np.argsort(-(exact - counts), kind="stable")[: max(PATTERN - counts.sum(), 0)]:
            counts[i] += 1
        self.counts = counts  # of each member in one pattern
        self.period = int(counts.sum())
        places = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
        owners = np.repeat(np.arange(len(counts)), counts)[np.argsort(places, kind="stable")]
        before = np.zeros((self.period + 1, len(counts)), np.int64)
        before[np.arange(1, self.period + 1), owners] = 1
        self._before = before.cumsum(axis=0)

    def among_first(self, x: int) -> np.ndarray:
        """(members,) samples of each member among the first x of the run."""
        whole, rest = divmod(x, self.period)
        return whole * self.counts.astype(np.int64) + self._before[rest]
