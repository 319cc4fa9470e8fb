"""Does a run see the same data under every layout? Ranks × loader processes × accumulation, stopped and continued.

    flagdit bench data_exactness

Two epochs of a small data set, cut at random batches, each piece under another layout: {1, 2, 3, 4, 8} ranks × {0, 1,
3} loader processes × {1, 2} micro-batches. A batch is compared by sample ids and bytes, over all ranks together. And
webdataset: what it repeats and loses when the number of ranks changes in the middle of an epoch. The last line is one
JSON object: samples repeated and lost over two epochs, layouts that were run, and batches that differ, all of this
project.
"""

import argparse
import hashlib
import json
import random
import tempfile
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
from _conditions import write_result

from flagdit.config.schema import DataConfig, ModelConfig, Recipe, TrainConfig
from flagdit.data_pipelines.loader import build_loader
from flagdit.data_pipelines.shards import Sample, npy_bytes
from flagdit.data_pipelines.writer import DatasetWriter

LAYOUTS = list(product((1, 2, 3, 4, 8), (0, 1, 3), (1, 2)))
BATCH, SAMPLES, PER_SHARD = 48, 144, 16
TWO_EPOCHS = 2 * SAMPLES // BATCH
SHAPES = ((3, 1, 4, 4), (3, 1, 8, 4), (3, 1, 8, 8))


def write(folder: Path) -> None:
    rng = np.random.default_rng(0)
    writer = DatasetWriter(folder, {}, overwrite=False, resume=False)
    names = []
    for start in range(0, SAMPLES, PER_SHARD):
        samples = []
        for i in range(start, start + PER_SHARD):
            shape = SHAPES[i % 3]
            latent = npy_bytes(rng.standard_normal(shape, np.float32))
            samples.append(Sample(f"s{i:04d}", {"txt": b"x", "json": b"{}", "latent.npy": latent}, shape))
        names.append(f"train-{start // PER_SHARD:06d}")
        writer.put(names[-1], samples)
    info = {"kind": "encoded", "modality": "image", "source": "noise", "licence": "", "channels": 3, "factor": 1}
    writer.finish({**info, "codec": {"kind": "pixels", "channels": 3, "factor": 1}, "text": None}, names, [])


def run(folder: Path, layout: tuple[int, int, int], start: int, stop: int) -> list[list[tuple[int, int, str]]]:
    """(epoch, id, hash) of every sample of each global batch."""
    ranks, workers, accumulation = layout
    recipe = Recipe(
        model=ModelConfig(text_dim=0),
        data=DataConfig(path=str(folder), batch_size=BATCH, workers=workers, shuffle_shards=3),
        train=TrainConfig(accumulation=accumulation, device="cpu"),
    )
    loaders = [build_loader(recipe, start, rank, ranks) for rank in range(ranks)]
    batches = []
    for _ in range(start, stop):
        found = []
        for pack in (pack for loader in loaders for pack in next(loader)):
            for i, segment in enumerate(pack.segments):
                own = pack.patches["image"][pack.layout.patch_segment["image"] == i]
                found.append((segment.epoch, segment.sample_id, hashlib.sha256(own.numpy().tobytes()).hexdigest()))
        batches.append(sorted(found))
    return batches


def ours(folder: Path) -> dict[str, int]:
    reference = run(folder, (1, 0, 1), 0, TWO_EPOCHS)
    counts = Counter((epoch, i) for batch in reference for epoch, i, _ in batch)
    layouts = list(LAYOUTS)
    random.Random(0).shuffle(layouts)
    rng, at, differing = random.Random(1), 0, 0
    for layout in layouts:
        stop = min(at + rng.randint(1, 3), TWO_EPOCHS)
        differing += sum(a != b for a, b in zip(run(folder, layout, at, stop), reference[at:stop], strict=True))
        at = stop % TWO_EPOCHS
    return {
        "repeated": sum(n - 1 for n in counts.values()),
        "lost": 2 * SAMPLES - len(counts),
        "layouts": len(layouts),
        "differing": differing,
    }


def webdataset(folder: Path) -> tuple[int, int]:
    """One epoch, half with two ranks and the rest with three: samples repeated and lost.

    Webdataset has no state: a continuation starts its shards again, split over the new number of ranks.
    """
    import webdataset as wds

    urls = sorted(str(p) for p in (folder / "shards").glob("*.tar"))
    seen: Counter[str] = Counter()
    for ranks, share in ((2, 0.5), (3, 0.5)):
        for rank in range(ranks):
            data = wds.WebDataset(urls[rank::ranks], shardshuffle=False, empty_check=False).shuffle(20, seed=0)
            keys = [sample["__key__"] for sample in data]
            seen.update(keys[: round(SAMPLES * share / ranks)])
    return sum(n - 1 for n in seen.values()), SAMPLES - len(seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write figures and conditions to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "set"
        write(folder)
        figures = ours(folder)
        print(f"{'':<22}{'repeated':>10}{'lost':>8}   (of {SAMPLES} samples an epoch)")
        print(f"{'flagdit':<22}{figures['repeated']:>10}{figures['lost']:>8}   {figures['layouts']} layouts, "
              f"{figures['differing']} batches differ")  # fmt: skip
        repeated, lost = webdataset(folder)
        print(f"{'webdataset':<22}{repeated:>10}{lost:>8}   stopped halfway at 2 ranks, continued at 3")
    if args.out:
        write_result(args.out, figures, ("torch", "webdataset"))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
