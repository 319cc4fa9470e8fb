"""Bytes of the tensors that are alive, from operator to operator; of real tensors and of fake ones."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Label = tuple[str, tuple[int, ...], str]
"""Operator that made a tensor, its shape and its type."""


class LiveBytes(TorchDispatchMode):
    """While it is entered, follows every storage that an operator makes until it is freed.

    What existed before is not counted, unless `add` is called on it; views count once. Memory that a kernel takes and
    gives back inside one operator is not seen; `workspace` may say how much that is.

    Args:
        workspace: operator's name → bytes from its arguments.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self, workspace: Mapping[str, Callable[..., int]] | None = None):
        super().__init__()
        self.now = self.peak = 0
        self._workspace = workspace or {}
        self._live: dict[int, tuple[int, Label, weakref.ref]] = {}
        self._at_peak: list[tuple[int, Label]] | None = None
        self._peak_is_now = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_storage(x)._cdata for x in _tensors((args, kwargs))}
        for x in _tensors(result):
            if _storage(x)._cdata not in given:
                self.add(x, func._schema.name)
        if transient := self._workspace.get(func._schema.name):
            self._reach(self.now + transient(*args))
        return result

    def add(self, x: Tensor, name: str = "input") -> None:
        """Counts a tensor that no operator made under this mode."""
        storage = _storage(x)
        key, size = storage._cdata, storage.nbytes()
        if key in self._live or not size:
            return
        label = (name, tuple(x.shape), str(x.dtype).removeprefix("torch."))
        self._live[key] = (size, label, weakref.ref(storage, lambda _, key=key: self._free(key)))
        self.now += size
        self._reach(self.now)

    def largest(self, count: int) -> list[tuple[int, int, Label]]:
        """What stood in memory at the peak, tensors of one kind together: (bytes in all, how many, which)."""
        live = self._at_peak if self._at_peak is not None else [entry[:2] for entry in self._live.values()]
        sizes: Counter[Label] = Counter()
        for size, label in live:
            sizes[label] += size
        numbers = Counter(label for _, label in live)
        return [(size, numbers[label], label) for label, size in sizes.most_common(count)]

    def _reach(self, size: int) -> None:
        if size > self.peak:
            self.peak, self._peak_is_now = size, True

    def _free(self, key: int) -> None:
        if self._peak_is_now:
            self._at_peak = [entry[:2] for entry in self._live.values()]
            self._peak_is_now = False
        self.now -= self._live.pop(key)[0]


def _storage(x: Tensor) -> torch.UntypedStorage:
    return x.untyped_storage()


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
