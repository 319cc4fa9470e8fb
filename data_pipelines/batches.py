"""What is in global batch k: a function of (recipe, data, k), computed from the index alone.

- With fixed counts (`data.pack_tokens=0`) it is the next `data.batch_size` samples, of every data set in the proportion
  of the weights.
- With a token budget it is the next `data.batch_size` packs of a window. Windows are alike in which lengths they have,
  so that one way to pack them serves all (`windows.py`), and batch k is found without looking at those before.

Every sample of every epoch is in one batch: none is lost, none comes twice. How a batch is shared out over ranks and
micro-batches comes after and changes none of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from flagdit.config.schema import Recipe
from flagdit.data_pipelines.mixture import Member, Mixture, Shares
from flagdit.data_pipelines.order import SetOrder, mixed_seed, permute
from flagdit.data_pipelines.packing import deal
from flagdit.data_pipelines.windows import Windows, kinds_of
from flagdit.errors import RecipeError
from flagdit.model.tokens import TokenSpec, num_tokens_of_all

WINDOW_PACKS = 256  # in a window, or the next multiple of a batch
WINDOWS_KEPT = 2
PACK_ORDER = 1 << 40  # numbers the order of packs apart from the orders of data sets


@dataclass(frozen=True)
class Part:
    """Samples that travel together.

    Attributes:
        ids: (n,) int64 sample ids of the run.
        epochs: (n,) int64, pass over its own data set of each.
        tokens: (n,) int64.
    """

    ids: np.ndarray
    epochs: np.ndarray
    tokens: np.ndarray

    @classmethod
    def join(cls, parts: Sequence[Part]) -> Part:
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("ids", "epochs", "tokens")))

    def __getitem__(self, places: slice | Sequence[int] | np.ndarray) -> Part:
        index = places if isinstance(places, slice) else np.asarray(places, np.int64)
        return Part(self.ids[index], self.epochs[index], self.tokens[index])

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def cost(self) -> int:
        """What its attention costs: Σ n²."""
        return int((self.tokens**2).sum())


@dataclass(frozen=True)
class Streams:
    """The kinds of samples of all data sets, longest first.

    Attributes:
        member: (K,) whose each is.
        kind: (K,) its number there.
        lengths: (K,) tokens of its longest sample.
        shares: (K,) of all samples drawn.
    """

    member: np.ndarray
    kind: np.ndarray
    lengths: np.ndarray
    shares: np.ndarray


class Batches:
    """The content of every global batch of a run.

    Attributes:
        windows: how windows are packed; with fixed counts there is none.
    """

    def __init__(self, recipe: Recipe, mixture: Mixture):
        """
        Raises:
            RecipeError: a batch larger than a split gives, or a sample larger than the budget.
            DataError: a data set has no such split.
        """
        self.recipe, self.mixture = recipe, mixture
        self.spec = TokenSpec.from_model(recipe.model)
        self.budget, self.batch = recipe.data.pack_tokens, recipe.data.batch_size
        self.orders: list[SetOrder] = []
        if self.budget:
            self.streams = self._open_streams()
            packs = -(-WINDOW_PACKS // self.batch) * self.batch
            self.windows = Windows(self.streams.lengths, self.streams.shares, packs, self.budget)
            self.window = lru_cache(WINDOWS_KEPT)(self._window)
        else:
            self.orders = [self._order(i, m) for i, m in enumerate(mixture.members)]
            self.shares = Shares([m.weight for m in mixture.members])
            self._check_counts()

    def batch_of(self, k: int) -> list[Part]:
        """Global batch k: single samples with fixed counts, packs with a token budget."""
        if not self.budget:
            whole = self._counted(k)
            return [whole[[i]] for i in range(len(whole))]
        window, batch = divmod(k, self.windows.packs // self.batch)
        return self.window(window)[batch * self.batch : (batch + 1) * self.batch]

    def shared(self, k: int, micro_batches: int, ranks: int) -> list[list[Part]]:
        """Global batch k as [micro-batch][rank], so that the ranks of a micro-batch cost alike."""
        if not self.budget:
            whole = self._counted(k)
            dealt = deal((whole.tokens**2).tolist(), micro_batches, ranks)
            return [[whole[share] for share in shares] for shares in dealt]
        parts = self.batch_of(k)
        dealt = deal([p.cost for p in parts], micro_batches, ranks)
        return [[Part.join([parts[i] for i in share]) for share in shares] for shares in dealt]

    def _counted(self, k: int) -> Part:
        """The samples of global batch k, with fixed counts."""
        starts, stops = (self.shares.among_first(n).tolist() for n in (k * self.batch, (k + 1) * self.batch))
        ids, epochs = [], []
        for order, member, start, stop in zip(self.orders, self.mixture.members, starts, stops, strict=True):
            drawn = order.take(start, stop)
            ids.append(drawn.ids + member.first_id)
            epochs.append(drawn.epochs)
        found = np.concatenate(ids)
        return Part(found, np.concatenate(epochs), self.mixture.tokens(found, self.spec))

    def _order(self, number: int, member: Member, kinds: np.ndarray | None = None) -> SetOrder:
        dataset, split = member.dataset, member.dataset.split(self.recipe.data.split)
        counts = np.array([count for _, count in dataset.info["shards"]], np.int64)
        starts = np.concatenate([[0], np.cumsum(counts)])
        first, last = np.searchsorted(starts, (split.start, split.stop))
        seed = mixed_seed(self.recipe.seed, number)
        return SetOrder(seed, counts[first:last], split.start, self.recipe.data.shuffle_shards, kinds)

    def _open_streams(self) -> Streams:
        found = []
        for number, member in enumerate(self.mixture.members):
            dataset, split = member.dataset, member.dataset.split(self.recipe.data.split)
            tokens = num_tokens_of_all(dataset.columns["shape"][split.start : split.stop], dataset.modality, self.spec)
            if tokens.max() > self.budget:
                big = int(tokens.argmax())
                raise RecipeError(
                    f"data.pack_tokens={self.budget} is less than the {tokens[big]} tokens of sample "
                    f"{dataset.key(split.start + big)}",
                    where=str(dataset.path),
                    fix=f"Set it to {tokens[big]} or more.",
                )
            kinds, lengths = kinds_of(tokens)
            order = self._order(number, member, kinds)
            self.orders.append(order)
            shares = member.weight * order.counts / len(order)
            found.append((np.full(len(lengths), number), np.arange(len(lengths)), lengths, shares))
        joined = [np.concatenate(columns) for columns in zip(*found, strict=True)]
        longest_first = np.argsort(-joined[2], kind="stable")
        return Streams(*(column[longest_first] for column in joined))

    def _check_counts(self) -> None:
        most = np.max(
            np.diff([self.shares.among_first(k * self.batch) for k in range(self.shares.period + 1)], axis=0), axis=0
        )
        for order, member, count in zip(self.orders, self.mixture.members, most.tolist(), strict=True):
            if count > len(order):
                named = f", of which this set gives {count}," if self.recipe.data.sets else ""
                raise RecipeError(
                    f"data.batch_size={self.batch}{named} is larger than the split, which has {len(order)} samples",
                    where=str(member.dataset.path),
                    fix=f"Try {max(int(self.batch * len(order) / count), 1)} or fewer.",
                )

    def _window(self, w: int) -> list[Part]:
        """The packs of window w, in the order in which they come."""
        windows, streams = self.windows, self.streams
        kinds = windows.kinds(w)
        # As they are made, the packs of long samples would come first.
        turns = permute(mixed_seed(self.recipe.seed, PACK_ORDER), w, windows.packs, np.arange(windows.packs))
        turn = turns[windows.pack_of_slot]
        # The stream of a kind goes on from pack to pack as they come.
        by_kind = np.lexsort((turn, kinds))
        places = np.empty(len(kinds), np.int64)
        places[by_kind] = windows.before(w)[kinds] + np.arange(len(kinds)) - np.searchsorted(kinds, kinds)
        ids, epochs = np.empty(len(kinds), np.int64), np.empty(len(kinds), np.int64)
        for number, (order, member) in enumerate(zip(self.orders, self.mixture.members, strict=True)):
            own = np.flatnonzero(streams.member[kinds] == number)
            drawn = order.at(streams.kind[kinds[own]], places[own])
            ids[own], epochs[own] = drawn.ids + member.first_id, drawn.epochs
        by_turn = np.argsort(turn, kind="stable")
        whole = Part(ids, epochs, self.mixture.tokens(ids, self.spec))[by_turn]
        ends = np.cumsum(np.bincount(turn, minlength=windows.packs)).tolist()
        return [whole[a:b] for a, b in pairwise([0, *ends])]
