"""Samples per second from shards to collated packs, beside webdataset, MosaicML Streaming, LitData and Energon.

    flagdit bench data_throughput [--rounds 5] [--workers 1]

The same samples for all: cached latents of 8 KB and of 128 KB. All read from the page cache with the same number of
loader processes, one after another in every round; the figure is the median over the rounds of the ratio to the best of
the others in the same round. Each loader shuffles as it does by default and gives batches of 32 as tensors; this
project's also checks every sample's checksum, cuts the latents into patches and lays out the pack. Peers that are not
installed are named and left out. The last line is one JSON object:
latents_8k_ratio, latents_128k_ratio; jpeg_ratio and jpeg_psnr (decoding and resizing with scaled drafts, against a full
decode with Pillow, which is what every peer's loader does).
"""

import argparse
import io
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from _conditions import write_result
from _peers import PEERS, installed
from PIL import Image

from flagdit.config.schema import DataConfig, ModelConfig, Recipe, TrainConfig
from flagdit.data_pipelines.loader import build_loader
from flagdit.data_pipelines.pictures import decode_at, decode_picture, resize_cover
from flagdit.data_pipelines.shards import Sample, npy_bytes
from flagdit.data_pipelines.writer import DatasetWriter

BATCH, PER_SHARD = 32, 500
SIZES = {"latents_8k": (8, 1, 16, 16), "latents_128k": (8, 1, 64, 64)}
SIDE, BUCKET = 1024, (256, 192)

Loader = Callable[[], Iterator]


def write_latents(root: Path, shape: tuple[int, int, int, int], count: int) -> None:
    """One data set as this project's shards and as each peer's own."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape, np.float32) for _ in range(64)]
    stored = [npy_bytes(a) for a in arrays]
    files = [{"txt": f"caption {i}".encode(), "json": b"{}", "latent.npy": stored[i % 64]} for i in range(count)]
    writer = DatasetWriter(root / "ours", {}, overwrite=False, resume=False)
    names = []
    for start in range(0, count, PER_SHARD):
        names.append(f"train-{start // PER_SHARD:06d}")
        samples = [Sample(f"s{i:06d}", files[i], shape) for i in range(start, min(start + PER_SHARD, count))]
        writer.put(names[-1], samples)
    info = {"kind": "encoded", "modality": "image", "source": "noise", "licence": "", "channels": shape[0], "factor": 1}
    writer.finish({**info, "codec": {"kind": "haar", "channels": 12, "factor": 2}, "text": None}, names, [])


def ours(root: Path, channels: int, workers: int) -> Iterator:
    recipe = Recipe(
        model=ModelConfig(modalities={"image": channels}, text_dim=0),
        data=DataConfig(path=str(root / "ours"), batch_size=BATCH, workers=workers),
        train=TrainConfig(device="cpu"),
    )
    from unittest.mock import patch

    with patch("flagdit.data_pipelines.loader.check_training"):  # the noise was made by no codec
        loader = build_loader(recipe)
    for packs in loader:
        yield sum(len(p.segments) for p in packs)


def rate(loader: Iterator, seconds: float) -> float:
    """Samples per second once it runs."""
    for _ in islice(loader, 3):
        pass
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        count += int(next(loader))
    return count / (time.perf_counter() - start)


def latents(name: str, rounds: int, workers: int, seconds: float) -> float:
    shape = SIZES[name]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_latents(root, shape, 4000 if math.prod(shape) < 10_000 else 1500)
        loaders: dict[str, Loader] = {"flagdit": partial(ours, root, shape[0], workers)}
        for peer in installed():
            peer.write(root, shape)
            loaders[peer.name] = partial(peer.load, root, workers, BATCH)
        return compare(name, loaders, rounds, seconds)


def compare(name: str, loaders: dict[str, Loader], rounds: int, seconds: float) -> float:
    """Median over rounds of our rate over the best other rate of the same round."""
    ratios, rates = [], {n: [] for n in loaders}
    for number in range(rounds):
        turn = list(loaders)[number % len(loaders) :] + list(loaders)[: number % len(loaders)]
        measured = {n: rate(loaders[n](), seconds) for n in turn}
        for n, r in measured.items():
            rates[n].append(r)
        ratios.append(measured["flagdit"] / max(r for n, r in measured.items() if n != "flagdit"))
    shown = "   ".join(f"{n} {statistics.median(r):,.0f}/s" for n, r in rates.items())
    print(f"{name}: {shown}   ratio {statistics.median(ratios):.2f}", flush=True)
    return statistics.median(ratios)


def photograph(seed: int) -> bytes:
    """A JPEG with the smooth areas, edges and grain of a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((SIDE, SIDE * 3 // 4), Image.BICUBIC)
    pixels = np.asarray(coarse).astype(np.float32)
    y, x = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
    for _ in range(12):
        inside = (x - rng.integers(SIDE)) ** 2 + (y - rng.integers(SIDE)) ** 2 < rng.integers(20, 200) ** 2
        pixels[inside] = pixels[inside] * 0.4 + rng.integers(0, 256, 3) * 0.6
    pixels += rng.normal(0, 4, pixels.shape)
    stream = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def full(data: bytes) -> np.ndarray:
    return np.asarray(resize_cover(decode_picture(data), *BUCKET))


def drafted(data: bytes) -> np.ndarray:
    return np.asarray(resize_cover(decode_at(data, lambda w, h: BUCKET)[0], *BUCKET))


def jpegs(rounds: int) -> tuple[float, float]:
    """Speed of drafts over full decodes, and the PSNR between their results."""
    files = [photograph(i) for i in range(24)]
    error = np.mean([((full(f).astype(float) - drafted(f)) ** 2).mean() for f in files])
    ratios = []
    for _ in range(rounds):
        times = []
        for decode in (full, drafted):
            start = time.perf_counter()
            for file in files:
                decode(file)
            times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1])
    psnr = 10 * math.log10(255**2 / error)
    ratio = statistics.median(ratios)
    print(f"JPEG {SIDE}×{SIDE * 3 // 4} to {BUCKET[0]}×{BUCKET[1]}: drafts {ratio:.2f} times as fast, {psnr:.1f} dB")
    return ratio, psnr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.5, help="measured for each loader in each round")
    parser.add_argument("--out", type=Path, help="also write figures and conditions to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    missing = [p.name for p in PEERS if p not in installed()]
    print(f"not installed: {', '.join(missing) or 'none'}")
    figures = {f"{n}_ratio": round(latents(n, args.rounds, args.workers, args.seconds), 3) for n in SIZES}
    decode, psnr = jpegs(args.rounds)
    figures |= {"jpeg_ratio": round(decode, 3), "jpeg_psnr": round(psnr, 2)}
    if args.out:
        write_result(
            args.out, figures, ("torch", *(p.package for p in installed())), workers=args.workers, missing=missing
        )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
