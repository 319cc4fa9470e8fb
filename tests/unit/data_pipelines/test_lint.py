"""Lint finds every planted defect and nothing else; the page shows what is there."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from flagdit.data_pipelines.index import Dataset
from flagdit.data_pipelines.lint import lint
from flagdit.data_pipelines.show import write_page
from flagdit.data_pipelines.stats import describe, write_plots

from .synthetic import make_set


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_set(tmp_path / "set", 21)
    return tmp_path / "set"


def column(folder: Path, name: str, row: int, value: object) -> None:
    values = np.load(folder / "index" / f"{name}.npy")
    values[row] = value
    np.save(folder / "index" / f"{name}.npy", values)


def described(folder: Path, **changes: object) -> None:
    info = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**info, **changes}))


def flip_a_bit(folder: Path) -> None:
    shard = folder / "shards/train-000001.tar"
    data = bytearray(shard.read_bytes())
    data[1500] ^= 1
    shard.write_bytes(bytes(data))


DEFECTS = {
    "a bit": (flip_a_bit, "checksum"),
    "a shard cut off": (lambda f: os.truncate(f / "shards/train-000002.tar", 4000), "is cut off"),
    "a shard too many": (lambda f: shutil.copy(f / "shards/train-000000.tar", f / "shards/x.tar"), "not in the index"),
    "another size": (lambda f: column(f, "shape", 3, [3, 1, 8, 12]), "its index row says"),
    "no size": (lambda f: column(f, "shape", 3, [3, 0, 4, 4]), "its size is"),
    "an offset beyond the file": (lambda f: column(f, "offset", 20, 1 << 40), "is cut off"),
    "a key twice": (lambda f: column(f, "key", 5, b"train00004"), "two samples have this key"),
    "a modality of its own": (lambda f: described(f, modality="smell"), "no modality 'smell'"),
    "splits that overlap": (lambda f: described(f, splits={"train": [0, 21], "heldout": [20, 21]}), "split heldout"),
}


def test_a_good_data_set_has_no_findings(folder):
    assert lint(folder) == []


@pytest.mark.parametrize("defect", DEFECTS)
def test_each_planted_defect_is_found(folder, defect):
    plant, told = DEFECTS[defect]
    plant(folder)
    findings = lint(folder)
    assert any(told in f.what for f in findings), findings


def test_samples_that_are_the_same_and_blank_ones(tmp_path, folder, emoji_raw):
    for name in ("xxh3", "nbytes", "offset", "shape", "shard"):
        values = np.load(folder / "index" / f"{name}.npy")
        column(folder, name, 1, values[0])
    assert [f.what.split(" to the")[0] for f in lint(folder)] == ["is the same as train-000000/train00000"]
    assert lint(emoji_raw) == [], "a raw data set, decoded"


def test_the_page_shows_samples_and_what_cannot_be_read(folder, emoji_raw, tmp_path):
    flip_a_bit(folder)
    page = write_page(folder, tmp_path / "a" / "page.html", limit=30).read_text()
    assert page.count("<figure>") == 21 and page.count("data:image/png") == 20 and "checksum" in page
    raw = write_page(emoji_raw, tmp_path / "raw.html", limit=5).read_text()
    assert raw.count("data:image/png") == 5 and "Twemoji emoji of" in raw


def test_statistics_know_tokens_and_draw_plots(folder, tmp_path):
    found = describe(folder, patch_size=2)
    shapes = [tuple(s) for s in Dataset.open(folder).columns["shape"].tolist()]
    assert found["tokens"]["total"] == sum((h // 2) * (w // 2 + 1) for _, _, h, w in shapes)
    assert write_plots(found, tmp_path / "p.png").stat().st_size > 10_000
