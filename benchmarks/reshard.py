"""One state saved from every mesh and loaded on every other: tensors bit by bit, the next three losses to 1e-6.

    python benchmarks/reshard.py [--places "TP2 DP1 ZeRO 1,DP2 ZeRO 3"] [--out FILE]

Meshes of one, two and four ranks, each with ZeRO 1, 2 and 3. One process trains a tiny model for two steps and saves.
Every mesh loads that and saves it again; then every mesh loads what every mesh saved, compares each rank's weights,
moments and averages with the first checkpoint's bits, and trains three steps. Each of these checkpoints is exported as
well: the exported files must be the same, byte by byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from _conditions import write_result
from _reshard_ranks import EXPECTED, places

from flagdit.checkpoint.export import Options, export_run
from flagdit.launch.local import free_port, rank_environment
from flagdit.launch.processes import run_ranks

BOUND = 1e-6


def start(ranks: int, folder: Path, wanted: str) -> None:
    """One set of ranks for all meshes of that size."""
    script = Path(__file__).with_name("_reshard_ranks.py")
    argv = [sys.executable, str(script), str(ranks), str(folder), wanted]
    port = free_port()
    path = os.pathsep.join([str(script.parents[1]), os.environ.get("PYTHONPATH", "")])

    def environment(rank: int) -> dict[str, str]:
        return {**rank_environment(rank, ranks, port), "PYTHONPATH": path}

    code = run_ranks(argv, ranks, folder / f"logs_{ranks}", environment, lambda line: print(line, file=sys.stderr))
    assert code == 0, f"{ranks} ranks ended with {code}"


def exported(run: Path) -> str:
    """Hash of all files of an export of a checkpoint."""
    out = run.with_name(run.name + " exported")
    export_run(run, out, "safetensors", Options(dtype="fp32", encoders=False))
    digest = hashlib.sha256()
    for file in sorted(p for p in out.rglob("*") if p.is_file()):
        digest.update(str(file.relative_to(out)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--places", default="", help="names of some places, separated by commas (default: all)")
    parser.add_argument("--out", type=Path, help="also write figures and conditions to this file")
    args = parser.parse_args()
    everywhere = places(args.places)
    worlds = sorted({place.world for place in everywhere})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with ThreadPoolExecutor() as pool:  # at once: each world reads what the others write
            list(pool.map(lambda world: start(world, folder, args.places), worlds))
        rows = [row for world in worlds for row in json.loads((folder / f"read_{world}.json").read_text())]
        expected = json.loads((folder / EXPECTED).read_text())
        exports = {place.name: exported(folder / place.name) for place in everywhere}
    print(f"{'from':<18}{'to':<18}{'tensors that differ':>20}{'largest loss difference':>25}")
    for row in rows:
        row["worst"] = max(abs(a - b) / abs(b) for a, b in zip(row["losses"], expected, strict=True))
        print(f"{row['from']:<18}{row['to']:<18}{len(row['differing']):>20}{row['worst']:>25.1e}")
    figures = {
        "pairs": len(rows),
        "pairs_with_other_bits": sum(bool(row["differing"]) for row in rows),
        "worst_loss": max(row["worst"] for row in rows),
        "different_exports": len(set(exports.values())) - 1,
    }
    if args.out:
        write_result(args.out, figures, ("torch", "megatron-core", "deepspeed"), places=[p.name for p in everywhere])
    print(json.dumps(figures))
    good = len(rows) == len(everywhere) ** 2 and not figures["pairs_with_other_bits"]
    sys.exit(0 if good and figures["worst_loss"] <= BOUND and not figures["different_exports"] else 1)


if __name__ == "__main__":
    main()
