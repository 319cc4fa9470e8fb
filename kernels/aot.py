"""Compiles kernels ahead of time for GPUs that are not there, and reads what the compiler made of them.

    python -m flagdit.kernels.aot [--targets sm_90 gfx942] [--only NAME] [--record FILE [--fresh NAME] [--update]]

The gate that every shipped configuration passes on every target: nothing spilled to memory, and rows read and written
128 bits at a time. It runs in a process without TRITON_INTERPRET, and compiles what `launch` would: the arguments come
from `shipped.py`, which calls the operations on the meta device and records their launches.

A record keeps results by content: source of the kernel and of what it calls, arguments, options, target and version of
Triton. What did not change is not compiled again, so the gate is quick, and a change of a kernel shows in the record's
difference as registers and instructions. `--fresh` compiles rows all the same and finds fault with a record that says
otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flagdit.kernels.language import Launch, interpreted, triton
from flagdit.kernels.shipped import all_passes

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
# These move next to nothing there, or nothing.
NARROW = {("segment_sums_kernel", "writes"), ("normal_kernel", "reads")}
MEMORY = re.compile(r"\b((?:LDGSTS|LDG|STG|LDL|STL|LDS|STS|SHFL|BAR)(?:\.[A-Za-z0-9_]+)*)\s")
MEMORY_AMD = re.compile(r"\b((?:global|buffer|scratch)_(?:load|store)_\w+)")


@dataclass(frozen=True)
class Compiled:
    """What became of one launch on one target.

    Attributes:
        registers: of one thread.
        spilled: bytes or instructions of spilled registers; a stack for indexed arrays counts too.
        shared: bytes of shared memory of one program.
        widths: bits moved at a time → instructions, for reads and for writes of global memory.
        instructions: all of them.
    """

    registers: int
    spilled: int
    shared: int
    reads: dict[int, int]
    writes: dict[int, int]
    instructions: int

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Compiled:
        """From a row of a record, whose keys are all strings."""
        widths = {name: {int(bits): n for bits, n in row[name].items()} for name in ("reads", "writes")}
        return cls(row["registers"], row["spilled"], row["shared"], **widths, instructions=row["instructions"])

    def faults(self, kernel: str) -> list[str]:
        """What the gate objects to."""
        faults = [f"{self.spilled} spills"] if self.spilled else []
        for name, widths in (("reads", self.reads), ("writes", self.writes)):
            if max(widths, default=0) < 128 and (kernel, name) not in NARROW:
                faults.append(f"no 128-bit {name}")
            if min(widths, default=128) < 32:
                faults.append(f"{min(widths)}-bit {name}")
        return faults


def gpu_target(name: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("hip", name, 64) if name.startswith("gfx") else GPUTarget("cuda", int(name[3:]), 32)


@dataclass(frozen=True)
class Specialization:
    """The kernel that a launch with these arguments would compile.

    Pointers are multiples of 16 bytes, as torch allocates them; integers are known to be 1 or multiples of 16.

    Attributes:
        signature: type of each argument.
        constants: values of arguments that are known when compiling, by place.
        attributes: what is known of others, by place.
    """

    signature: dict[str, str]
    constants: dict[tuple[int], Any]
    attributes: dict[tuple[int], list[list[Any]]]

    @classmethod
    def of(cls, launch: Launch) -> Specialization:
        signature: dict[str, str] = {}
        constants: dict[tuple[int], Any] = {}
        attributes: dict[tuple[int], list[list[Any]]] = {}
        for place, parameter in enumerate(launch.kernel.params):
            value = launch.args[parameter.name]
            if isinstance(value, Tensor):
                signature[parameter.name] = POINTERS[value.dtype]
                attributes[(place,)] = [["tt.divisibility", 16]]
            elif parameter.is_constexpr or value is None or (value == 1 and isinstance(value, int)):
                signature[parameter.name] = "constexpr"
                constants[(place,)] = value
            elif isinstance(value, float):
                signature[parameter.name] = "fp32"
            else:
                signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0:
                    attributes[(place,)] = [["tt.divisibility", 16]]
        return cls(signature, constants, attributes)


def sources(kernel: Any) -> dict[str, str]:
    """Source of a kernel and of every jitted function that it calls."""
    found, waiting = {}, [kernel]
    while waiting:
        function = waiting.pop()
        found[function.__name__] = function.src
        called = (function.fn.__globals__.get(name) for name in function.fn.__code__.co_names)
        waiting += [c for c in called if isinstance(c, type(kernel)) and c.__name__ not in found]
    return found


def content(launch: Launch, target: str) -> str:
    """Names what a compilation depends on."""
    parts = [triton.__version__, target, sources(launch.kernel), asdict(Specialization.of(launch)), launch.options]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def compile_launch(launch: Launch, target: str) -> Any:
    """The compiled kernel."""
    from triton.compiler import ASTSource

    special, machine = Specialization.of(launch), gpu_target(target)
    source = ASTSource(
        fn=launch.kernel, signature=special.signature, constexprs=special.constants, attrs=special.attributes
    )
    return triton.compile(source, target=machine, options=launch.options_for(machine.warp_size))


def inspect(compiled: Any, target: str) -> Compiled:
    """Reads registers, spills and widths out of the machine code."""
    return _inspect_amd(compiled) if target.startswith("gfx") else _inspect_nvidia(compiled)


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], check=True, capture_output=True, text=True).stdout


def _inspect_nvidia(compiled: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
    counts = Counter(MEMORY.findall(code))
    reads: Counter[int] = Counter()
    writes: Counter[int] = Counter()
    local = 0
    for name, count in counts.items():
        head, *parts = name.split(".")
        width = next((int(part.lstrip("US")) for part in parts if part in ("64", "128", "256", "U16", "S16", "U8")), 32)
        if head in ("LDG", "LDGSTS"):
            reads[width] += count
        elif head == "STG":
            writes[width] += count
        elif head in ("LDL", "STL"):
            local += count
    total = len(re.findall(r"^\s+(?:/\*[0-9a-f]+\*/)?\s+(?:@!?U?P\d+ )?[A-Z][A-Z0-9_.]+.*;", code, re.MULTILINE))
    return Compiled(registers, stack + local, compiled.metadata.shared, dict(reads), dict(writes), total)


def _inspect_amd(compiled: Any) -> Compiled:
    code = compiled.asm["amdgcn"]

    def value(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", code)
        return int(found[1]) if found else 0

    reads: Counter[int] = Counter()
    writes: Counter[int] = Counter()
    sizes = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}
    for name in MEMORY_AMD.findall(code):
        width = next((bits for part, bits in sizes.items() if name.endswith(part)), 16)
        (reads if "_load_" in name else writes)[width] += 1
    # Scalar registers spill into lanes of vector registers, not to memory.
    spilled = value("private_segment_fixed_size") + value("vgpr_spill_count")
    total = len(re.findall(r"^\t[a-z]+_\w+", code, re.MULTILINE))
    return Compiled(value("vgpr_count"), spilled, compiled.metadata.shared, dict(reads), dict(writes), total)


def unique_launches() -> Iterator[tuple[str, Launch]]:
    """Each launch that ships once, however many sizes share it, with a name of its own."""
    assert not interpreted(), "kernels were imported for the interpreter; compile in a process without TRITON_INTERPRET"
    seen, names = set(), set()
    for label, one in all_passes():
        for i, launch in enumerate(one.launches):
            special = Specialization.of(launch)
            key = (launch.name, repr(special), repr(launch.options))
            if key in seen:
                continue
            seen.add(key)
            part = f"{one.operation} {one.direction}" + (f", then {launch.name.removesuffix('_kernel')}" if i else "")
            name = f"{part}, {label}"
            assert name not in names, name
            names.add(name)
            yield name, launch


class Record:
    """Results of earlier compilations: name → target → content and result."""

    def __init__(self, file: Path | None):
        self.file = file
        self.rows: dict[str, dict[str, dict[str, Any]]] = {}
        if file is not None and file.exists():
            self.rows = json.loads(file.read_text())

    def find(self, name: str, target: str, content: str) -> Compiled | None:
        row = self.rows.get(name, {}).get(target, {})
        return Compiled.from_json(row) if row.get("content") == content else None

    def add(self, name: str, target: str, content: str, result: Compiled) -> None:
        self.rows.setdefault(name, {})[target] = {"content": content, **asdict(result)}

    def save(self, names: Sequence[str]) -> None:
        """Writes what is known of these, one line for each target."""
        assert self.file is not None, "--update needs --record"
        rows = {
            name: ",\n".join(f"  {json.dumps(target)}: {json.dumps(row)}" for target, row in self.rows[name].items())
            for name in names
            if name in self.rows
        }
        self.file.write_text(
            "{\n" + ",\n".join(f" {json.dumps(n)}: {{\n{row}\n }}" for n, row in rows.items()) + "\n}\n"
        )


def check(name: str, launch: Launch, target: str, record: Record, fresh: bool) -> tuple[Compiled, list[str]]:
    """One cell of the table and what the gate objects to."""
    key = content(launch, target)
    known = record.find(name, target, key)
    result = inspect(compile_launch(launch, target), target) if known is None or fresh else known
    faults = result.faults(launch.name)
    if known is not None and result != known:
        faults.append(f"the record says {known}, the compiler {result}")
    record.add(name, target, key, result)
    return result, [f"{name}, {target}: {fault}" for fault in faults]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--record", type=Path, help="file of earlier results")
    parser.add_argument("--fresh", help="compile rows whose name contains this, recorded or not")
    parser.add_argument("--update", action="store_true", help="write the results into the record")
    chosen = parser.parse_args()
    record = Record(chosen.record)
    print(f"triton {triton.__version__}: registers and instructions; '!' marks what the gate objects to")
    print(f"{'kernel':<54}" + "".join(f"{target:>14}" for target in chosen.targets))
    faults, shipped = [], []
    for name, launch in unique_launches():
        shipped.append(name)
        if chosen.only not in name:
            continue
        cells = []
        for target in chosen.targets:
            fresh = chosen.fresh is not None and chosen.fresh in name
            result, wrong = check(name, launch, target, record, fresh)
            faults += wrong
            cells.append(f"{result.registers:>5}{result.instructions:>7}{'!' if wrong else ' '} ")
        print(f"{name:<54}" + "".join(f"{cell:>14}" for cell in cells), flush=True)
    gone = record.rows.keys() - set(shipped)
    if chosen.update:
        record.save(shipped)
    elif gone:
        faults.append(f"recorded but not shipped: {'; '.join(sorted(gone))}")
    print("\n".join(faults) if faults else "no spills; rows are read and written 128 bits at a time")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
