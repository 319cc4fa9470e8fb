"""What `describe` counts is what is there."""

import json
import os
from pathlib import Path

import pytest

from flagdit.data_pipelines.index import Dataset
from flagdit.data_pipelines.stats import describe
from flagdit.errors import DataError


def test_counts_of_an_encoded_data_set(emoji_encoded: Path):
    found = describe(emoji_encoded)
    assert json.loads(json.dumps(found)) == found
    assert (found["samples"], found["splits"]) == (24, {"train": 21, "heldout": 3})
    assert sum(found["sizes"].values()) == sum(found["aspects"].values()) == 24
    assert found["sizes"]["16×16"] == found["aspects"]["1:1"] == 8
    dataset = Dataset.open(emoji_encoded)
    tokens = [len(dataset.read(i).text_LY) for i in range(24)]
    assert (found["text_tokens"]["min"], found["text_tokens"]["max"]) == (min(tokens), max(tokens))
    histogram = found["text_tokens"]["histogram"]
    assert [sum(a <= t <= b for t in tokens) for a, b, _ in histogram] == [n for _, _, n in histogram]
    assert sum(n for _, _, n in histogram) == 24
    lengths = sorted(len(dataset.read(i).caption) for i in range(24))
    assert (found["caption_letters"]["min"], found["caption_letters"]["max"]) == (lengths[0], lengths[-1])
    assert sum(found["labels"].values()) == 24 and found["unreadable"] == 0
    assert found["bytes"] <= sum(os.path.getsize(p) for p in (emoji_encoded / "shards").iterdir())


def test_raw_data_sets_and_unreadable_samples(emoji_raw: Path, copy_of):
    folder = copy_of(emoji_raw)
    assert describe(folder)["kind"] == "raw" and "text_tokens" not in describe(folder)
    os.truncate(folder / "shards/heldout-000000.tar", 0)
    assert describe(folder)["unreadable"] == 3


def test_no_data_set_to_describe(tmp_path: Path):
    with pytest.raises(DataError, match="is not a data set"):
        describe(tmp_path)
