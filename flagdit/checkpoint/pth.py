"""Files that `torch.save` wrote, read without executing anything that is in them.

Weights go through `torch.load(weights_only=True)`, which builds tensors and containers and refuses all else. The
`model_args.pth` beside official weights is a pickled argparse.Namespace, which that mode refuses too: `read_namespace`
walks its opcodes with pickletools and understands only what a namespace of plain values needs. No class is looked up,
nothing is called.
"""

from __future__ import annotations

import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flagdit.checkpoint.tensors import Entry, TensorSource
from flagdit.errors import CheckpointError

REMAP_AFTER = 1 << 29
"""Bytes read from a mapped file after which it is mapped anew, so that what has been read stops counting as ours."""
LARGEST_ARGUMENTS = 1 << 20
NAMESPACE = ("argparse", "Namespace")

# Pickle opcodes that push their argument, that push a constant, and that mean nothing here.
TEXTS = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "SHORT_BINSTRING", "BINSTRING")
NUMBERS = ("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT")
CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
SKIPPED = ("PROTO", "FRAME")


class PthFile(TensorSource):
    """A state dict in a `.pth` file, mapped and copied out tensor by tensor.

    Attributes:
        saved_as: the file's name without its ending when it was saved, which `torch.save` keeps in the archive; "" for
            files of the format before torch 1.6.

    Raises:
        CheckpointError: truncated, not a state dict, or holding anything but tensors.
    """

    def __init__(self, file: Path):
        self._file = file
        self._zipped = zipfile.is_zipfile(file)
        self._tensors = self._load()
        self._touched = 0
        self.saved_as = ""
        if self._zipped:
            with zipfile.ZipFile(file) as archive:
                self.saved_as = archive.namelist()[0].split("/")[0]
        self.entries = {name: Entry.of(x) for name, x in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        tensor = self._tensors[name].clone(memory_format=torch.contiguous_format)
        self._touched += tensor.nbytes
        if self._touched > REMAP_AFTER and self._zipped:
            self._tensors, self._touched = self._load(), 0
        return tensor

    def _load(self) -> dict[str, Tensor]:
        try:
            found = torch.load(self._file, map_location="cpu", weights_only=True, mmap=self._zipped)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                "it is truncated, or holds more than tensors and would have to be executed to be read; nothing was "
                f"({_first_line(error)})",
                where=str(self._file),
                fix="Ask whoever made it for a safetensors file.",
            ) from None
        # Anything may be in such a file, and torch answers with as many kinds of exceptions.
        except Exception as error:
            raise CheckpointError(
                f"it cannot be read, it may be truncated: {_first_line(error)}",
                where=str(self._file),
                fix="Copy or download it again.",
            ) from None
        if isinstance(found, dict) and all(
            isinstance(name, str) and isinstance(x, Tensor) and x.layout == torch.strided for name, x in found.items()
        ):
            return found
        raise CheckpointError("it does not hold named tensors", where=str(self._file))


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def read_namespace(file: Path) -> dict[str, Any]:
    """The attributes of a pickled argparse.Namespace of plain values (texts, numbers, None, lists, tuples, dicts).

    Raises:
        CheckpointError: it is something else. Nothing has been executed then either.
    """
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                (name,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
                if archive.getinfo(name).file_size > LARGEST_ARGUMENTS:
                    raise ValueError("it is far too large")
                raw = archive.read(name)
        else:
            raw = file.read_bytes()
            if len(raw) > LARGEST_ARGUMENTS:
                raise ValueError("it is far too large")
        return _Reader().run(raw)
    except (ValueError, IndexError, KeyError, TypeError, OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"this is not a plain argparse.Namespace: {error}. Nothing in it was executed",
            where=str(file),
            fix="Move it away and give the model's shape as options.",
        ) from None


class _Namespace:
    """What stands for the class, and then for its one instance."""


class _Reader:
    """A pickle machine for namespaces: a stack, marks and a memo, and no way to reach any object of Python's."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.attributes: dict[str, Any] | None = None

    def run(self, raw: bytes) -> dict[str, Any]:
        for opcode, argument, _ in pickletools.genops(raw):
            name = opcode.name
            if name == "STOP":
                break
            if name in TEXTS or name in NUMBERS:
                self.stack.append(argument)
            elif name in CONSTANTS:
                self.stack.append(CONSTANTS[name])
            elif name not in SKIPPED:
                step = getattr(self, f"_{name.lower()}", None)
                if step is None:
                    raise ValueError(f"it uses the pickle opcode {name}")
                step(argument)
        if self.attributes is None or not all(isinstance(key, str) for key in self.attributes):
            raise ValueError("it holds no namespace")
        return self.attributes

    def _since_mark(self) -> list[Any]:
        start = self.marks.pop()
        found, self.stack[start:] = self.stack[start:], []
        return found

    def _mark(self, _: None) -> None:
        self.marks.append(len(self.stack))

    def _global(self, argument: str) -> None:
        self._class(tuple(argument.split(" ")))

    def _stack_global(self, _: None) -> None:
        attribute, module = self.stack.pop(), self.stack.pop()
        self._class((module, attribute))

    def _class(self, name: tuple[Any, ...]) -> None:
        if name != NAMESPACE:
            raise ValueError(f"it names {'.'.join(map(str, name))}")
        self.stack.append(_Namespace)

    def _newobj(self, _: None) -> None:
        arguments, cls = self.stack.pop(), self.stack.pop()
        if cls is not _Namespace or arguments != ():
            raise ValueError("it makes another object")
        self.stack.append(_Namespace())

    def _build(self, _: None) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _Namespace) or not isinstance(state, dict) or self.attributes is not None:
            raise ValueError("it gives a state to another object")
        self.attributes = state

    def _empty_dict(self, _: None) -> None:
        self.stack.append({})

    def _empty_list(self, _: None) -> None:
        self.stack.append([])

    def _empty_tuple(self, _: None) -> None:
        self.stack.append(())

    def _tuple(self, _: None) -> None:
        self.stack.append(tuple(self._since_mark()))

    def _tuple1(self, _: None) -> None:
        self.stack[-1:] = [tuple(self.stack[-1:])]

    def _tuple2(self, _: None) -> None:
        self.stack[-2:] = [tuple(self.stack[-2:])]

    def _tuple3(self, _: None) -> None:
        self.stack[-3:] = [tuple(self.stack[-3:])]

    def _append(self, _: None) -> None:
        value = self.stack.pop()
        self._of(list).append(value)

    def _appends(self, _: None) -> None:
        values = self._since_mark()
        self._of(list).extend(values)

    def _setitem(self, _: None) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._of(dict)[key] = value

    def _setitems(self, _: None) -> None:
        flat = self._since_mark()
        self._of(dict).update(zip(flat[::2], flat[1::2], strict=True))

    def _of(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise ValueError(f"it fills a {type(self.stack[-1]).__name__} as a {kind.__name__}")
        return self.stack[-1]

    def _binput(self, argument: int) -> None:
        self.memo[argument] = self.stack[-1]

    _long_binput = _put = _binput

    def _memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _binget(self, argument: int) -> None:
        self.stack.append(self.memo[argument])

    _long_binget = _get = _binget
