"""The keys of the `cluster` block: what `flagdit launch slurm` asks SLURM for. Training reads none of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from flagdit.config.fields import key

Texts = list[str]


@dataclass(frozen=True)
class ClusterConfig:
    """The SLURM job that `flagdit launch slurm` makes; profiles are in recipes/clusters/."""

    account: Optional[str] = key(None, "Account that is charged.")
    partition: Optional[str] = key(None, "Partition; null: the cluster's default.")
    partitions: dict[str, str] = key({}, "The cluster's partitions → longest time, to check against; empty: ask sinfo.")
    qos: Optional[str] = key(None, "Quality of service.")
    reservation: Optional[str] = key(None, "Reservation.")
    nodes: int = key(1, "Nodes.", at_least=1)
    gpus_per_node: int = key(0, "GPUs asked for on each node, one rank each; 0: train on CPUs.", at_least=0)
    gpu_type: Optional[str] = key(None, "GPU type as SLURM names it, for example h100.")
    ranks_per_node: Optional[int] = key(None, "Ranks on each node; null: one a GPU, or one.", at_least=1)
    cpus_per_rank: int = key(4, "Cores of each rank, loader processes included.", at_least=1)
    memory: Optional[str] = key(None, "Memory of each node, as 900G; 0: all of it; null: the cluster's default.")
    time: str = key("1-00:00:00", "Longest time of one job, as days-hours:minutes:seconds.")
    exclusive: bool = key(False, "Take whole nodes.")
    constraint: Optional[str] = key(None, "Node features that must be there.")
    exclude: Optional[str] = key(None, "Nodes to keep away from, as node[3,7].")
    signal: int = key(300, "Seconds before the end of `time` at which the run saves and is queued again.", at_least=1)
    restarts: int = key(20, "Most times that a job is queued again by itself; 0: never.", at_least=0)
    chain: int = key(1, "Jobs to submit, one after the other, for runs longer than `time`.", at_least=1)
    dependency: Optional[str] = key(None, "What the first job waits for, as afterok:1234.")
    comment: Optional[str] = key(None, "Free text shown by squeue.")
    logs: Optional[str] = key(None, "Folder of job and rank logs; null: logs/ in the run folder.")
    modules: Texts = key([], "Environment modules to load, in order.")
    venv: Optional[str] = key(None, "Folder of a virtual environment to activate.")
    container: Optional[str] = key(None, "Container image for pyxis/enroot: a .sqsh file or registry#image.")
    mounts: Texts = key([], "Folders that the container sees, as source:target[:flags].")
    environment: dict[str, str] = key({}, "Environment variables of every rank.")
    network: str = key(
        "none",
        "Settings of NCCL for the network: none, ib (InfiniBand), efa (AWS).",
        choices=("none", "ib", "efa"),
    )
    setup: Texts = key([], "Shell lines to run before anything else.")
    launcher: str = key(
        "srun",
        "srun: one task a rank; torchrun: one task a node, which starts the ranks.",
        choices=("srun", "torchrun"),
    )
    cache: str = key("/tmp/flagdit", "Folder on each node for Triton's and torch's compile caches.")
    health: bool = key(True, "Check every node before training; a bad one is left out and the job queued again.")
    health_command: Optional[str] = key(
        None, "Another check of yours, run on every node; an exit code but 0: bad node."
    )
    min_bandwidth: float = key(0.0, "GB/s that an all-reduce over all ranks must reach; 0: any.", at_least=0)
    min_disk: float = key(1.0, "GB that must be free in the run folder and the cache.", at_least=0)
