"""What sources hand to the builder: good samples, rejected ones, and what is known about the whole."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

LONGEST_KEY = 60  # with a hash and the file ending it fits the 100 bytes of a plain tar header


@dataclass(frozen=True)
class Raw:
    """One sample of a raw data set.

    Attributes:
        key: its name in shards, ledgers and errors; see `safe_key`.
        media: file ending → encoded bytes, e.g. {"png": …}.
        shape: (channels, frames or views, rows, columns) of the decoded media.
        caption: text in any language; never empty.
        split: "train" or "heldout".
        label: class id, or −1 for none.
        meta: whatever else is known, as JSON.
        more_captions: other texts for the same sample; training takes them in turn, one an epoch.
    """

    key: str
    media: dict[str, bytes]
    shape: tuple[int, int, int, int]
    caption: str
    split: str = "train"
    label: int = -1
    meta: dict[str, Any] = field(default_factory=dict)
    more_captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rejected:
    """A sample that cannot be used, for the quarantine ledger."""

    key: str
    reason: str


@dataclass(frozen=True)
class Source:
    """A stream of samples of one kind.

    Attributes:
        modality: a row of `model/modality.py`.
        total: samples and rejects that `items` will yield; more where a file gives several samples.
        settings: everything that decides the content, as JSON: equal settings give equal data sets.
        licence: a note for the people who use the data.
        items: the samples, in an order that depends on the settings only.
    """

    modality: str
    total: int
    settings: dict[str, Any]
    licence: str
    items: Iterator[Raw | Rejected]


def stable_hash(*parts: object) -> int:
    """A 64-bit number from text and numbers: the same on every machine, in every version."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def safe_key(name: str) -> str:
    """A name that tar, webdataset and file systems all take: letters, digits, "-", "_" and "/".

    A name that must be changed or shortened gets a hash of the original, so that two never meet.
    """
    key = re.sub(r"[^A-Za-z0-9_/-]", "_", name)
    # Webdataset takes __names__ for its own, and "//", "/x" or "x/" are no names of files.
    if key == name and len(key) <= LONGEST_KEY and not key.startswith("__") and all(key.split("/")):
        return key
    return f"{key.strip('/_').replace('//', '/')[:LONGEST_KEY]}-{stable_hash(name):016x}"
