"""The models of one encoding process, and what they make of a raw shard.

Shape legend
    C, F, H, W  channels, frames or views, rows, columns
    L, Y        tokens and width of text features
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flagdit.codecs.latents import Codec
from flagdit.codecs.modality import codec_for
from flagdit.codecs.text import TextEncoder, build_text_encoder
from flagdit.config.schema import Recipe
from flagdit.data_pipelines.index import Dataset, text_member
from flagdit.data_pipelines.progress import Advance
from flagdit.data_pipelines.readers import read_values
from flagdit.data_pipelines.records import Rejected
from flagdit.data_pipelines.shards import BF16, Sample, npy_bytes
from flagdit.data_pipelines.user_files import time_limit
from flagdit.data_pipelines.writer import DatasetWriter
from flagdit.errors import DataError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MEASURED = 16  # samples on which the error of the dtype is measured


@dataclass(frozen=True)
class Job:
    """What every process of one encode needs."""

    src: Path
    out: Path
    recipe: Recipe
    settings: dict
    device: str


class Machine:
    """The models of one process."""

    def __init__(self, job: Job):
        self.job = job
        self.raw = Dataset.open(job.src, "raw")
        self.codec: Codec = codec_for(job.recipe, self.raw.modality).to(job.device)
        has_text = job.settings["text"] is not None
        self.text: TextEncoder | None = build_text_encoder(job.recipe.text).to(job.device) if has_text else None
        starts = np.cumsum([0] + [count for _, count in self.raw.info["shards"]])
        self.spans = [range(int(a), int(b)) for a, b in pairwise(starts)]

    def encode_shard(self, writer: DatasetWriter, number: int, advance: Advance) -> None:
        """One shard, from raw to done."""
        samples: list[Sample] = []
        rejected: list[Rejected] = []
        for sample_id in self.spans[number]:
            try:
                with time_limit(self.job.recipe.limits.sample_seconds):
                    samples.append(self._encode(sample_id))
            except DataError as error:
                rejected.append(Rejected(self.raw.key(sample_id), error.what))
            advance(1)
        writer.put(self.raw.shard_names[number], self._with_text(samples, rejected), rejected)

    def latent(self, sample_id: int) -> Tensor:
        """(C, F, H, W) fp32 latent of a raw sample, on the CPU."""
        return self.codec.encode(read_values(self.raw, sample_id).to(self.job.device)).cpu()

    def dtype_error(self) -> float:
        """Root of the mean squared difference that the dtype on disk makes, relative to the latents', over a few
        samples spread over the data set."""
        dtype = DTYPES[self.job.settings["dtype"]]
        wrong = whole = 0.0
        for sample_id in range(0, len(self.raw), max(1, len(self.raw) // MEASURED)):
            try:
                exact = self.latent(sample_id).double()
            except DataError:
                continue  # in the ledger by now
            stored = exact.to(dtype).double()
            wrong += (stored - exact).square().sum().item()
            whole += exact.square().sum().item()
        return round((wrong / whole) ** 0.5, 9) if whole else 0.0

    def _encode(self, sample_id: int) -> Sample:
        """A sample with its latent; the text features follow for the whole shard at once."""
        latent_CFHW = self.latent(sample_id)
        members = self.raw.members(sample_id)
        files = {name: bytes(members[name]) for name in ("txt", "json")}
        files["latent.npy"] = npy_bytes(_cast(latent_CFHW, self.job.settings["dtype"], "latent"))
        c, f, h, w = latent_CFHW.shape
        columns = self.raw.columns
        return Sample(columns["key"][sample_id].decode(), files, (c, f, h, w), label=int(columns["label"][sample_id]))

    def _with_text(self, samples: list[Sample], rejected: list[Rejected]) -> list[Sample]:
        """The samples with the features of all their captions."""
        if self.text is None:
            return samples
        captions = [[s.members["txt"].decode(), *json.loads(s.members["json"]).get("captions", [])] for s in samples]
        features = iter(self.text.encode([c for several in captions for c in several]))
        done = []
        for sample, several in zip(samples, captions, strict=True):
            own = [next(features) for _ in several]
            try:
                files = dict(sample.members)
                for i, text_LY in enumerate(own):
                    files[text_member(i)] = npy_bytes(_cast(text_LY, self.job.settings["text_dtype"], "text"))
                done.append(replace(sample, members=files, text_tokens=len(own[0])))
            except DataError as error:
                rejected.append(Rejected(sample.key, error.what))
        return done


def _cast(x: Tensor, dtype: str, what: str) -> np.ndarray:
    cast = x.to(DTYPES[dtype])
    if not torch.isfinite(cast).all():
        raise DataError(f"its {what} is not finite in {dtype}")
    return cast.contiguous().view(torch.int16).numpy().view(BF16) if dtype == "bf16" else cast.numpy()
