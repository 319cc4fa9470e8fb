"""Building: options, splits, quarantine, repetition."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flagdit.data_pipelines.build import build_dataset
from flagdit.data_pipelines.index import Dataset
from flagdit.data_pipelines.options import kinds, source_function
from flagdit.data_pipelines.sources import emoji
from flagdit.errors import DataError, RecipeError


def pictures(folder: Path, good: int, broken: int) -> Path:
    folder.mkdir()
    for i in range(good + broken):
        Image.fromarray(np.full((20, 20, 3), i, np.uint8)).save(folder / f"p{i}.png")
        (folder / f"p{i}.txt").write_text(f"picture {i}")
        if i >= good:
            (folder / f"p{i}.png").write_bytes(b"broken")
    return folder


def test_samples_are_those_of_the_source(emoji_raw: Path):
    dataset = Dataset.open(emoji_raw, "raw")
    options = {k: v for k, v in dataset.info["settings"].items() if k not in ("kind", "packages", "shard_samples")}
    expected = {r.key: r for r in emoji.source(**options).items}
    assert len(dataset) == len(expected) == 24
    for i in range(24):
        members = dataset.members(i)
        raw = expected[dataset.columns["key"][i].decode()]
        assert bytes(members["png"]) == raw.media["png"] and bytes(members["txt"]).decode() == raw.caption
        assert json.loads(bytes(members["json"]))["label"] == raw.label == dataset.columns["label"][i]
        assert dataset.shape(i) == raw.shape and i in dataset.splits[raw.split]


def test_splits_are_ranges_of_their_own_shards(emoji_raw: Path):
    dataset = Dataset.open(emoji_raw, "raw")
    assert {k: (v.start, v.stop) for k, v in dataset.splits.items()} == {"train": (0, 21), "heldout": (21, 24)}
    assert dataset.info["shards"] == [
        ["train-000000", 8],
        ["train-000001", 8],
        ["train-000002", 5],
        ["heldout-000000", 3],
    ]
    assert dataset.key(0).startswith("train-000000/") and dataset.key(23).startswith("heldout-000000/")
    assert dataset.info["licence"] and dataset.info["quarantined"] == 0


def test_the_same_command_gives_the_same_bytes(emoji_raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture, tree):
    settings = Dataset.open(emoji_raw, "raw").info["settings"]
    options = {k: v for k, v in settings.items() if k not in ("kind", "packages")}
    build_dataset("emoji", tmp_path / "again", **options)
    assert tree(tmp_path / "again") == tree(emoji_raw)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "again").rglob("*")}
    build_dataset("emoji", tmp_path / "again", **options)
    assert "complete and up to date" in capsys.readouterr().out
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "again").rglob("*")}, "nothing was touched"


def test_other_settings_need_another_folder_or_overwrite(tmp_path: Path, tree):
    build_dataset("emoji", tmp_path / "a", limit=3, size=16)
    before = tree(tmp_path / "a")
    with pytest.raises(DataError, match=r"/a: holds a data set made with other settings \(limit\).*--overwrite"):
        build_dataset("emoji", tmp_path / "a", limit=2, size=16)
    assert tree(tmp_path / "a") == before
    assert len(build_dataset("emoji", tmp_path / "a", limit=2, size=16, overwrite=True)) == 2
    assert len(tree(tmp_path / "a")) == len(before)


def test_other_peoples_files_are_never_touched(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(DataError, match="not empty and holds no data set"):
            build_dataset("emoji", tmp_path, limit=1, overwrite=overwrite)
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(DataError, match="is a file"):
        build_dataset("emoji", tmp_path / "thesis.tex", limit=1)


def test_corrupt_pictures_go_to_the_ledger(tmp_path: Path, capsys: pytest.CaptureFixture):
    src = pictures(tmp_path / "src", good=18, broken=2)
    dataset = build_dataset("folder", tmp_path / "out", src=src, size=16)
    assert len(dataset) == 18 and dataset.info["quarantined"] == 2
    ledger = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()]
    assert [entry["key"] for entry in ledger] == ["p18.png", "p19.png"]
    assert all("not a PNG" in entry["reason"] for entry in ledger)
    assert "left out 2 of 20 samples" in capsys.readouterr().out
    captions = {bytes(dataset.members(i)["txt"]).decode() for i in range(18)}
    assert captions == {f"picture {i}" for i in range(18)}, "none was replaced by another"


def test_too_many_corrupt_pictures_stop_the_build(tmp_path: Path):
    src = pictures(tmp_path / "src", good=8, broken=2)
    with pytest.raises(DataError, match=r"2 of 10 samples cannot be used.*0\.1.*p8\.png.*quarantine\.jsonl.*--max-bad"):
        build_dataset("folder", tmp_path / "out", src=src, size=16)
    assert (tmp_path / "out/quarantine.jsonl").exists()
    with pytest.raises(DataError, match="not complete"):
        Dataset.open(tmp_path / "out", "raw")
    assert len(build_dataset("folder", tmp_path / "out", src=src, size=16, max_bad=0.2)) == 8
    (src / "p0.txt").write_text("changed")
    with pytest.raises(DataError, match=r"other settings \(files\)"):
        build_dataset("folder", tmp_path / "out", src=src, size=16, max_bad=0.2)


def test_a_repaired_source_builds_after_a_failure(tmp_path: Path):
    src = pictures(tmp_path / "src", good=1, broken=1)
    with pytest.raises(DataError):
        build_dataset("folder", tmp_path / "out", src=src, size=16)
    stream = io.BytesIO()
    Image.new("RGB", (20, 20)).save(stream, "PNG")
    (src / "p1.png").write_bytes(stream.getvalue())
    assert len(build_dataset("folder", tmp_path / "out", src=src, size=16)) == 2
    assert not (tmp_path / "out/quarantine.jsonl").exists()


def test_nothing_usable(tmp_path: Path):
    src = pictures(tmp_path / "src", good=0, broken=2)
    with pytest.raises(DataError, match="no sample is left"):
        build_dataset("folder", tmp_path / "out", src=src, size=16, max_bad=1.0)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("photos", {}, r"no source 'photos'.*emoji, folder, furniture"),
        ("emoji", {"src": "x"}, r"emoji has no option src.*limit"),
        ("folder", {}, r"folder needs src"),
        ("emoji", {"shard_samples": 0}, "--shard-samples 0"),
    ],
)
def test_unknown_sources_and_options(kind: str, options: dict, message: str, tmp_path: Path):
    with pytest.raises(RecipeError, match=message):
        build_dataset(kind, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_sources_share_no_option_of_the_builder():
    import inspect

    own = {"out", "shard_samples", "max_bad", "overwrite", "kind"}
    for kind in kinds():
        assert not own & inspect.signature(source_function(kind)).parameters.keys()
