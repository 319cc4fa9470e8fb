"""Other projects' loaders, each on its own format of the same samples, as its documentation says to use it.

`pip install webdataset mosaicml-streaming litdata megatron-energon` in the environment of the benchmark; who is not
there is left out.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from flagdit.data_pipelines.index import Dataset
from flagdit.data_pipelines.shards import read_npy

BUFFER = 1000  # samples that are shuffled together


@dataclass(frozen=True)
class Task:
    """What is loaded.

    Attributes:
        ending: of the file in ROOT/ours/shards that holds a sample's media.
        stored: the file → what the peers store in their own formats.
        column: how MosaicML Streaming is told to store it.
        tensor: what a peer gives back of it → the tensor of one sample.
    """

    ending: str
    stored: Callable[[memoryview], Any]
    column: str
    tensor: Callable[[Any], torch.Tensor]


def latents_task(shape: tuple[int, ...]) -> Task:
    """fp32 latents as arrays. Copied, as they may be read-only views of a mapped shard."""
    column = f"ndarray:float32:{','.join(map(str, shape))}"
    return Task("latent.npy", read_npy, column, lambda array: torch.from_numpy(np.array(array)))


def jpeg_task(width: int, height: int) -> Task:
    """JPEG files, to (3, height, width) fp32 in [−1, 1]: decoded with Pillow, cut and resized."""
    return Task("jpg", bytes, "bytes", partial(decoded, size=(width, height)))


def decoded(file: bytes | Image.Image, size: tuple[int, int]) -> torch.Tensor:
    picture = file if isinstance(file, Image.Image) else Image.open(io.BytesIO(file)).convert("RGB")
    pixels = np.array(ImageOps.fit(picture, size, Image.Resampling.LANCZOS))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1


@dataclass(frozen=True)
class Peer:
    """One loader.

    Attributes:
        write: (root, task) → its copy of the data set in ROOT/ours.
        load: (root, task, loader processes, samples of a batch) → endless batches, each one tensor, in this process.
    """

    name: str
    module: str
    package: str
    write: Callable[[Path, Task], None]
    load: Callable[[Path, Task, int, int], Iterator[torch.Tensor]]


def samples(root: Path, task: Task) -> Iterator[tuple[Any, str]]:
    """Media and caption of every sample."""
    dataset = Dataset.open(root / "ours", None)
    for i in range(len(dataset)):
        members = dataset.members(i)
        yield task.stored(members[task.ending]), bytes(members["txt"]).decode()


def shards(root: Path) -> Path:
    return root / "ours/shards"


class Collate:
    """Media of a batch → one tensor."""

    def __init__(self, task: Task, name: str | int):
        self.task, self.name = task, name

    def __call__(self, batch: list) -> torch.Tensor:
        return torch.stack([self.task.tensor(sample[self.name]) for sample in batch])


def webdataset_load(root: Path, task: Task, workers: int, batch: int) -> Iterator[torch.Tensor]:
    import webdataset

    urls = sorted(str(p) for p in shards(root).glob("*.tar"))
    data = webdataset.WebDataset(urls, shardshuffle=len(urls), resampled=True).shuffle(BUFFER).decode()
    data = data.to_tuple(task.ending, "txt").batched(batch, collation_fn=Collate(task, 0))
    yield from webdataset.WebLoader(data, batch_size=None, num_workers=workers)


def streaming_write(root: Path, task: Task) -> None:
    from streaming import MDSWriter

    columns = {"media": task.column, "txt": "str"}
    with MDSWriter(out=str(root / "mds"), columns=columns, size_limit=1 << 26) as mds:
        for media, text in samples(root, task):
            mds.write({"media": media, "txt": text})


def streaming_load(root: Path, task: Task, workers: int, batch: int) -> Iterator[torch.Tensor]:
    from streaming import StreamingDataset

    data = StreamingDataset(local=str(root / "mds"), shuffle=True, batch_size=batch)
    collate = Collate(task, "media")
    while True:
        yield from torch.utils.data.DataLoader(data, batch_size=batch, num_workers=workers, collate_fn=collate)


def litdata_write(root: Path, task: Task) -> None:
    from litdata.streaming.writer import BinaryWriter

    largest = int(Dataset.open(root / "ours", None).columns["nbytes"].max())
    lit = BinaryWriter(str(root / "lit"), chunk_bytes=max(1 << 26, 8 * largest))
    for i, (media, text) in enumerate(samples(root, task)):
        lit[i] = {"media": torch.from_numpy(media.copy()) if isinstance(media, np.ndarray) else media, "txt": text}
    lit.done()
    lit.merge()


def litdata_load(root: Path, task: Task, workers: int, batch: int) -> Iterator[torch.Tensor]:
    from litdata import StreamingDataLoader, StreamingDataset

    data = StreamingDataset(str(root / "lit"), shuffle=True)
    while True:
        yield from StreamingDataLoader(data, batch_size=batch, num_workers=workers, collate_fn=Collate(task, "media"))


def energon_write(root: Path, task: Task | None = None) -> None:
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    names = sorted(p.name for p in shards(root).glob("*.tar"))
    WebdatasetPreparator.prepare_dataset(shards(root), names, split_parts_ratio=[("train", 1.0)], workers=1)
    about = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
    (shards(root) / ".nv-meta/dataset.yaml").write_text(about)


def energon_load(root: Path, task: Task, workers: int, batch: int) -> Iterator[torch.Tensor]:
    from megatron.energon import (
        DefaultTaskEncoder,
        SampleDecoder,
        WorkerConfig,
        get_savable_loader,
        get_train_dataset,
        stateless,
    )
    from megatron.energon.task_encoder.cooking import Cooker

    collate = Collate(task, task.ending)

    @stateless
    def cook(sample: dict) -> dict:
        return sample

    class Media(DefaultTaskEncoder):
        cookers = (Cooker(cook),)
        decoder = SampleDecoder(image_decode="pilrgb")

        @stateless
        def batch(self, rows: list[dict]) -> torch.Tensor:
            return collate(rows)

    data = get_train_dataset(
        shards(root),
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=workers),
        batch_size=batch,
        shuffle_buffer_size=BUFFER,
        max_samples_per_sequence=100,
        task_encoder=Media(),
    )
    yield from get_savable_loader(data)


def _nothing(root: Path, task: Task) -> None:
    """Reads this project's shards as they are."""


PEERS = (
    Peer("webdataset", "webdataset", "webdataset", _nothing, webdataset_load),
    Peer("streaming", "streaming", "mosaicml-streaming", streaming_write, streaming_load),
    Peer("litdata", "litdata", "litdata", litdata_write, litdata_load),
    Peer("energon", "megatron.energon", "megatron-energon", energon_write, energon_load),
)


def installed() -> list[Peer]:
    return [peer for peer in PEERS if is_there(peer.module)]


def is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
