"""How full the packs of a token budget are, and what planning them costs.

    flagdit bench packing_waste [--budget 65536]

Four mixes, each a synthetic index of latents (8 pixels and patches of 2 per token): pictures of 256² to 1024² pixels,
pictures of 512² in many aspect ratios, clips of 16 to 128 frames of 256², and all of these with sound together. Waste
is the share of the budget that packs leave empty, over 1024 packs; imbalance is the slowest of eight ranks' attention
cost (Σ n²) over the mean, averaged over micro-batches. The last line is one JSON object: max_waste, and packing_share,
the share of planning in the time of a loader that reads small samples (64 tokens of 8 KB) in the training process.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from _conditions import write_result

from flagdit.config.schema import DataConfig, ModelConfig, Recipe, TrainConfig
from flagdit.data_pipelines.batches import Batches
from flagdit.data_pipelines.index import COLUMNS
from flagdit.data_pipelines.mixture import Mixture
from flagdit.data_pipelines.packs import PackReader
from flagdit.data_pipelines.shards import Sample, npy_bytes
from flagdit.data_pipelines.writer import DatasetWriter

SAMPLES, PER_SHARD, PACKS, BATCH = 100_000, 1000, 1024, 32
RANKS = 8


def pictures(rng: np.random.Generator, count: int) -> np.ndarray:
    side = rng.choice([32, 40, 48, 64, 80, 96, 112, 128], count)
    return np.stack([np.full(count, 4), np.ones(count), side, side], 1)


def aspects(rng: np.random.Generator, count: int) -> np.ndarray:
    ratio = np.exp(rng.normal(0, 0.4, count).clip(-1, 1))
    width = (32 * np.sqrt(ratio)).round() * 2
    return np.stack([np.full(count, 4), np.ones(count), (4096 / width / 2).astype(int) * 2, width], 1)


def clips(rng: np.random.Generator, count: int) -> np.ndarray:
    frames = rng.integers(16, 129, count)
    return np.stack([np.full(count, 4), frames, np.full(count, 32), np.full(count, 32)], 1)


def sounds(rng: np.random.Generator, count: int) -> np.ndarray:
    columns = rng.integers(8, 128, count) * 8
    return np.stack([np.ones(count), np.ones(count), np.full(count, 32), columns], 1)


KINDS = {"image": pictures, "aspects": aspects, "video": clips, "audio": sounds}
MIXES = {
    "pictures of 256² to 1024²": {"image": 1.0},
    "pictures of 512², many aspects": {"aspects": 1.0},
    "clips of 16 to 128 frames": {"video": 1.0},
    "all together": {"image": 0.4, "aspects": 0.3, "video": 0.1, "audio": 0.2},
}


def index_only(folder: Path, shapes: np.ndarray, modality: str) -> None:
    """A data set whose shards are empty: planning reads the index alone."""
    (folder / "index").mkdir(parents=True)
    (folder / "shards").mkdir()
    count = len(shapes)
    for name in COLUMNS:
        column = np.zeros(count, np.int64) if name != "key" else np.zeros(count, "S1")
        np.save(folder / "index" / f"{name}.npy", shapes.astype(np.int32) if name == "shape" else column)
    shards = [[f"train-{i:06d}", PER_SHARD] for i in range(count // PER_SHARD)]
    for name, _ in shards:
        (folder / "shards" / f"{name}.tar").touch()
    info = {"format": 1, "kind": "encoded", "modality": modality, "samples": count, "splits": {"train": [0, count]}}
    (folder / "dataset.json").write_text(json.dumps({**info, "shards": shards, "shapes": [], "content": ""}))


def recipe_of(sets: dict[str, float], budget: int, batch: int) -> Recipe:
    return Recipe(
        model=ModelConfig(modalities={"image": 4, "video": 4, "audio": 1}, text_dim=0),
        data=DataConfig(sets=sets, pack_tokens=budget, batch_size=batch),
        train=TrainConfig(device="cpu"),
    )


def waste(sets: dict[str, float], budget: int) -> tuple[float, float, float]:
    """Share of the budget left empty, imbalance over ranks, and the longest pack over the budget."""
    made = Batches(recipe_of(sets, budget, BATCH), Mixture(sets))
    loads, imbalances = [], []
    for k in range(PACKS // BATCH):
        for shares in made.shared(k, BATCH // RANKS, RANKS):
            costs = np.array([p.cost for p in shares], np.float64)
            imbalances.append(costs.max() / costs.mean())
            loads += [int(p.tokens.sum()) for p in shares]
    return 1 - np.mean(loads) / budget, float(np.mean(imbalances)), max(loads) / budget


def planning_share(root: Path, budget: int) -> float:
    """Planning over all of what a loader does, planning and reading, on real shards of 64-token latents of 8 KB."""
    writer = DatasetWriter(root / "small", {}, overwrite=False, resume=False)
    rng = np.random.default_rng(0)
    names = []
    for shard in range(8):
        latents = [npy_bytes(rng.standard_normal((8, 1, 16, 16), np.float32)) for _ in range(PER_SHARD)]
        files = [{"txt": b"x", "json": b"{}", "latent.npy": x} for x in latents]
        names.append(f"train-{shard:06d}")
        writer.put(names[-1], [Sample(f"{shard}-{i}", f, (8, 1, 16, 16)) for i, f in enumerate(files)])
    info = {"kind": "encoded", "modality": "image", "source": "noise", "licence": "", "channels": 8, "factor": 1}
    writer.finish({**info, "codec": {"kind": "pixels", "channels": 3, "factor": 1}, "text": None}, names, [])
    recipe = recipe_of({str(root / "small"): 1.0}, budget, 8)
    mixture = Mixture(recipe.data.sets)
    batches, reader = Batches(recipe, mixture), PackReader(recipe, mixture)
    planning = reading = 0.0
    for k in range(48):
        start = time.perf_counter()
        parts = [shares[0] for shares in batches.shared(k, 8, 1)]
        middle = time.perf_counter()
        reader[k, parts]
        reading += time.perf_counter() - middle
        planning += middle - start
    return planning / (planning + reading)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=int, default=65536, help="tokens of a pack")
    parser.add_argument("--out", type=Path, help="also write figures and conditions to this file")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, make in KINDS.items():
            index_only(root / name, make(rng, SAMPLES), name if name != "aspects" else "image")
        print(f"packs of {args.budget} tokens{'waste':>26}{'imbalance':>12}{'fullest':>10}")
        for name, mix in MIXES.items():
            empty, imbalance, fullest = waste({str(root / k): w for k, w in mix.items()}, args.budget)
            found[name] = empty
            print(f"{name:<34}{empty:>14.2%}{imbalance:>12.3f}{fullest:>10.4f}", flush=True)
        share = planning_share(root, args.budget // 16)
        print(f"planning: {share:.2%} of the loader's time")
    figures = {"max_waste": round(max(found.values()), 5), "packing_share": round(share, 5)}
    if args.out:
        write_result(args.out, figures, ("numpy",), budget=args.budget)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
