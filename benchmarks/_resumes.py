"""Other projects' loaders, stopped and continued under another layout as their documentation says to do it.

`pip install webdataset mosaicml-streaming megatron-energon` in the environment of the benchmark; who is not there is
left out. All are told to give batches of equally many samples; samples are named by their captions.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import queue
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from _peers import energon_write, is_there, latents_task, samples

Layout = tuple[int, int, int]
"""Ranks, loader processes of each, micro-batches of a step."""
Batches = list[list[str]]
PATIENCE = 300.0  # seconds that the ranks of one piece may take


class Refused(Exception):
    """The loader does not run or continue under this layout; the message is its own."""


@dataclass(frozen=True)
class Engine:
    """One loader.

    Attributes:
        module, package: without it the loader is left out.
        write: root → its copy of the data set in ROOT/ours.
        run: (root, layout, state or None at the start, samples of a global batch, number of batches) → the samples of
            each global batch, and the state after them. Raises Refused.
    """

    name: str
    module: str
    package: str
    write: Callable[[Path], None]
    run: Callable[[Path, Layout, Any, int, int], tuple[Batches, Any]]


def joined(of_ranks: list[Batches], accumulation: int) -> Batches:
    """The micro-batches of every rank as global batches."""
    steps = len(of_ranks[0]) // accumulation
    parts = [[rank[k * accumulation : (k + 1) * accumulation] for rank in of_ranks] for k in range(steps)]
    return [sorted(chain.from_iterable(chain.from_iterable(ranks))) for ranks in parts]


@contextmanager
def environment(**values: object) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: str(value) for name, value in values.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def webdataset_run(root: Path, layout: Layout, state: Any, batch: int, steps: int) -> tuple[Batches, Any]:
    """It has no state: a continuation starts with the shards again, in another order."""
    import webdataset

    ranks, workers, accumulation = layout
    urls = sorted(str(p) for p in (root / "ours/shards").glob("*.tar"))
    starts, of_ranks = state or 0, []
    for rank in range(ranks):
        with environment(RANK=rank, WORLD_SIZE=ranks):
            data = webdataset.WebDataset(
                urls, shardshuffle=len(urls), detshuffle=True, seed=starts, nodesplitter=webdataset.split_by_node
            )
            data = data.decode().map(lambda sample: sample["txt"])
            data = data.batched(batch // (ranks * accumulation), collation_fn=list).repeat()
            loader = webdataset.WebLoader(data, batch_size=None, num_workers=workers)
            of_ranks.append(list(islice(loader, steps * accumulation)))
    return joined(of_ranks, accumulation), starts + 1


def streaming_write(root: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(root / "mds"), columns={"txt": "str", "latent": "bytes"}, size_limit=1 << 13) as mds:
        for latent, text in samples(root, latents_task(())):
            mds.write({"txt": text, "latent": latent.tobytes()})


def in_ranks(of_rank: Callable[..., tuple[Batches, Any]], layout: Layout, *arguments: Any) -> list[tuple[Batches, Any]]:
    """What `of_rank(rank, layout, *arguments)` returns in a process of its own for every rank.

    Raises:
        Refused: with what the first one that failed says.
    """
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=_rank, args=(of_rank, r, layout, arguments, results)) for r in range(layout[0])]
    for process in ranks:
        process.start()
    try:
        found = dict(pickle.loads(results.get(timeout=PATIENCE)) for _ in ranks)
    except queue.Empty:
        raise Refused(f"no answer in {PATIENCE:g} s") from None
    finally:
        for process in ranks:
            process.join(5)
            process.kill()
    for value in found.values():
        if isinstance(value, str):
            raise Refused(value)
    return [found[rank] for rank in range(layout[0])]


def _rank(of_rank: Callable, rank: int, layout: Layout, arguments: tuple, results: Any) -> None:
    torch.set_num_threads(1)
    try:
        with redirect_stdout(io.StringIO()):
            answer = of_rank(rank, layout, *arguments)
    except Exception as error:  # whatever it says is its answer
        answer = f"{type(error).__name__}: {error or 'of its own state'}"
    results.put(pickle.dumps((rank, answer)))  # the queue would leave a state's tensors with this process, which ends


def streaming_run(root: Path, layout: Layout, state: Any, batch: int, steps: int) -> tuple[Batches, Any]:
    """`StreamingDataLoader` keeps the state. All ranks are of one node: its nodes cannot share a machine."""
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = in_ranks(_streaming_rank, layout, root, state, batch, steps, port)
    return joined([batches for batches, _ in found], layout[2]), found[0][1]


def _streaming_rank(
    rank: int, layout: Layout, root: Path, state: Any, batch: int, steps: int, port: int
) -> tuple[Batches, Any]:
    from streaming import StreamingDataLoader, StreamingDataset

    ranks, workers, accumulation = layout
    own = batch // (ranks * accumulation)
    with environment(
        RANK=rank, WORLD_SIZE=ranks, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=ranks,
        MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
    ):  # fmt: skip
        data = StreamingDataset(local=str(root / "mds"), shuffle=True, shuffle_seed=0, batch_size=own)
        # Its loader takes the length of a list's first entry for the size of the batch.
        loader = StreamingDataLoader(
            data, batch_size=own, num_workers=workers, collate_fn=lambda rows: [[row["txt"] for row in rows]]
        )
        if state is not None:
            loader.load_state_dict(state)
        found: Batches = []
        while len(found) < steps * accumulation:
            found += [texts for (texts,) in islice(loader, steps * accumulation - len(found))]
        return found, loader.state_dict()


def energon_run(root: Path, layout: Layout, state: Any, batch: int, steps: int) -> tuple[Batches, Any]:
    """Its savable loader keeps the state; that of another number of ranks goes through its `redist` tool."""
    if state is not None and len(state) != layout[0]:
        try:
            with redirect_stdout(io.StringIO()):
                state = _redistributed(state, layout[0])
        except Exception as error:  # whatever it says is its answer
            raise Refused(f"redist: {error}") from error
    found = in_ranks(_energon_rank, layout, root, state, batch, steps)
    return joined([batches for batches, _ in found], layout[2]), [own for _, own in found]


def _energon_rank(rank: int, layout: Layout, root: Path, state: Any, batch: int, steps: int) -> tuple[Batches, Any]:
    ranks, workers, accumulation = layout
    loader = _energon_loader(root, rank, ranks, workers, batch // (ranks * accumulation))
    loader.restore_state_rank(state[rank] if state is not None else None)
    return [list(texts) for texts in islice(loader, steps * accumulation)], loader.save_state_rank()


def _energon_loader(root: Path, rank: int, ranks: int, workers: int, batch: int) -> Any:
    from megatron.energon import DefaultTaskEncoder, WorkerConfig, get_savable_loader, get_train_dataset, stateless
    from megatron.energon.task_encoder.cooking import Cooker

    @stateless
    def cook(sample: dict) -> dict:
        return sample

    class Texts(DefaultTaskEncoder):
        cookers = (Cooker(cook),)

        @stateless
        def batch(self, rows: list[dict]) -> list[str]:
            return [row["txt"] for row in rows]

    data = get_train_dataset(
        root / "ours/shards",
        worker_config=WorkerConfig(rank=rank, world_size=ranks, num_workers=workers),
        batch_size=batch,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=Texts(),
    )
    return get_savable_loader(data)


def _redistributed(states: list, ranks: int) -> list:
    from megatron.energon.epathlib import EPath
    from megatron.energon.tools.checkpoint import command_redist

    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"rank{rank}.pt" for rank in range(len(states))]
        for file, state in zip(files, states, strict=True):
            torch.save(state, file)
        out = Path(folder) / "out"
        out.mkdir()
        command_redist.callback([EPath(file) for file in files], EPath(out), ranks)
        # The benchmark's own files.
        return [torch.load(out / f"rank{r}.pt", weights_only=False) for r in range(ranks)]


ENGINES = (
    Engine("webdataset", "webdataset", "webdataset", lambda root: None, webdataset_run),
    Engine("streaming", "streaming", "mosaicml-streaming", streaming_write, streaming_run),
    Engine("energon", "megatron.energon", "megatron-energon", energon_write, energon_run),
)


def installed_engines() -> list[Engine]:
    return [engine for engine in ENGINES if is_there(engine.module)]
