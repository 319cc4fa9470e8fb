"""Memory of importing and exporting the published 5B network (5,046,643,744 parameters, bf16), with synthetic weights.

    python benchmarks/interop_memory.py [--folder DIR] [--size 5b] [--parts 2] [--formats lumina …] [--out FILE]

Needs about 21 GB of free disk, which it gives back. Each step runs in a process of its own; the figure is that
process's peak resident memory, Python and torch included (the first line shows those alone). Seconds say little on a
shared disk and are not kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from _conditions import write_result
from torch import Tensor

from flagdit.checkpoint.lumina import official_shapes
from flagdit.checkpoint.lumina_files import RAW, write_official
from flagdit.checkpoint.tensors import Derived, Entry
from flagdit.model.sizes import official

GB = 1e9
LIMIT_GB = 4.0

FORMATS = ("safetensors", "lumina", "diffusers")
STARTING = "import flagdit.checkpoint.importing, flagdit.checkpoint.export"
IMPORT = "from flagdit.checkpoint.importing import *; import_weights(root / 'official', root / 'run')"
EXPORT = (
    "from flagdit.checkpoint.export import *; "
    "export_run(root / 'run', root / 'out', '{}', Options(parts=2, encoders=False))"
)
PEAK = """
import sys
from pathlib import Path
root = Path(sys.argv[1])
{step}
# Not ru_maxrss, which remembers the process that started this one.
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(int(status["VmHWM"].split()[0]) * 1024)
"""


def write_synthetic(folder: Path, size: str, parts: int) -> int:
    """An official checkpoint of that size; returns its number of parameters."""
    shapes = official_shapes(official(size))
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    def read(name: str) -> Tensor:
        count = Entry(shapes[name], torch.bfloat16).numel
        return noise.repeat(-(-count // len(noise)))[:count].reshape(shapes[name])

    entries = {name: Entry(shape, torch.bfloat16) for name, shape in shapes.items()}
    folder.mkdir()
    write_official(folder, Derived(entries, read), parts, RAW)
    return sum(entry.numel for entry in entries.values())


def peak_of(step: str, root: Path) -> int:
    """Peak resident bytes of a process that does one step."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK.format(step=step), str(root)], stdout=subprocess.PIPE, text=True, check=True
    )
    return int(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to put the files (default: the system's temporary folder)")
    parser.add_argument("--size", default="5b", help="a published size of model/sizes.py (default: 5b)")
    parser.add_argument("--parts", type=int, default=2, help="model-parallel files to import (default: 2)")
    parser.add_argument("--formats", nargs="*", default=FORMATS, help=f"to export to (default: {' '.join(FORMATS)})")
    parser.add_argument("--out", type=Path, help="also write figures and conditions to this file")
    args = parser.parse_args()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        root = Path(folder)
        count = write_synthetic(root / "official", args.size, args.parts)
        print(f"{count:,} parameters in {args.parts} parts")
        print(f"{'step':<28}{'peak GB':>10}{'seconds':>10}")
        steps = {"packages alone": STARTING, "import": IMPORT}
        steps |= {f"export, {kind}": EXPORT.format(kind) for kind in args.formats}
        for name, step in steps.items():
            start = time.monotonic()
            figures[name] = round(peak_of(step, root) / GB, 3)
            print(f"{name:<28}{figures[name]:>10.2f}{time.monotonic() - start:>10.0f}", flush=True)
            shutil.rmtree(root / "out", ignore_errors=True)
            if name == "import":
                shutil.rmtree(root / "official")
    worst = max(figures.values())
    result = {"parameters": count, "worst_gb": worst, "limit_gb": LIMIT_GB, "peak_gb": figures}
    if args.out:
        write_result(args.out, result, ("torch", "safetensors"), size=args.size, parts=args.parts, dtype="bf16")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
