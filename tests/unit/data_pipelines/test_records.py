"""Keys that tar, webdataset and the ledger can all carry."""

import re

import pytest

from flagdit.data_pipelines.records import safe_key, stable_hash

NAMES = [
    "dog",
    "a/b-c_1",
    "a.b",
    "a_b",
    "ä",
    "../x",
    "/x",
    "x/",
    "a//b",
    "__meta__",
    "",
    " ",
    "n" * 300,
    "n" * 299 + "m",
]


@pytest.mark.parametrize("name", NAMES)
def test_keys_are_plain_and_short(name: str):
    key = safe_key(name)
    assert re.fullmatch(r"[A-Za-z0-9_/-]+", key) and len(key) + len(".latent.npy") <= 100
    assert not key.startswith(("/", "__")) and "//" not in key and ".." not in key
    assert name not in ("dog", "a/b-c_1", "a_b") or key == name, "plain names stay"


def test_different_names_have_different_keys():
    assert len({safe_key(n) for n in NAMES}) == len(NAMES)


def test_hash_is_the_same_for_ever():
    assert stable_hash(0, "holdout", "1f436") == 5663969058719721505
