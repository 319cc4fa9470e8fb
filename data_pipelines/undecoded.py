"""Raw data sets to train on as they are: pictures are decoded and coded by the loader's processes.

For codecs that compute in a moment, without a network, and for models without text features. Everything else is encoded
once, by `flagdit data encode`.

Shape legend: C, F, H, W channels, frames or views, rows, columns.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np

from flagdit.codecs.latents import Codec, build_codec
from flagdit.config.schema import CodecConfig, Recipe
from flagdit.data_pipelines.index import Dataset, Encoded, caption_of
from flagdit.data_pipelines.readers import check_sizes, read_values
from flagdit.data_pipelines.remote import Cache
from flagdit.errors import DataError

COMPUTED = ("pixels", "haar", "dct")
"""Kinds of codecs that need no network."""


def live_codec(recipe: Recipe) -> CodecConfig | None:
    """The codec with which the recipe can train on raw data sets; None where it needs encoded ones."""
    return recipe.codec if recipe.codec.kind in COMPUTED and not recipe.model.text_dim else None


class Undecoded(Dataset):
    """A raw data set of pictures, clips or views that reads as an encoded one. Picklable."""

    def __init__(self, raw: Dataset, cfg: CodecConfig):
        """
        Raises:
            DataError: sizes that the codec cannot take.
        """
        self.raw, self.cfg = raw, cfg
        self.coder: Codec = build_codec(cfg)
        check_sizes(raw, self.coder)
        spec = self.coder.spec()
        content = hashlib.sha256(f"{raw.info['content']} {json.dumps(spec, sort_keys=True)}".encode()).hexdigest()[:32]
        shapes = [[self._latent_shape(shape), count] for shape, count in raw.shapes]
        info = {**raw.info, "channels": self.coder.channels, "factor": self.coder.factor, "codec": spec, "text": None}
        columns = dict(raw.columns)
        columns["shape"] = np.array(raw.columns["shape"])
        columns["shape"][:, 0] = self.coder.channels
        columns["shape"][:, 2:] //= self.coder.factor
        super().__init__(raw.path, {**info, "content": content, "shapes": shapes}, columns, raw.remote)

    def __reduce__(self) -> tuple:
        return (Undecoded, (self.raw, self.cfg))

    def read(self, sample_id: int, turn: int = 0) -> Encoded:
        """See `Dataset.read`."""
        where = f"sample {self.key(sample_id)}"
        try:
            members = self.raw.members(sample_id)
            caption, _ = caption_of(members, turn)
            latent_CFHW = self.coder.encode(read_values(self.raw, sample_id, members))
        except KeyError as error:
            raise DataError(f"has no {error.args[0]}", where=where) from error
        except (DataError, ValueError, TypeError, AttributeError) as error:
            raise DataError(str(error), where=where) from error
        label = int(self.columns["label"][sample_id])
        return Encoded(sample_id, self.key(sample_id), latent_CFHW, None, caption, label)

    def _latent_shape(self, shape: tuple[int, int, int, int]) -> list[int]:
        _, frames, rows, columns = shape
        return [self.coder.channels, frames, rows // self.coder.factor, columns // self.coder.factor]


def open_for_training(path: str, cache: Cache | None, codec: CodecConfig | None) -> Dataset:
    """An encoded data set; or, where a codec is given, a raw one of pictures that reads as if it were.

    Raises:
        DataError: see `Dataset.open` and `Undecoded`.
    """
    if codec is None:
        return Dataset.open(path, cache=cache)
    dataset = Dataset.open(path, None, cache)
    if dataset.info["kind"] == "encoded":
        return dataset
    if dataset.modality == "audio":
        return Dataset.open(path, cache=cache)  # says what is wrong
    return Undecoded(dataset, codec)
