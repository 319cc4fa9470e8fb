"""Saving against a raw sequential write of the same bytes, and against torch.save.

    python benchmarks/checkpoint_speed.py [--gb 1] [--rounds 5] [--folder FOLDER] [--out FILE]

A state of matrices and vectors (weights, two moments, an average, as a model of four blocks has them) is written four
ways, one after the other in every round, each to a new file or folder and with fsync: raw (one file, one sequential
write), ours, torch.save (one file, pickled), and ours beside a training thread. All of it twice: on the disk of
`--folder`, and in memory (/dev/shm), where no disk hides what the processor does. The figures are medians over rounds
of ratios within a round, so that what the machine does at other times falls out.

    raw_ratio         our bytes per second over the raw write's, on the disk
    torch_save_ratio  torch.save's seconds over ours, in memory; torch_save_ratio_disk: on the disk
    hash_share        seconds that hashing the same bytes takes over the seconds of our save, on the disk
    stall_ratio       seconds that training stands still for a save beside it over those of a save that it waits for
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import xxhash
from _conditions import write_result

from flagdit.checkpoint import store
from flagdit.checkpoint.safetensors_files import bytes_of
from flagdit.config.schema_checkpoint import CheckpointConfig
from flagdit.parallel.mesh import ParallelContext
from flagdit.parallel.shards import whole_shards
from flagdit.train.saving import Saver, Snapshot

CHUNK = 1 << 22
GB = 10**9

Groups = dict[str, dict[str, torch.Tensor]]
Seconds = list[dict[str, float]]


def make_state(gigabytes: float) -> Groups:
    """Four groups of so many bytes together."""
    width = int((gigabytes * GB / 4 / 4 / 4 / 12) ** 0.5)  # four blocks of about 12 width² elements, fp32, four groups
    shapes = {f"blocks.{i}.{name}": (rows * width, width) for i in range(4) for name, rows in SHAPES.items()}
    shapes |= {f"blocks.{i}.norm": (width,) for i in range(4)}
    generator = torch.Generator().manual_seed(0)
    names = ("model", "exp_avg", "exp_avg_sq", "ema_0.9999")
    return {group: {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()} for group in names}


SHAPES = {"wq": 1, "wk": 1, "wv": 1, "wo": 1, "w1": 3, "w2": 2, "w3": 3}


def raw_write(state: Groups, folder: Path) -> None:
    descriptor = os.open(folder / "raw", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    for tensors in state.values():
        for tensor in tensors.values():
            left = bytes_of(tensor)
            while left:
                left = left[os.write(descriptor, left[:CHUNK]) :]
    os.fsync(descriptor)
    os.close(descriptor)


def torch_save(state: Groups, folder: Path) -> None:
    with (folder / "state.pt").open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def save(state: Groups, folder: Path) -> None:
    store.save(folder, 1, {group: whole_shards(tensors) for group, tensors in state.items()}, {})


def hash_all(state: Groups, folder: Path) -> None:
    digest = xxhash.xxh3_128()
    for tensors in state.values():
        for tensor in tensors.values():
            view = bytes_of(tensor)
            for start in range(0, len(view), CHUNK):
                digest.update(view[start : start + CHUNK])
    digest.hexdigest()


def save_beside(saver: Saver, state: Groups) -> float:
    """Seconds that training stands still."""
    groups = {group: whole_shards(tensors) for group, tensors in state.items()}
    began = time.perf_counter()
    saver.save(Snapshot(1, groups, {}, {}, None), final=False)
    stall = time.perf_counter() - began
    saver.wait()
    return stall


def timed(function: Callable[[Groups, Path], None], state: Groups, root: Path) -> float:
    """Seconds of a write into a new folder, which is removed before the next."""
    folder = Path(tempfile.mkdtemp(dir=root))
    began = time.perf_counter()
    function(state, folder)
    seconds = time.perf_counter() - began
    shutil.rmtree(folder)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=1.0, help="size of the state (default: 1)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where to write (default: runs)")
    parser.add_argument("--out", type=Path, help="also write figures and conditions to this file")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    state = make_state(args.gb)
    size = sum(t.nbytes for tensors in state.values() for t in tensors.values())
    disk, memory = (measure(state, folder, args.rounds) for folder in (args.folder, Path("/dev/shm")))
    figures = {
        "raw_ratio": median(disk, lambda s: s["raw"] / s["ours"]),
        "torch_save_ratio": median(memory, lambda s: s["torch"] / s["ours"]),
        "torch_save_ratio_disk": median(disk, lambda s: s["torch"] / s["ours"]),
        "raw_ratio_memory": median(memory, lambda s: s["raw"] / s["ours"]),
        "hash_share": median(disk, lambda s: s["hash"] / s["ours"]),
        "stall_ratio": median(disk, lambda s: s["stall"] / s["ours"]),
        "disk_gb_per_s": median(disk, lambda s: size / GB / s["ours"]),
    }
    if args.out:
        conditions = {"gb": args.gb, "rounds": args.rounds, "disk": disk, "memory": memory}
        write_result(args.out, figures, ("torch", "xxhash"), **conditions)
    print(json.dumps(figures))


def measure(state: Groups, folder: Path, rounds: int) -> Seconds:
    """Seconds of every way, round by round."""
    ways = {"raw": raw_write, "ours": save, "torch": torch_save, "hash": hash_all}
    found: Seconds = []
    print(f"in {folder}, seconds\n" + "".join(f"{way:>8}" for way in (*ways, "stall")))
    with tempfile.TemporaryDirectory(dir=folder) as name:
        root = Path(name)
        saver = Saver(root / "beside", CheckpointConfig(asynchronous=True), ParallelContext(), lambda line: None)
        saver.prepare(0, {group: whole_shards(tensors) for group, tensors in state.items()})
        for _ in range(rounds):
            seconds = {way: timed(function, state, root) for way, function in ways.items()}
            seconds["stall"] = save_beside(saver, state)
            assert saver.failures == 0
            found.append(seconds)
            print("".join(f"{value:>8.2f}" for value in seconds.values()), flush=True)
    return found


def median(rounds: Seconds, ratio: Callable[[dict[str, float]], float]) -> float:
    return statistics.median(ratio(seconds) for seconds in rounds)


if __name__ == "__main__":
    main()
