"""Checks a node before it trains; run by the job's script, one process a node.

    srun --ntasks-per-node=1 python -m flagdit.launch.health --gpus 8 --folder RUN/slurm/health
    python -m flagdit.launch.health --bad RUN/slurm/health --nodes node[1-8]     prints the bad ones

Every node writes what it found into FOLDER/NODE.json; a node that writes nothing has not even started. Then all nodes
sum numbers together: the result must be right and fast enough.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

SKEW = 5.0
"""Most seconds between this node's clock and that of the shared file system: beyond, logs and leases lie."""
TOGETHER = timedelta(seconds=180)
NUMBERS = 8_000_000
GB = 1e9


def faults_of_gpus(wanted: int, listing: str | None) -> Iterator[str]:
    """What is wrong with the GPUs of this node.

    Args:
        wanted: how many there must be.
        listing: what `nvidia-smi` says of index, memory in MiB and uncorrected ECC errors, a GPU a line; None: nothing.
    """
    if not wanted:
        return
    if listing is None:
        yield f"nvidia-smi does not answer, {wanted} GPUs are expected"
        return
    rows = [[field.strip() for field in line.split(",")] for line in listing.splitlines() if line.strip()]
    if len(rows) < wanted:
        yield f"{len(rows)} GPUs of {wanted}"
    memories = [int(row[1]) for row in rows if row[1].isdecimal()]
    for row in rows:
        if row[1].isdecimal() and int(row[1]) < 0.95 * max(memories):
            yield f"GPU {row[0]} has {row[1]} MiB, others {max(memories)}"
        # "[N/A]" where ECC is off or cannot be read.
        if len(row) > 2 and row[2].isdecimal() and int(row[2]) > 0:
            yield f"GPU {row[0]} has {row[2]} uncorrected memory errors"


def nvidia_smi() -> str | None:
    query = "--query-gpu=index,memory.total,ecc.errors.uncorrected.volatile.total"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def faults_of_disk(folder: Path, gigabytes: float) -> Iterator[str]:
    """Whether a folder can be written and has so much room."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
        free = shutil.disk_usage(folder).free / GB
    except OSError as error:
        yield f"{folder} cannot be written: {error.strerror}"
        return
    if free < gigabytes:
        yield f"{folder} has {free:.1f} GB free, {gigabytes:g} are wanted (cluster.min_disk)"


def faults_of_clock(folder: Path) -> Iterator[str]:
    """Whether this node's clock agrees with that of the file system that all nodes share."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        here = time.time()
        os.utime(file.name)
        skew = abs(os.stat(file.name).st_mtime - here)
    if skew > SKEW:
        yield f"the clock is {skew:.0f} seconds off the shared file system's"


def faults_of_command(line: str | None) -> Iterator[str]:
    """The site's own check."""
    if line:
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            yield f"cluster.health_command ended with exit code {done.returncode}" + (f": {said[-1]}" if said else "")


def faults_together(gpus: int, min_bandwidth: float) -> Iterator[str]:
    """An all-reduce among all nodes: its result and, where it is asked for, its bandwidth."""
    rank, world = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    if world == 1:
        return
    import torch
    import torch.distributed as dist

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    device = torch.device("cuda", 0) if gpus else torch.device("cpu")
    count = NUMBERS if gpus else NUMBERS // 100
    dist.init_process_group("nccl" if gpus else "gloo", timeout=TOGETHER)
    numbers = torch.arange(count, device=device) % 1000 + rank
    for _ in range(2):  # the first one sets up connections
        summed = numbers.clone()
        began = time.perf_counter()
        dist.all_reduce(summed)
        correct = bool((summed == (torch.arange(count, device=device) % 1000) * world + world * (world - 1) // 2).all())
        seconds = time.perf_counter() - began
    dist.destroy_process_group()
    if not correct:
        yield "an all-reduce over the nodes gives wrong sums"
    bandwidth = 2 * (world - 1) / world * numbers.nbytes / seconds / GB
    if bandwidth < min_bandwidth:
        yield f"an all-reduce over the nodes reaches {bandwidth:.2f} GB/s, {min_bandwidth:g} are wanted"


def check(args: argparse.Namespace) -> int:
    """Checks this node and tells; an exit code but 0 means that something is wrong."""
    args.folder.mkdir(parents=True, exist_ok=True)
    own = [
        *faults_of_gpus(args.gpus, nvidia_smi() if args.gpus else None),
        *faults_of_disk(args.folder, args.min_disk),
        *faults_of_disk(args.cache, args.min_disk),
        *faults_of_clock(args.folder),
        *faults_of_command(args.command),
    ]
    file = args.folder / f"{node_name()}.json"
    file.write_text(json.dumps({"node": node_name(), "faults": own}))
    if own:
        print(f"{node_name()}: {'; '.join(own)}", file=sys.stderr, flush=True)
        return 1
    if not everyone_is_well(args.folder):
        return 0  # the others have spoken; do not wait for them in a collective
    together = list(faults_together(args.gpus, args.min_bandwidth))
    if together:
        print(f"{node_name()}: {'; '.join(together)}", file=sys.stderr, flush=True)
    return int(bool(together))


def everyone_is_well(folder: Path) -> bool:
    """Waits for what the other nodes write."""
    end = time.monotonic() + TOGETHER.total_seconds()
    while time.monotonic() < end:
        said = [json.loads(text) for file in folder.glob("*.json") if (text := file.read_text())]
        if any(one["faults"] for one in said):
            return False
        if len(said) == int(os.environ["SLURM_NTASKS"]):
            return True
        time.sleep(0.2)
    return False


def bad_nodes(folder: Path, nodes: list[str]) -> list[str]:
    """Of the nodes of a job those that found a fault; where none did, those that said nothing."""
    said = {}
    for node in nodes:
        file = folder / f"{node}.json"
        said[node] = json.loads(file.read_text())["faults"] if file.exists() else None
    faulty = [node for node, faults in said.items() if faults]
    return faulty or [node for node, faults in said.items() if faults is None]


def node_name() -> str:
    return os.environ.get("SLURMD_NODENAME", socket.gethostname())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--cache", type=Path, default=Path("/tmp"))
    parser.add_argument("--min-disk", type=float, default=1.0)
    parser.add_argument("--min-bandwidth", type=float, default=0.0)
    parser.add_argument("--command")
    parser.add_argument("--bad", type=Path, help="print the bad nodes of a check that is over")
    parser.add_argument("--nodes", help="the job's node list, with --bad")
    args = parser.parse_args()
    if args.bad:
        names = subprocess.run(
            ["scontrol", "show", "hostnames", args.nodes], capture_output=True, text=True, check=True
        )
        print(",".join(bad_nodes(args.bad, names.stdout.split())))
        return 0
    return check(args)


if __name__ == "__main__":
    sys.exit(main())
