"""Other projects' loaders, each on its own format of the same latents, as its documentation says to use it.

`pip install webdataset mosaicml-streaming litdata megatron-energon` in the environment of the benchmark; who is not
there is left out.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from flagdit.data_pipelines.index import Dataset
from flagdit.data_pipelines.shards import read_npy

BUFFER = 1000  # samples that are shuffled together


@dataclass(frozen=True)
class Peer:
    """One loader.

    Attributes:
        write: (root, shape of latents) → its copy of the data set in ROOT/ours.
        load: (root, loader processes, samples of a batch) → endless sizes of batches.
    """

    name: str
    module: str
    package: str
    write: Callable[[Path, tuple[int, ...]], None]
    load: Callable[[Path, int, int], Iterator[int]]


def samples(root: Path) -> Iterator[tuple[np.ndarray, str]]:
    """Latent and caption of every sample."""
    dataset = Dataset.open(root / "ours")
    for i in range(len(dataset)):
        members = dataset.members(i)
        yield read_npy(members["latent.npy"]), bytes(members["txt"]).decode()


def shards(root: Path) -> Path:
    return root / "ours/shards"


def collated(latents: list) -> int:
    # Copies, as the arrays may be read-only views of a mapped shard.
    return len(torch.stack([torch.from_numpy(np.array(x)) for x in latents]))


def named(batch: list) -> int:
    return collated([sample["latent"] for sample in batch])


def webdataset_load(root: Path, workers: int, batch: int) -> Iterator[int]:
    import webdataset

    urls = sorted(str(p) for p in shards(root).glob("*.tar"))
    data = webdataset.WebDataset(urls, shardshuffle=len(urls), resampled=True).shuffle(BUFFER).decode()
    data = data.to_tuple("latent.npy", "txt").batched(batch, collation_fn=lambda rows: collated([r[0] for r in rows]))
    yield from webdataset.WebLoader(data, batch_size=None, num_workers=workers)


def streaming_write(root: Path, shape: tuple[int, ...]) -> None:
    from streaming import MDSWriter

    columns = {"latent": f"ndarray:float32:{','.join(map(str, shape))}", "txt": "str"}
    with MDSWriter(out=str(root / "mds"), columns=columns, size_limit=1 << 26) as mds:
        for latent, text in samples(root):
            mds.write({"latent": latent, "txt": text})


def streaming_load(root: Path, workers: int, batch: int) -> Iterator[int]:
    from streaming import StreamingDataset

    data = StreamingDataset(local=str(root / "mds"), shuffle=True, batch_size=batch)
    while True:
        yield from torch.utils.data.DataLoader(data, batch_size=batch, num_workers=workers, collate_fn=named)


def litdata_write(root: Path, shape: tuple[int, ...]) -> None:
    from litdata.streaming.writer import BinaryWriter

    lit = BinaryWriter(str(root / "lit"), chunk_bytes=max(1 << 26, 8 * math.prod(shape)))
    for i, (latent, text) in enumerate(samples(root)):
        lit[i] = {"latent": torch.from_numpy(latent.copy()), "txt": text}
    lit.done()
    lit.merge()


def litdata_load(root: Path, workers: int, batch: int) -> Iterator[int]:
    from litdata import StreamingDataLoader, StreamingDataset

    data = StreamingDataset(str(root / "lit"), shuffle=True)
    while True:
        yield from StreamingDataLoader(data, batch_size=batch, num_workers=workers, collate_fn=named)


def energon_write(root: Path, shape: tuple[int, ...]) -> None:
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    names = sorted(p.name for p in shards(root).glob("*.tar"))
    WebdatasetPreparator.prepare_dataset(shards(root), names, split_parts_ratio=[("train", 1.0)], workers=1)
    about = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
    (shards(root) / ".nv-meta/dataset.yaml").write_text(about)


def energon_load(root: Path, workers: int, batch: int) -> Iterator[int]:
    from megatron.energon import DefaultTaskEncoder, WorkerConfig, get_savable_loader, get_train_dataset, stateless
    from megatron.energon.task_encoder.cooking import Cooker

    @stateless
    def cook(sample: dict) -> dict:
        return sample

    class Latents(DefaultTaskEncoder):
        cookers = (Cooker(cook),)

        @stateless
        def batch(self, rows: list[dict]) -> int:
            return collated([row["latent.npy"] for row in rows])

    data = get_train_dataset(
        shards(root),
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=workers),
        batch_size=batch,
        shuffle_buffer_size=BUFFER,
        max_samples_per_sequence=100,
        task_encoder=Latents(),
    )
    yield from get_savable_loader(data)


def _nothing(root: Path, shape: tuple[int, ...]) -> None:
    """Reads this project's shards as they are."""


PEERS = (
    Peer("webdataset", "webdataset", "webdataset", _nothing, webdataset_load),
    Peer("streaming", "streaming", "mosaicml-streaming", streaming_write, streaming_load),
    Peer("litdata", "litdata", "litdata", litdata_write, litdata_load),
    Peer("energon", "megatron.energon", "megatron-energon", energon_write, energon_load),
)


def installed() -> list[Peer]:
    return [peer for peer in PEERS if _there(peer.module)]


def _there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
