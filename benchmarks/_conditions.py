"""What a figure was measured under; stands in every file of benchmarks/results/."""

import importlib.metadata
import json
import os
import platform
from datetime import date
from pathlib import Path
from typing import Any


def processor() -> str:
    """The processor's name, as the kernel tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_result(file: Path, figures: dict[str, Any], packages: tuple[str, ...], **conditions: Any) -> None:
    """Writes figures with date and conditions as JSON.

    Args:
        file: such as benchmarks/results/model_cpu.json.
        figures: what was measured.
        packages: whose versions matter.
        conditions: anything else that does, such as threads.
    """
    known = {
        "date": date.today().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        **conditions,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"figures": figures, "conditions": known}, indent=1) + "\n")
