"""Encoded data sets of noise, made in a moment, for tests of order, packing and mixtures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flagdit.config.schema import DataConfig, ModelConfig, Recipe, TrainConfig
from flagdit.data_pipelines.index import Dataset
from flagdit.data_pipelines.shards import Sample, npy_bytes
from flagdit.data_pipelines.writer import DatasetWriter

PIXELS = {"kind": "pixels", "channels": 3, "factor": 1}
SHAPES = ((3, 1, 4, 4), (3, 1, 4, 8), (3, 1, 8, 4), (3, 1, 8, 8))


def make_set(
    out: Path,
    count: int,
    *,
    modality: str = "image",
    shapes: Sequence[tuple[int, int, int, int]] = SHAPES,
    per_shard: int = 7,
    heldout: int = 0,
    seed: int = 0,
    by_length: bool = False,
) -> Dataset:
    """An encoded data set of `count` samples without text, their shapes drawn from `shapes`; the first shape's samples
    come first if `by_length`, else all mixed."""
    rng = np.random.default_rng(seed)
    writer = DatasetWriter(out, {"synthetic": [count, modality, seed]}, overwrite=False, resume=False)
    names = []
    drawn = rng.integers(len(shapes), size=count)
    drawn = np.sort(drawn) if by_length else drawn
    for split, number in (("train", count - heldout), ("heldout", heldout)):
        for start in range(0, number, per_shard):
            name = f"{split}-{start // per_shard:06d}"
            samples = []
            for i in range(start, min(start + per_shard, number)):
                shape = shapes[drawn[i]]
                files = {
                    "txt": b"noise",
                    "json": b"{}",
                    "latent.npy": npy_bytes(rng.standard_normal(shape, np.float32)),
                }
                samples.append(Sample(f"{split}{i:05d}", files, shape, 0, i % 3))
            writer.put(name, samples)
            names.append(name)
    info = {"kind": "encoded", "modality": modality, "source": "noise", "licence": "", "codec": PIXELS}
    return writer.finish({**info, "text": None, "channels": shapes[0][0], "factor": 1}, names, [])


def recipe_for(
    sets: dict[str, float], *, accumulation: int = 1, patch_size: int = 2, model: dict | None = None, **data: object
) -> Recipe:
    """A recipe that trains on such sets."""
    return Recipe(
        model=ModelConfig(modalities={"image": 3, "video": 3}, patch_size=patch_size, text_dim=0, **(model or {})),
        data=DataConfig(sets=sets, **data),  # type: ignore[arg-type]
        train=TrainConfig(accumulation=accumulation, device="cpu"),
    )
