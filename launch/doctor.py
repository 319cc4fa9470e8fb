"""`flagdit doctor`: what this machine offers, what is wrong with it, and how to fix that."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from rich.table import Table

from flagdit import __version__
from flagdit.errors import LaunchError
from flagdit.launch import scheduler
from flagdit.launch.health import nvidia_smi

SHOWN = ("torch", "triton", "megatron-core", "deepspeed", "transformers", "diffusers")
"""Of the packages that must be there, those whose versions people ask for."""
OPTIONAL = ("flash-attn", "flash-attn-3", "flash-attn-4")
PROBE = 64 * 2**20
SLOW_DISK = 100e6
SMALL_SHM = 1e9
MARKS = {"ok": "[green]ok[/]", "none": "[dim]–[/]", "warn": "[yellow]look[/]", "bad": "[red]wrong[/]"}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        state: ok, none (need not be there), warn (works, but worse than it could) or bad (something will fail).
        fix: what to do; empty when all is well.
    """

    what: str
    value: str
    state: str = "ok"
    fix: str = ""


def examine(folder: Path, backends: Callable[[], dict[str, str | None]]) -> list[Finding]:
    """All findings.

    Args:
        folder: where runs and data are; its file system is measured.
        backends: attention backend → why it cannot serve here; None: it can.
    """
    found = [*_python(), *_packages(), *_devices(), *_attention(backends), *_compilers(), *_machine(), *_disk(folder)]
    return [*found, _slurm()]


def table_of(findings: list[Finding]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        table.add_row(MARKS[finding.state], finding.what, f"{finding.value}{'. ' + finding.fix if finding.fix else ''}")
    return table


def verdict(findings: list[Finding]) -> str:
    """All of it in one line."""
    bad, warn = (sum(finding.state == state for finding in findings) for state in ("bad", "warn"))
    told = [f"{bad} wrong"] * bool(bad) + [f"{warn} to look at"] * bool(warn)
    return ", ".join(told) if told else "nothing is wrong"


def _python() -> list[Finding]:
    return [
        Finding("flagdit", f"{__version__}, {Path(__file__).resolve().parents[1]}"),
        Finding("python", f"{platform.python_version()}, {sys.executable}"),
    ]


def _packages() -> list[Finding]:
    """What is installed, held against what flagdit's own metadata asks for."""
    needed = [Requirement(text) for text in importlib.metadata.requires("flagdit") or ()]
    needed = [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    found = [_package(requirement) for requirement in needed]
    found = [f for f in found if f.state != "ok" or f.what in SHOWN]
    for name in OPTIONAL:
        version = _version(name)
        found.append(Finding(name, version or "not installed", "ok" if version else "none"))
    return found


def _package(requirement: Requirement) -> Finding:
    version, fix = _version(requirement.name), f"pip install '{requirement.name}{requirement.specifier}'"
    if version is None:
        return Finding(requirement.name, "not installed", "bad", fix)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(requirement.name, f"{version}, but {requirement.specifier} is needed", "bad", fix)
    return Finding(requirement.name, version)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[Finding]:
    import torch

    listing = nvidia_smi()
    driver = 0 if listing is None else len(listing.splitlines())
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        gpus = Finding("GPUs", f"{len(names)} × {names[0]}, CUDA {torch.version.cuda}")
        if driver > len(names):
            hidden = f"{driver - len(names)} more are hidden by CUDA_VISIBLE_DEVICES"
            gpus = Finding("GPUs", f"{gpus.value}; {hidden}", "warn")
        return [gpus, Finding("NCCL", nccl)]
    if driver:
        fix = "Install the torch build of your CUDA version (pytorch.org has the command)."
        return [Finding("GPUs", f"{driver} in the driver, torch {torch.__version__} sees none", "bad", fix)]
    return [Finding("GPUs", "none: training runs on the CPU", "none")]


def _attention(backends: Callable[[], dict[str, str | None]]) -> list[Finding]:
    served = backends()
    able = [name for name, reason in served.items() if reason is None]
    refused: defaultdict[str, list[str]] = defaultdict(list)
    for name, reason in served.items():
        if reason is not None:
            refused[reason].append(name)
    why = "".join(f"; not {', '.join(names)}: {reason}" for reason, names in refused.items())
    return [Finding("attention", (", ".join(able) or "none") + why, "ok" if able else "bad")]


def _compilers() -> list[Finding]:
    compiler = next((c for c in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if c and shutil.which(c)), None)
    if compiler is None:
        return [Finding("C++ compiler", "none", "warn", "train.compile and Triton need one: apt-get install g++.")]
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.splitlines()
    return [Finding("C++ compiler", said[0] if said else compiler)]


def _machine() -> list[Finding]:
    cores = len(os.sched_getaffinity(0))
    found = [Finding("cores", f"{cores} of {os.cpu_count()}")]
    shm = Path("/dev/shm")
    free = shutil.disk_usage(shm).free if shm.exists() else 0
    fix = "Loader processes hand over batches there: start the container with --shm-size=16g or --ipc=host."
    found.append(Finding("/dev/shm", f"{free / 1e9:.1f} GB", *(("warn", fix) if free < SMALL_SHM else ())))
    return found


def _disk(folder: Path) -> list[Finding]:
    """Free room, and the speed of writing and syncing one file."""
    nearest = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(nearest).free / 1e9
    room = Finding("room", f"{free:.0f} GB free in {nearest}", *(("warn", "Checkpoints need it.") if free < 10 else ()))
    block = os.urandom(2**20)
    try:
        with tempfile.NamedTemporaryFile(dir=nearest) as file:
            began = time.perf_counter()
            for _ in range(PROBE // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = PROBE / (time.perf_counter() - began)
    except OSError as error:
        return [room, Finding("file system", f"{nearest}: {error.strerror}", "bad", "Choose another run_dir.")]
    slow = ("warn", "Checkpoints will be slow: choose another run_dir.") if speed < SLOW_DISK else ()
    return [room, Finding("file system", f"{speed / 1e6:.0f} MB/s to write and sync in {nearest}", *slow)]


def _slurm() -> Finding:
    if not scheduler.there():
        return Finding("SLURM", "not here; `flagdit launch slurm --dry-run` writes scripts all the same", "none")
    try:
        partitions = scheduler.live_partitions()
    except LaunchError as error:
        return Finding("SLURM", error.what, "warn", error.fix)
    if partitions is None:
        return Finding("SLURM", "sbatch is here, but no controller answers", "warn", "Try `scontrol ping`.")
    return Finding("SLURM", ", ".join(f"{name} (longest job: {limit})" for name, limit in partitions.items()))
