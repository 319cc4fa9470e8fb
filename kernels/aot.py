"""Compiles kernels ahead of time for GPUs that are not there, and reads what the compiler made of them.

    python -m flagdit.kernels.aot [--targets sm_90 gfx942] [--only NAME]

The gate that every shipped configuration passes on every target: nothing spilled to memory, and rows read and written
128 bits at a time. It runs in a process without TRITON_INTERPRET, and compiles what `launch` would: the arguments come
from `shipped.py`, which calls the operations on the meta device and records their launches.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
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


def compile_launch(launch: Launch, target: str) -> Any:
    """The compiled kernel, specialized as a launch with these arguments would be.

    Pointers are multiples of 16 bytes, as torch allocates them; integers are known to be 1 or multiples of 16.
    """
    from triton.compiler import ASTSource

    assert not interpreted(), "kernels were imported for the interpreter; compile in a process without TRITON_INTERPRET"
    kernel = launch.kernel
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
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
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=gpu_target(target), options=launch.options)


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
    spilled = value("private_segment_fixed_size") + value("vgpr_spill_count") + value("sgpr_spill_count")
    total = len(re.findall(r"^\t[a-z]+_\w+", code, re.MULTILINE))
    return Compiled(value("vgpr_count"), spilled, compiled.metadata.shared, dict(reads), dict(writes), total)


def unique_launches() -> Iterator[tuple[str, Launch]]:
    """Each launch that ships once, however many sizes share it, with a label of what tells it from others."""
    seen = set()
    for label, one in all_passes():
        for launch in one.launches:
            names = [p.name for p in launch.kernel.params if p.is_constexpr]
            constants = tuple(launch.args[name] for name in names)
            tensors = tuple(v.dtype if isinstance(v, Tensor) else v is None for v in launch.args.values())
            strides = tuple(v % 16 == 0 for v in launch.args.values() if type(v) is int)
            key = (launch.name, constants, tensors, strides)
            if key not in seen:
                seen.add(key)
                yield f"{launch.name.removesuffix('_kernel')} {label}", launch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--only", default="", help="compile kernels whose row contains this")
    chosen = parser.parse_args()
    print(f"triton {triton.__version__}: registers and instructions; '!' marks what the gate objects to")
    print(f"{'kernel':<52}" + "".join(f"{target:>14}" for target in chosen.targets))
    faults = []
    for label, launch in unique_launches():
        if chosen.only not in label:
            continue
        cells = []
        for target in chosen.targets:
            result = inspect(compile_launch(launch, target), target)
            wrong = result.faults(launch.name)
            faults += [f"{label}, {target}: {fault}" for fault in wrong]
            cells.append(f"{result.registers:>5}{result.instructions:>7}{'!' if wrong else ' '} ")
        print(f"{label:<52}" + "".join(f"{cell:>14}" for cell in cells), flush=True)
    print("\n".join(faults) if faults else "no spills; rows are read and written 128 bits at a time")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
