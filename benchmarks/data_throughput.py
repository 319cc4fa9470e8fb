"""Samples per second from shards to collated packs, beside webdataset, MosaicML Streaming, LitData and Energon.

    flagdit bench data_throughput [--rounds 5] [--workers 1]

The same samples for all: cached latents of 8 KB and of 128 KB, and JPEG photographs of 1024×768 px that are decoded,
cut and resized to a bucket of 256×192. All read from the page cache with the same number of loader processes, one after
another in every round; the figure is the median over the rounds of the ratio to the best of the others in the same
round. Each loader shuffles as it does by default and hands batches of 32 to this process, as fp32 tensors; this
project's also checks every sample's checksum, cuts the samples into patches and lays out the pack. The others decode
pictures with Pillow, fully; this project decodes them at a lower resolution that the format offers. Peers that are not
installed are named and left out. The last line is one JSON object: latents_8k_ratio,
latents_128k_ratio, jpeg_ratio; and of the decoding alone, against a full decode with Pillow: jpeg_decode_ratio and
jpeg_psnr, in dB, of the results.
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
from unittest.mock import patch

import numpy as np
import torch
from _conditions import write_result
from _peers import PEERS, installed, jpeg_task, latents_task
from PIL import Image, ImageOps

from flagdit.config.schema import DataConfig, ModelConfig, Recipe, TrainConfig
from flagdit.data_pipelines.build import build_dataset
from flagdit.data_pipelines.loader import build_loader
from flagdit.data_pipelines.pictures import read_jpeg
from flagdit.data_pipelines.shards import Sample, npy_bytes, write_shard
from flagdit.data_pipelines.writer import DatasetWriter

BATCH, PER_SHARD = 32, 500
SIZES = {"latents_8k": (8, 1, 16, 16), "latents_128k": (8, 1, 64, 64)}
SIDE, BUCKET = 1024, (256, 192)
PHOTOGRAPHS, FILES = 24, 640  # different ones, and files made of them

Loader = Callable[[], Iterator]


def write_latents(root: Path, shape: tuple[int, int, int, int], count: int) -> None:
    """Noise, as this project's encoded data set."""
    rng = np.random.default_rng(0)
    stored = [npy_bytes(rng.standard_normal(shape, np.float32)) for _ in range(64)]
    files = [{"txt": f"caption {i}".encode(), "json": b"{}", "latent.npy": stored[i % 64]} for i in range(count)]
    writer = DatasetWriter(root / "ours", {}, overwrite=False, resume=False)
    names = []
    for start in range(0, count, PER_SHARD):
        names.append(f"train-{start // PER_SHARD:06d}")
        samples = [Sample(f"s{i:06d}", files[i], shape) for i in range(start, min(start + PER_SHARD, count))]
        writer.put(names[-1], samples)
    info = {"kind": "encoded", "modality": "image", "source": "noise", "licence": "", "channels": shape[0], "factor": 1}
    writer.finish({**info, "codec": {"kind": "haar", "channels": 12, "factor": 2}, "text": None}, names, [])


def write_photographs(root: Path) -> None:
    """A tar of JPEG files with captions, as this project's raw data set that keeps them as they are."""
    photographs = [photograph(i) for i in range(PHOTOGRAPHS)]
    files = [{"jpg": photographs[i % PHOTOGRAPHS], "txt": f"caption {i}".encode()} for i in range(FILES)]
    (root / "given").mkdir()
    write_shard(root / "given/photographs.tar", (Sample(f"s{i:06d}", f, (3, 1, 1, 1)) for i, f in enumerate(files)))
    side = math.isqrt(math.prod(BUCKET)) // 16 * 16 + 16
    built = build_dataset(
        "tar", root / "ours", src=root / "given", size=side, multiple=16, keep_jpeg=True, shard_samples=100
    )
    assert built.shapes == [((3, 1, BUCKET[1], BUCKET[0]), FILES)], built.shapes


def ours(root: Path, channels: int, workers: int) -> Iterator:
    recipe = Recipe(
        model=ModelConfig(modalities={"image": channels}, text_dim=0),
        data=DataConfig(path=str(root / "ours"), batch_size=BATCH, workers=workers),
        train=TrainConfig(device="cpu"),
    )
    with patch("flagdit.data_pipelines.loader.check_training"):  # the noise was made by no codec
        loader = build_loader(recipe)
    for (pack,) in loader:
        yield pack.segments


def rate(loader: Iterator, seconds: float) -> float:
    """Samples per second once it runs."""
    for _ in islice(loader, 3):
        pass
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        count += len(next(loader))
    return count / (time.perf_counter() - start)


def measure(name: str, rounds: int, workers: int, seconds: float) -> float:
    """The ratio of one kind of samples."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if name == "jpeg":
            write_photographs(root)
            task, channels, seconds = jpeg_task(*BUCKET), 3, 2 * seconds
        else:
            shape = SIZES[name]
            write_latents(root, shape, 4000 if math.prod(shape) < 10_000 else 1500)
            task, channels = latents_task(shape), shape[0]
        loaders: dict[str, Loader] = {"flagdit": partial(ours, root, channels, workers)}
        for peer in installed():
            peer.write(root, task)
            loaders[peer.name] = partial(peer.load, root, task, workers, BATCH)
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
    return np.asarray(ImageOps.fit(Image.open(io.BytesIO(data)).convert("RGB"), BUCKET, Image.Resampling.LANCZOS))


def drafted(data: bytes) -> np.ndarray:
    return np.asarray(read_jpeg(data, *BUCKET))


def decoding(rounds: int) -> tuple[float, float]:
    """Speed of drafts over full decodes, and the PSNR between their results."""
    files = [photograph(i) for i in range(PHOTOGRAPHS)]
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
    kinds = (*SIZES, "jpeg")
    figures = {f"{n}_ratio": round(measure(n, args.rounds, args.workers, args.seconds), 3) for n in kinds}
    ratio, psnr = decoding(args.rounds)
    figures |= {"jpeg_decode_ratio": round(ratio, 3), "jpeg_psnr": round(psnr, 2)}
    if args.out:
        write_result(
            args.out, figures, ("torch", *(p.package for p in installed())), workers=args.workers, missing=missing
        )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
