"""The GPU benchmark: see run.sh. Prints tables and, as the last line, one JSON object.

What was not measured is null in it: a dry run has no times at all. `--out` also writes figures and conditions to a
file, such as benchmarks/results/gpu_h200.json; a dry run writes none.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import kernel_times
import network_times
import torch
from _conditions import write_result
from clock import Clock, cell

SECTIONS = ("kernels", "attention", "block")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="of kernels, attention, block (default: all)")
    parser.add_argument("--budget", type=float, default=540, help="seconds in which to finish (default: 540)")
    parser.add_argument("--out", type=Path, help="also write figures and conditions to this file")
    parser.add_argument("--dry-run", action="store_true", help="every step at tiny sizes, without times")
    args = parser.parse_args()
    sections = args.only.split(",")
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"--only knows {', '.join(SECTIONS)}, not {', '.join(sorted(unknown))}")
    if not (torch.cuda.is_available() or args.dry_run):
        raise SystemExit("torch sees no GPU here; --dry-run goes through the steps without one")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = Clock(device, args.dry_run, args.budget)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    figures: dict[str, Any] = {"gpu": name, "dry_run": args.dry_run, "copy_gb_per_s": clock.copy_rate()}
    print(f"{name}, torch {torch.__version__}; a copy moves {cell(figures['copy_gb_per_s'], ',.0f')} GB/s")
    if "kernels" in sections:
        figures["kernels"] = kernel_times.measure(clock, figures["copy_gb_per_s"])
    if "attention" in sections:
        figures["attention"] = network_times.attention(clock)
    if "block" in sections:
        figures["block"] = network_times.blocks(clock)
    if args.out and not args.dry_run:
        write_result(args.out, figures, ("torch", "triton"), gpu=name)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
