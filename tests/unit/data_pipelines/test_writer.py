"""Claiming folders, finishing, and being killed at any point in between."""

import json
from pathlib import Path

import numpy as np
import pytest

from flagdit.data_pipelines.index import Dataset
from flagdit.data_pipelines.records import Rejected
from flagdit.data_pipelines.shards import Sample, npy_bytes
from flagdit.data_pipelines.writer import DatasetWriter
from flagdit.errors import DataError

INFO = {"kind": "raw", "modality": "image", "source": "test", "licence": ""}
SHARDS = ["train-000000", "train-000001", "heldout-000000"]


def sample(name: str, size: int = 2, label: int = -1) -> Sample:
    return Sample(name, {"npy": npy_bytes(np.zeros(size)), "txt": name.encode()}, (1, 1, 1, size), label=label)


def writer(out: Path, *, resume: bool = True, overwrite: bool = False, **settings: object) -> DatasetWriter:
    return DatasetWriter(out, {"a": 1, **settings}, overwrite=overwrite, resume=resume)


def fill(w: DatasetWriter, number: int = 3) -> None:
    for i, name in enumerate(SHARDS[:number]):
        if not w.done(name):
            w.put(name, [sample(f"{i}/x" * (i + 1)), sample(f"{i}/y", 3, i)], [Rejected(f"bad{i}", "why")])


def finish(w: DatasetWriter) -> Dataset:
    return w.finish(INFO, SHARDS, w.rejected(SHARDS))


def test_a_finished_folder_holds_exactly_its_parts(tmp_path: Path, tree):
    w = writer(tmp_path / "a")
    fill(w)
    dataset = finish(w)
    assert set(tree(tmp_path / "a")) == {
        "dataset.json",
        "quarantine.jsonl",
        *(f"shards/{s}.tar" for s in SHARDS),
        *(f"index/{c}.npy" for c in ("shard", "offset", "nbytes", "xxh3", "shape", "text_tokens", "label", "key")),
    }
    assert dataset.splits == {"train": range(0, 4), "heldout": range(4, 6)}
    assert [dataset.columns["key"][i].decode() for i in range(6)] == ["0/x", "0/y", "1/x1/x", "1/y", "2/x2/x2/x", "2/y"]
    assert dataset.shapes == [((1, 1, 1, 2), 3), ((1, 1, 1, 3), 3)]
    assert dataset.info["labels"] == {"samples": 3, "max": 2} and dataset.info["quarantined"] == 3
    assert [json.loads(x)["key"] for x in (tmp_path / "a/quarantine.jsonl").read_text().splitlines()] == [
        "bad0",
        "bad1",
        "bad2",
    ]


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_killed_after_any_shard_and_continued(tmp_path: Path, number: int, tree):
    fill(writer(tmp_path / "whole"))
    finish(writer(tmp_path / "whole"))
    fill(writer(tmp_path / "killed"), number)
    (tmp_path / "killed/shards/.train-000009.tar.1.tmp").write_bytes(b"half")
    w = writer(tmp_path / "killed")
    assert [w.done(s) for s in SHARDS] == [i < number for i in range(3)]
    fill(w)
    finish(w)
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


def test_killed_between_the_last_file_and_the_tidying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    w = writer(tmp_path)
    fill(w)
    with monkeypatch.context() as m:
        m.setattr(DatasetWriter, "_tidy", lambda self: None)
        finish(w)
    assert (tmp_path / "building.json").exists() and len(Dataset.open(tmp_path, None)) == 6
    assert writer(tmp_path).complete
    assert not (tmp_path / "building.json").exists() and not (tmp_path / "parts").exists()


def test_other_settings_never_mix(tmp_path: Path):
    fill(writer(tmp_path), 2)
    with pytest.raises(DataError, match=r"other settings \(a\)"):
        writer(tmp_path, a=2)
    with pytest.raises(DataError, match=r"other settings \(b\)"):
        writer(tmp_path, b=2)
    assert not writer(tmp_path, a=2, overwrite=True).done(SHARDS[0])
    assert not list((tmp_path / "shards").iterdir())


def test_without_resume_an_unfinished_folder_starts_over(tmp_path: Path):
    fill(writer(tmp_path), 2)
    assert not writer(tmp_path, resume=False, a=2).done(SHARDS[0])


def test_a_killed_overwrite_leaves_no_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    w = writer(tmp_path)
    fill(w)
    finish(w)
    import shutil

    real = shutil.rmtree

    def killed(path: Path, **options: object) -> None:
        if Path(path).name == "index":
            raise KeyboardInterrupt
        real(path, **options)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(shutil, "rmtree", killed)
        writer(tmp_path, a=2, overwrite=True)
    with pytest.raises(DataError, match="not complete"):
        Dataset.open(tmp_path, None)
    w = writer(tmp_path, a=2)
    assert not any(w.done(s) for s in SHARDS)


def test_content_hash_follows_the_content(tmp_path: Path):
    hashes = []
    for name, size in (("a", 2), ("b", 2), ("c", 3)):
        w = writer(tmp_path / name)
        w.put("train-000000", [sample("x", size)])
        hashes.append(w.finish(INFO, ["train-000000"], []).info["content"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_unreadable_marker(tmp_path: Path):
    (tmp_path / "building.json").write_text("{")
    with pytest.raises(DataError, match=r"building\.json cannot be read.*Delete the folder"):
        writer(tmp_path)


def test_a_shard_of_rejects_only(tmp_path: Path):
    w = writer(tmp_path)
    w.put("train-000000", [sample("x")])
    w.put("train-000001", [], [Rejected("bad", "why")])
    w.put("heldout-000000", [], [])
    dataset = finish(w)
    assert dataset.splits == {"train": range(0, 1)} and dataset.info["quarantined"] == 1
