"""`flagdit data encode`: a raw data set into latents and text features, shard by shard.

Each raw shard becomes one encoded shard of the same name, written whole or not at all. A killed encode continues with
the shards that are not done and ends with the same bytes; with other settings it refuses.

Shape legend
    C, F, H, W  channels, frames or views, rows, columns
    L, Y        tokens and width of text features
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flagdit.codecs.latents import Codec, build_codec, codec_spec
from flagdit.codecs.text import TextEncoder, build_text_encoder, text_spec
from flagdit.config.schema import Recipe
from flagdit.data_pipelines.build import check_rejected
from flagdit.data_pipelines.index import Dataset
from flagdit.data_pipelines.progress import Advance, progress
from flagdit.data_pipelines.records import Rejected
from flagdit.data_pipelines.shards import Sample, npy_bytes
from flagdit.data_pipelines.writer import DatasetWriter
from flagdit.errors import DataError, RecipeError

DTYPES = {"fp32": np.float32, "fp16": np.float16}


@dataclass(frozen=True)
class _Job:
    """What every process of one encode needs."""

    src: Path
    out: Path
    recipe: Recipe
    settings: dict
    device: str


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
) -> Dataset:
    """Encodes a raw data set with the recipe's codec and text encoder, or opens it where that has been done.

    Args:
        src: folder of the raw data set.
        out: folder of the encoded one.
        recipe: its codec, text and model.text_dim (0: no text features) are used.
        dtype: fp32 or fp16, on disk; auto: fp32 for what is exact or small (invertible codecs, the embedded text
            encoder), fp16 for what a folder's model makes.
        workers: processes; 0: this one. Each holds the models.
        device: of the models; auto: cuda where there is one.
        max_bad: share of samples that cannot be encoded above which it fails.
        overwrite: replace a data set of other settings.

    Raises:
        RecipeError: a codec or encoder that cannot be built, or an unknown dtype.
        DataError: `src` is not a raw data set, its sizes do not suit the codec, too many bad samples, or `out` cannot
            be used.
    """
    if dtype not in ("auto", *DTYPES):
        raise RecipeError(f"--dtype {dtype} is not one of auto, {', '.join(DTYPES)}")
    raw = Dataset.open(src, "raw")
    if raw.modality not in READERS:
        raise DataError(f"holds {raw.modality}, for which there is no encoder yet", where=str(src))
    with_text = recipe.model.text_dim > 0
    settings = {
        "source": raw.info["content"],
        "codec": codec_spec(recipe.codec),
        "text": text_spec(recipe.text) if with_text else None,
        "dtype": _dtype(dtype, recipe.codec.kind == "diffusers"),
        "text_dtype": _dtype(dtype, recipe.text.kind != "embedded") if with_text else None,
    }
    out = Path(out)
    writer = DatasetWriter(out, settings, overwrite=overwrite, resume=True)
    if writer.complete:
        print(f"{out} is complete and up to date", flush=True)
        return Dataset.open(out)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    job = _Job(Path(src), out, recipe, settings, device)
    names = raw.shard_names
    todo = [i for i, name in enumerate(names) if not writer.done(name)]
    if len(todo) < len(names):
        print(f"{out}: {len(names) - len(todo)} of {len(names)} shards are done already", flush=True)
    machine = _Machine(job)
    _check_sizes(raw, machine.codec)
    with progress(f"encoding {src}", sum(raw.info["shards"][i][1] for i in todo)) as advance:
        if workers:
            _encode_in_workers(job, todo, workers, advance)
        else:
            for i in todo:
                machine.encode_shard(writer, i, advance)
    rejected = writer.rejected(names)
    writer.ledger(rejected)
    check_rejected(out, rejected, len(raw), max_bad)
    info = {k: raw.info[k] for k in ("modality", "source", "licence")}
    info = {"kind": "encoded", **info, **{k: settings[k] for k in ("codec", "text", "dtype", "text_dtype")}}
    info |= {"channels": machine.codec.channels, "factor": machine.codec.factor}
    null = machine.text.encode([""])[0].numpy() if machine.text is not None else None
    return writer.finish(info, names, rejected, null)


def _dtype(dtype: str, from_folder: bool) -> str:
    return ("fp16" if from_folder else "fp32") if dtype == "auto" else dtype


def _check_sizes(raw: Dataset, codec: Codec) -> None:
    wrong = [
        f"{shape[3]}×{shape[2]} px ({n})"
        for shape, n in raw.shapes
        if shape[2] % codec.factor or shape[3] % codec.factor
    ]
    if wrong:
        raise DataError(
            f"{len(wrong)} of its sizes are not multiples of {codec.factor} px, one latent: {', '.join(wrong[:5])}",
            where=str(raw.path),
            fix=f"Build it with --multiple {codec.factor} (better: {codec.factor} times model.patch_size).",
        )


class _Machine:
    """The models of one process."""

    def __init__(self, job: _Job):
        self.job = job
        self.codec: Codec = build_codec(job.recipe.codec).to(job.device)
        has_text = job.settings["text"] is not None
        self.text: TextEncoder | None = build_text_encoder(job.recipe.text).to(job.device) if has_text else None
        self.raw = Dataset.open(job.src, "raw")
        starts = np.cumsum([0] + [count for _, count in self.raw.info["shards"]])
        self.spans = [range(int(a), int(b)) for a, b in pairwise(starts)]

    def encode_shard(self, writer: DatasetWriter, number: int, advance: Advance) -> None:
        """One shard, from raw to done."""
        samples: list[Sample] = []
        rejected: list[Rejected] = []
        for sample_id in self.spans[number]:
            try:
                samples.append(self._encode(sample_id))
            except DataError as error:
                rejected.append(Rejected(self.raw.key(sample_id), error.what))
            advance(1)
        writer.put(self.raw.shard_names[number], self._with_text(samples, rejected), rejected)

    def _encode(self, sample_id: int) -> Sample:
        """A sample with its latent; the text features follow for the whole shard at once."""
        members = self.raw.members(sample_id)
        pixels_CFHW = READERS[self.raw.modality](members)
        if tuple(pixels_CFHW.shape) != self.raw.shape(sample_id):
            raise DataError(f"decodes to {tuple(pixels_CFHW.shape)}; its index row says {self.raw.shape(sample_id)}")
        latent_CFHW = self.codec.encode(pixels_CFHW.to(self.job.device)).cpu()
        files = {name: bytes(members[name]) for name in ("txt", "json")}
        files["latent.npy"] = npy_bytes(_cast(latent_CFHW, self.job.settings["dtype"], "latent"))
        c, f, h, w = latent_CFHW.shape
        columns = self.raw.columns
        return Sample(columns["key"][sample_id].decode(), files, (c, f, h, w), label=int(columns["label"][sample_id]))

    def _with_text(self, samples: list[Sample], rejected: list[Rejected]) -> list[Sample]:
        if self.text is None:
            return samples
        features = self.text.encode([sample.members["txt"].decode() for sample in samples])
        done = []
        for sample, text_LY in zip(samples, features, strict=True):
            try:
                files = {
                    **sample.members,
                    "text.npy": npy_bytes(_cast(text_LY, self.job.settings["text_dtype"], "text")),
                }
                done.append(Sample(sample.key, files, sample.shape, len(text_LY), sample.label))
            except DataError as error:
                rejected.append(Rejected(sample.key, error.what))
        return done


def _cast(x: Tensor, dtype: str, what: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        array = x.numpy().astype(DTYPES[dtype])
    if not np.isfinite(array).all():
        raise DataError(f"its {what} is not finite in {dtype}")
    return array


def _read_image(members: Mapping[str, memoryview]) -> Tensor:
    """(3, 1, H, W) fp32 pixels in [−1, 1]."""
    if "png" not in members:
        raise DataError("has no picture")
    try:
        picture = Image.open(io.BytesIO(members["png"]), formats=("PNG",)).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"its picture cannot be decoded ({error})") from error
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[:, None].float() / 127.5 - 1


READERS: dict[str, Callable[[Mapping[str, memoryview]], Tensor]] = {"image": _read_image}
"""Modality → how its raw files become (C, F, H, W) values in [−1, 1]."""


_worker: tuple[_Machine, DatasetWriter] | None = None  # of a worker process


def _start_worker(job: _Job) -> None:
    global _worker
    torch.set_num_threads(1)
    _worker = _Machine(job), DatasetWriter(job.out, job.settings, overwrite=False, resume=True)


def _work(number: int) -> int:
    assert _worker is not None
    machine, writer = _worker
    machine.encode_shard(writer, number, lambda count: None)
    return len(machine.spans[number])


def _encode_in_workers(job: _Job, todo: list[int], workers: int, advance: Advance) -> None:
    # Spawned, since a fork of a process that has used torch's threads or a GPU may hang.
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(job,)) as pool:
        try:
            for future in as_completed([pool.submit(_work, i) for i in todo]):
                advance(future.result())
        except BrokenProcessPool as error:
            raise DataError(
                "an encoding process died",
                where=str(job.out),
                fix="Often memory ran out: use fewer --workers. The same command continues with the shards not done.",
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
