"""Does a run see the same data under every layout? Ranks × loader processes × accumulation, stopped and continued.

    flagdit bench data_exactness

Two epochs of a small data set, under each of 30 layouts: {1, 2, 3, 4, 8} ranks × {0, 1, 3} loader processes × {1, 2}
micro-batches. Once from the start under each layout, and once as runs that are cut at random batches, each piece under
another layout. A global batch is compared by sample ids (and bytes, here) with that of one process, over all ranks
together; over two epochs every sample must come twice. The same for webdataset, MosaicML Streaming and Energon, where
they are installed. The last line is one JSON object: samples repeated and lost over two epochs, layouts that were run,
and batches that differ, all of this project; then what the others gave.
"""

import argparse
import hashlib
import json
import random
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from _conditions import write_result
from _resumes import ENGINES, Batches, Engine, Layout, Refused, installed_engines

from flagdit.config.schema import DataConfig, ModelConfig, Recipe, TrainConfig
from flagdit.data_pipelines.loader import build_loader
from flagdit.data_pipelines.shards import Sample, npy_bytes
from flagdit.data_pipelines.writer import DatasetWriter

LAYOUTS: list[Layout] = list(product((1, 2, 3, 4, 8), (0, 1, 3), (1, 2)))
BATCH, SAMPLES, PER_SHARD = 48, 144, 6  # so that every layout divides a batch, and has a shard for each process
TWO_EPOCHS = 2 * SAMPLES // BATCH
SHAPES = ((3, 1, 4, 4), (3, 1, 8, 4), (3, 1, 8, 8))


@dataclass
class Account:
    """What one loader did.

    Attributes:
        layouts: tried from the start, and as many times in the middle.
        start_refused, start_differing: layouts that did not start, or gave other global batches than one process.
        refused, differing: pieces of cut runs that did not continue; batches that were not those of an uncut run.
        repeated, lost: samples over two epochs, in the worst run.
        says: what it refused with, and how often.
    """

    layouts: int = len(LAYOUTS)
    start_refused: int = 0
    start_differing: int = 0
    refused: int = 0
    differing: int = 0
    repeated: int = 0
    lost: int = 0
    says: Counter = field(default_factory=Counter)

    def settle(self, batches: Batches) -> None:
        """Counts what came too often or not at all in two epochs."""
        counts = Counter(sample for batch in batches for sample in batch)
        self.repeated = max(self.repeated, sum(max(n - 2, 0) for n in counts.values()))
        self.lost = max(self.lost, 2 * SAMPLES - sum(min(n, 2) for n in counts.values()))


def write(folder: Path) -> None:
    rng = np.random.default_rng(0)
    writer = DatasetWriter(folder, {}, overwrite=False, resume=False)
    names = []
    for start in range(0, SAMPLES, PER_SHARD):
        samples = []
        for i in range(start, start + PER_SHARD):
            shape = SHAPES[i % 3]
            latent = npy_bytes(rng.standard_normal(shape, np.float32))
            samples.append(Sample(f"s{i:04d}", {"txt": b"%d" % i, "json": b"{}", "latent.npy": latent}, shape))
        names.append(f"train-{start // PER_SHARD:06d}")
        writer.put(names[-1], samples)
    info = {"kind": "encoded", "modality": "image", "source": "noise", "licence": "", "channels": 3, "factor": 1}
    writer.finish({**info, "codec": {"kind": "pixels", "channels": 3, "factor": 1}, "text": None}, names, [])


def ours(root: Path, layout: Layout, state: Any, batch: int, steps: int) -> tuple[Batches, Any]:
    """Id and hash of every sample of the next global batches; the state is the number of the next one."""
    ranks, workers, accumulation = layout
    recipe = Recipe(
        model=ModelConfig(text_dim=0),
        data=DataConfig(path=str(root / "ours"), batch_size=batch, workers=workers, shuffle_shards=8),
        train=TrainConfig(accumulation=accumulation, device="cpu"),
    )
    at = state or 0
    loaders = [build_loader(recipe, at, rank, ranks) for rank in range(ranks)]
    batches = []
    for _ in range(steps):
        found = []
        for pack in (pack for loader in loaders for pack in next(loader)):
            for i, segment in enumerate(pack.segments):
                own = pack.patches["image"][pack.layout.patch_segment["image"] == i]
                found.append(f"{segment.sample_id} {hashlib.sha256(own.numpy().tobytes()).hexdigest()}")
        batches.append(sorted(found))
    return batches, at + steps


def account(engine: Engine, root: Path) -> Account:
    """Every layout from the start, then runs of which every piece has another layout."""
    found = Account()
    reference, _ = engine.run(root, (1, 0, 1), None, BATCH, TWO_EPOCHS)
    for layout in LAYOUTS:
        try:
            batches, _ = engine.run(root, layout, None, BATCH, TWO_EPOCHS)
        except Refused as error:
            found.start_refused += 1
            found.says[str(error)] += 1
            continue
        found.start_differing += batches != reference
        found.settle(batches)
    layouts, rng = list(LAYOUTS), random.Random(1)
    random.Random(0).shuffle(layouts)
    seen: Batches = []
    state = None
    for layout in layouts:
        steps = min(rng.randint(1, 3), TWO_EPOCHS - len(seen))
        try:
            batches, state = engine.run(root, layout, state, BATCH, steps)
        except Refused as error:
            found.refused += 1
            found.says[str(error)] += 1
            continue
        found.differing += sum(a != b for a, b in zip(batches, reference[len(seen) :], strict=False))
        seen += batches
        if len(seen) == TWO_EPOCHS:
            found.settle(seen)
            seen, state = [], None
    return found


def show(name: str, found: Account) -> None:
    tried = f"{found.layouts - found.start_refused - found.start_differing} of {found.layouts}"
    print(
        f"{name:<12}{tried:>12}{found.refused:>14}{found.differing:>12}{found.repeated:>10}{found.lost:>7}", flush=True
    )
    for text, count in found.says.most_common(4):
        print(f"{'':<12}  {count}× {' '.join(text.split())[:150]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write figures and conditions to this file")
    args = parser.parse_args()
    missing = [engine.name for engine in ENGINES if engine not in installed_engines()]
    print(f"not installed: {', '.join(missing) or 'none'}")
    print(f"{len(LAYOUTS)} layouts; {SAMPLES} samples an epoch, {BATCH} a global batch")
    print(f"{'':<12}{'same batches':>12}{'continuations':>14}{'batches':>12}{'repeated':>10}{'lost':>7}")
    print(f"{'':<12}{'at start':>12}{'refused':>14}{'that differ':>12}{'':>10}{'':>7}")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write(root / "ours")
        own = account(Engine("flagdit", "", "", lambda root: None, ours), root)
        show("flagdit", own)
        others = {}
        for engine in installed_engines():
            engine.write(root)
            others[engine.name] = account(engine, root)
            show(engine.name, others[engine.name])
    figures = {
        "repeated": own.repeated,
        "lost": own.lost,
        "layouts": own.layouts,
        "differing": own.start_differing + own.differing,
        "others": {name: {**asdict(a), "says": dict(a.says.most_common(4))} for name, a in others.items()},
    }
    if args.out:
        packages = tuple(engine.package for engine in installed_engines())
        write_result(args.out, figures, ("torch", *packages), samples=SAMPLES, batch=BATCH, missing=missing)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
