"""`flagdit data encode`: a raw data set into latents and text features, shard by shard.

Each raw shard becomes one encoded shard of the same name, written whole or not at all. A killed encode continues with
the shards that are not done and ends with the same bytes; with other settings it refuses.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from flagdit.codecs.modality import codec_spec_for
from flagdit.codecs.text import text_spec
from flagdit.config.schema import Recipe
from flagdit.data_pipelines.build import check_rejected
from flagdit.data_pipelines.index import Dataset
from flagdit.data_pipelines.machine import DTYPES, Job, Machine
from flagdit.data_pipelines.progress import Advance, progress
from flagdit.data_pipelines.readers import check_sizes
from flagdit.data_pipelines.writer import DatasetWriter
from flagdit.errors import DataError, RecipeError


def encode_dataset(
    src: str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    dtype: str = "auto",
    workers: int = 0,
    device: str = "auto",
    max_bad: float = 0.01,
    overwrite: bool = False,
    task: tuple[int, int] | None = None,
) -> Dataset | None:
    """Encodes a raw data set with the recipe's codec and text encoder, or opens it where that has been done.

    Args:
        src: folder of the raw data set.
        out: folder of the encoded one.
        recipe: its codec, text and model.text_dim (0: no text features) are used.
        dtype: fp32, fp16 or bf16, on disk; auto: fp32 for what is exact or small (invertible codecs, the embedded text
            encoder), fp16 for what a folder's model makes.
        workers: processes; 0: this one. Each holds the models.
        device: of the models; auto: cuda where there is one.
        max_bad: share of samples that cannot be encoded above which it fails.
        overwrite: replace a data set of other settings.
        task: (i, n): only every n-th shard from the i-th on; n such tasks at once, on any machines, make the whole, and
            the last one to end completes it.

    Returns:
        The data set; None where other tasks are still at work on it.

    Raises:
        RecipeError: a codec or encoder that cannot be built, or an unknown dtype.
        DataError: `src` is not a raw data set, its sizes do not suit the codec, too many bad samples, or `out` cannot
            be used.
    """
    if dtype not in ("auto", *DTYPES):
        raise RecipeError(f"--dtype {dtype} is not one of auto, {', '.join(DTYPES)}")
    raw = Dataset.open(src, "raw")
    with_text = recipe.model.text_dim > 0
    by_model = bool(recipe.audio.path) if raw.modality == "audio" else recipe.codec.kind == "diffusers"
    settings = {
        "source": raw.info["content"],
        "codec": codec_spec_for(recipe, raw.modality),
        "text": text_spec(recipe.text) if with_text else None,
        "dtype": _dtype(dtype, by_model),
        "text_dtype": _dtype(dtype, recipe.text.kind != "embedded") if with_text else None,
    }
    out = Path(out)
    writer = DatasetWriter(out, settings, overwrite=overwrite, resume=True)
    if writer.complete:
        print(f"{out} is complete and up to date", flush=True)
        return Dataset.open(out)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    job = Job(Path(src), out, recipe, settings, device)
    names = raw.shard_names
    own = range(len(names)) if task is None else range(task[0], len(names), task[1])
    todo = [i for i in own if not writer.done(names[i])]
    if len(todo) < len(own):
        print(f"{out}: {len(own) - len(todo)} of {len(own)} shards are done already", flush=True)
    machine = Machine(job)
    check_sizes(raw, machine.codec)
    with progress(f"encoding {src}", sum(raw.info["shards"][i][1] for i in todo)) as advance:
        if workers:
            _encode_in_workers(job, todo, workers, advance)
        else:
            for i in todo:
                machine.encode_shard(writer, i, advance)
    if task is not None and not writer.all_done_here(names):
        print(f"{out}: task {task[0]} of {task[1]} is done; the last one completes the data set", flush=True)
        return None
    return _complete(writer, raw, machine, settings, max_bad)


def _complete(
    writer: DatasetWriter, raw: Dataset, machine: Machine, settings: dict[str, Any], max_bad: float
) -> Dataset:
    """Makes one data set of the shards, which are all there."""
    rejected = writer.rejected(raw.shard_names)
    writer.ledger(rejected)
    check_rejected(writer.out, rejected, len(raw), max_bad)
    info = {k: raw.info[k] for k in ("modality", "source", "licence")}
    info = {"kind": "encoded", **info, **{k: settings[k] for k in ("codec", "text", "dtype", "text_dtype")}}
    info |= {"channels": machine.codec.channels, "factor": machine.codec.factor}
    info["dtype_error"] = error = machine.dtype_error()
    if error:
        print(f"{writer.out}: {settings['dtype']} changes the latents by {error:.2g} of their size", flush=True)
    null = machine.text.encode([""])[0].numpy() if machine.text is not None else None
    return writer.finish(info, raw.shard_names, rejected, null)


def array_task(text: str | None) -> tuple[int, int] | None:
    """ "i/n", or, where it is "auto" in a SLURM array, this job's place in it; None for None.

    Raises:
        RecipeError: not such a text, or no array.
    """
    if text is None:
        return None
    if text == "auto":
        names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT")
        values = [os.environ.get(name, "") for name in names]
        if not all(v.isdecimal() for v in values):
            raise RecipeError("--task auto outside a SLURM array", fix="Submit with --array=0-7, or give --task i/n.")
        number, first, count = map(int, values)
        if int(os.environ.get("SLURM_ARRAY_TASK_STEP", "1")) != 1:
            raise RecipeError("--task auto in an array with steps", fix="Submit with --array=0-7.")
        return number - first, count
    number_text, _, count_text = text.partition("/")
    if not (number_text.isdecimal() and count_text.isdecimal() and int(number_text) < int(count_text)):
        raise RecipeError(f"--task {text} is not i/n with i from 0 to n−1", fix="For example 0/8, or auto.")
    return int(number_text), int(count_text)


def _dtype(dtype: str, from_folder: bool) -> str:
    return ("fp16" if from_folder else "fp32") if dtype == "auto" else dtype


_worker: tuple[Machine, DatasetWriter] | None = None  # of a worker process


def _start_worker(job: Job) -> None:
    global _worker
    torch.set_num_threads(1)
    _worker = Machine(job), DatasetWriter(job.out, job.settings, overwrite=False, resume=True)


def _work(number: int) -> int:
    assert _worker is not None
    machine, writer = _worker
    machine.encode_shard(writer, number, lambda count: None)
    return len(machine.spans[number])


def _encode_in_workers(job: Job, todo: list[int], workers: int, advance: Advance) -> None:
    # Spawned, since a fork of a process that has used torch's threads or a GPU may hang.
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(job,)) as pool:
        try:
            for future in as_completed([pool.submit(_work, i) for i in todo]):
                advance(future.result())
        except (BrokenProcessPool, MemoryError) as error:
            pool.shutdown(wait=False, cancel_futures=True)
            raise DataError(
                f"an encoding process {'ran out of memory' if isinstance(error, MemoryError) else 'died'}",
                where=str(job.out),
                fix="Often memory ran out: use fewer --workers. The same command continues with the shards not done.",
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
