"""Strict memory for kernels, on every test of this folder.

Outputs begin as NaN, so what a kernel forgets to write is seen, and stand between guards. In Triton's interpreter every
load and store is checked besides: it must hit an element of a tensor of that launch, counted with the tensor's strides
(a view into a packed projection reaches further than its own number of elements); stores must hit outputs, and no
element is written twice in one launch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from flagdit.kernels import language

GUARD, CANARY = 64, 77.0


def round_to_nearest_even(x: np.ndarray) -> np.ndarray:
    """fp32 → the bits of bf16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def element_addresses(x: Tensor) -> np.ndarray:
    """The address of every element, whatever the strides."""
    addresses = np.array([x.data_ptr()], np.int64)
    for size, stride in zip(x.shape, x.stride(), strict=True):
        addresses = np.add.outer(addresses, np.arange(size, dtype=np.int64) * (stride * x.element_size())).reshape(-1)
    return addresses


def addresses_of(tensors: list[Tensor]) -> np.ndarray:
    """Of all their elements, ascending; -1, which no pointer is, stands for none."""
    return np.unique(np.concatenate([np.array([-1], np.int64), *map(element_addresses, tensors)]))


class Memory:
    """Allocates guarded outputs, watches launches, and counts the bytes that their loads and stores touch."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []
        self.overwritten: list[Tensor] = []
        self.watching = False
        self.bytes = 0

    def empty(self, shape, dtype: torch.dtype, device) -> Tensor:
        size = math.prod(shape)
        buffer = torch.full((GUARD + size + GUARD,), CANARY, dtype=dtype, device=device)
        inner = buffer[GUARD : GUARD + size].fill_(math.nan).view(tuple(shape))
        if buffer.device.type != "meta" and type(buffer) is Tensor:
            self.buffers.append(buffer)
        return inner

    def check_guards(self) -> None:
        for buffer in self.buffers:
            assert (buffer[:GUARD] == CANARY).all() and (buffer[-GUARD:] == CANARY).all(), "written outside an output"

    @contextmanager
    def watch(self, tensors: list[Tensor]) -> Iterator[None]:
        """One launch with these arguments."""
        outputs = {b.untyped_storage().data_ptr() for b in (*self.buffers, *self.overwritten)}
        writable = [t for t in tensors if t.untyped_storage().data_ptr() in outputs]
        self.readable, self.writable = addresses_of(tensors), addresses_of(writable)
        self.writes = np.zeros(len(self.writable), np.int64)
        self.watching = True
        yield
        self.watching = False
        assert self.writes.max(initial=0) <= 1, "an element was written twice"

    def touch(self, pointers, mask, store: bool) -> None:
        if not self.watching:
            return
        width = pointers.get_element_ty().primitive_bitwidth // 8
        touched = pointers.data.astype(np.int64)[mask.data.astype(bool)]
        self.bytes += width * len(np.unique(touched))
        known = self.writable if store else self.readable
        places = np.searchsorted(known, touched).clip(max=len(known) - 1)
        outside = known[places] != touched
        assert not outside.any(), f"{outside.sum()} {'writes' if store else 'reads'} outside the tensors of the launch"
        if store:
            np.add.at(self.writes, places, 1)


@pytest.fixture(autouse=True)
def memory(monkeypatch) -> Iterator[Memory]:
    memory = Memory()
    monkeypatch.setattr(language, "empty", memory.empty)
    if language.interpreted():
        watch_interpreter(monkeypatch, memory)
    yield memory
    memory.check_guards()


def watch_interpreter(monkeypatch, memory: Memory) -> None:
    """Checks addresses, and rounds casts to bf16 as GPUs do, where the interpreter cuts bits off."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert, call = interpreter._convert_float, interpreter.GridExecutor.__call__
    load = interpreter.InterpreterBuilder.create_masked_load
    store = interpreter.InterpreterBuilder.create_masked_store

    def watched_convert(x, source, target, rounding):
        if (source, target) == (tl.float32, tl.bfloat16):
            return round_to_nearest_even(x)
        return convert(x, source, target, rounding)

    def watched_call(self, *args, **kwargs):
        with memory.watch([t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]):
            call(self, *args, **kwargs)

    def watched_load(self, pointers, mask, *rest):
        memory.touch(pointers, mask, store=False)
        return load(self, pointers, mask, *rest)

    def watched_store(self, pointers, value, mask, *rest):
        memory.touch(pointers, mask, store=True)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(interpreter, "_convert_float", watched_convert)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", watched_call)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", watched_load)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", watched_store)
