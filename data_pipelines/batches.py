"""What is in global batch k: a function of (recipe, data, k), computed from the index alone.

The run walks through windows. A window takes the next stretch of every data set's stream, in the proportion of the
weights, and makes packs of it:

- with fixed counts (`data.pack_tokens=0`) a window is one batch of `data.batch_size` samples;
- with a token budget it is a fixed number of packs, of which `data.batch_size` at a time are a batch. The stretches are
  measured in tokens, so that each window is as full as the last and batch k is found without looking at those before.

Where the stretches begin depends on the window's number alone, so every sample of every epoch is in one window: none
is lost, none comes twice. How a batch is shared out over ranks and micro-batches comes after and changes none of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from flagdit.config.schema import Recipe
from flagdit.data_pipelines.mixture import Member, Mixture, Shares
from flagdit.data_pipelines.order import SetOrder, mixed_seed, permute
from flagdit.data_pipelines.packing import deal, pack_window
from flagdit.errors import RecipeError
from flagdit.model.tokens import TokenSpec, num_tokens_of_all

WINDOW_PACKS = 256  # in a window, or as many as an epoch has: what rounding wastes is shared among so many
UNFILLED = (0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.045, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 0.9, 0.97)
PROBES = 2
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

    def __getitem__(self, places: Sequence[int]) -> Part:
        index = np.asarray(places, np.int64)
        return Part(self.ids[index], self.epochs[index], self.tokens[index])

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def cost(self) -> int:
        """What its attention costs: Σ n²."""
        return int((self.tokens**2).sum())


class Batches:
    """The content of every global batch of a run.

    Attributes:
        fill: share of the token budget that windows aim at; 1 with fixed counts.
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
        self.shares = Shares([m.weight for m in mixture.members])
        self.orders = [self._order(i, m) for i, m in enumerate(mixture.members)]
        self.window = lru_cache(WINDOWS_KEPT)(self._window)
        self.fill = 1.0
        if self.budget:
            epoch = sum(order.units for order in self.orders) // self.budget
            self.packs = self.batch * -(-min(WINDOW_PACKS, epoch + 1) // self.batch)
            self._choose_fill()
        else:
            self._check_counts()

    def batch_of(self, k: int) -> list[Part]:
        """Global batch k: single samples with fixed counts, packs with a token budget."""
        if not self.budget:
            whole = self._counted(k)
            return [whole[[i]] for i in range(len(whole))]
        window, batch = divmod(k, self.packs // self.batch)
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
        return self._draw(*(self.shares.among_first(n) for n in (k * self.batch, (k + 1) * self.batch)))

    def _order(self, number: int, member: Member) -> SetOrder:
        dataset, split = member.dataset, member.dataset.split(self.recipe.data.split)
        counts = np.array([count for _, count in dataset.info["shards"]], np.int64)
        starts = np.concatenate([[0], np.cumsum(counts)])
        first, last = np.searchsorted(starts, (split.start, split.stop))
        lengths = None
        if self.budget:
            shapes = dataset.columns["shape"][split.start : split.stop]
            lengths = num_tokens_of_all(shapes, dataset.modality, self.spec)
            if lengths.max() > self.budget:
                big = int(lengths.argmax())
                raise RecipeError(
                    f"data.pack_tokens={self.budget} is less than the {lengths[big]} tokens of sample "
                    f"{dataset.key(split.start + big)}",
                    where=str(dataset.path),
                    fix=f"Set it to {lengths[big]} or more.",
                )
        seed = mixed_seed(self.recipe.seed, number)
        return SetOrder(seed, counts[first:last], split.start, self.recipe.data.shuffle_shards, lengths)

    def _draw(self, starts: Sequence[int] | np.ndarray, stops: Sequence[int] | np.ndarray) -> Part:
        ids, epochs, tokens = [], [], []
        for order, member, start, stop in zip(self.orders, self.mixture.members, starts, stops, strict=True):
            drawn = order.take(int(start), int(stop))
            ids.append(drawn.ids + member.first_id)
            epochs.append(drawn.epochs)
            if order.lengths is not None:
                tokens.append(order.lengths[drawn.ids - order.first_id].astype(np.int64))
        found = np.concatenate(ids)
        lengths = np.concatenate(tokens) if tokens else self.mixture.tokens(found, self.spec)
        return Part(found, np.concatenate(epochs), lengths)

    def _check_counts(self) -> None:
        most = np.max(
            np.diff([self.shares.among_first(k * self.batch) for k in range(self.shares.period + 1)], axis=0), axis=0
        )
        for order, member, count in zip(self.orders, self.mixture.members, most.tolist(), strict=True):
            if count > order.units:
                named = f", of which this set gives {count}," if self.recipe.data.sets else ""
                raise RecipeError(
                    f"data.batch_size={self.batch}{named} is larger than the split, which has {order.units} samples",
                    where=str(member.dataset.path),
                    fix=f"Try {max(int(self.batch * order.units / count), 1)} or fewer.",
                )

    # Packs of a token budget.

    def _choose_fill(self) -> None:
        """Finds how full windows can be: the most at which the first ones fit.

        It decides what every window holds, so it depends on the recipe and the data alone.
        """
        for unfilled in UNFILLED:
            self.fill = 1 - unfilled
            if all(self._packed(w)[1] for w in range(PROBES)):
                return

    def _stretches(self) -> list[int]:
        """Tokens that a window takes of every data set."""
        means = np.array([order.units / len(order.lengths) for order in self.orders if order.lengths is not None])
        shares = np.array([m.weight for m in self.mixture.members]) * means
        return np.maximum(self.packs * self.budget * self.fill * shares / shares.sum(), 1).astype(np.int64).tolist()

    def _packed(self, w: int) -> tuple[list[Part], bool]:
        steps = self._stretches()
        whole = self._draw([w * n for n in steps], [(w + 1) * n for n in steps])
        places, fits = pack_window(whole.tokens, self.packs, self.budget)
        # In the order in which they are made the long samples would come first.
        shuffled = permute(mixed_seed(self.recipe.seed, PACK_ORDER), w, self.packs, np.arange(self.packs))
        return [whole[sorted(places[i])] for i in shuffled.tolist()], fits

    def _window(self, w: int) -> list[Part]:
        return self._packed(w)[0]
