"""What is known of GPUs: memory, dense bf16 peak and links, from their makers' data sheets (SXM versions)."""

from __future__ import annotations

from dataclasses import dataclass

from flagdit.errors import RecipeError

GB = 1e9


@dataclass(frozen=True)
class Gpu:
    """One device.

    Attributes:
        memory: bytes.
        tflops: dense bf16 peak, in TFLOP/s.
        bandwidth: of its memory, in bytes/s.
        link: to its neighbours on the node, in bytes/s and direction (NVLink).
        network: to other nodes, in bytes/s and direction: one NIC a GPU of the generation that is sold with it.
    """

    name: str
    memory: float
    tflops: float
    bandwidth: float
    link: float
    network: float


GPUS = {
    gpu.name: gpu
    for gpu in [
        Gpu("a100-40", 40 * GB, 312, 1555 * GB, 300 * GB, 25 * GB),
        Gpu("a100-80", 80 * GB, 312, 2039 * GB, 300 * GB, 25 * GB),
        Gpu("h100", 80 * GB, 989, 3350 * GB, 450 * GB, 50 * GB),
        Gpu("h200", 141 * GB, 989, 4800 * GB, 450 * GB, 50 * GB),
        Gpu("b200", 180 * GB, 2250, 8000 * GB, 900 * GB, 50 * GB),
    ]
}


def gpu_named(name: str) -> Gpu:
    """The GPU of that name.

    Raises:
        RecipeError: it is not known.
    """
    if name.lower() not in GPUS:
        raise RecipeError(f"--gpu {name} is not known", fix=f"Known ones: {', '.join(GPUS)}.")
    return GPUS[name.lower()]
