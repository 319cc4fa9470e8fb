"""Opening and reading: wrong folders, damage, size, pickling."""

import json
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from flagdit.data_pipelines.index import COLUMNS, FORMAT, Dataset
from flagdit.data_pipelines.shards import Sample, npy_bytes
from flagdit.data_pipelines.writer import DatasetWriter
from flagdit.errors import DataError


def test_wrong_kinds_name_the_next_command(emoji_raw: Path, emoji_encoded: Path):
    with pytest.raises(DataError, match=r"/raw: holds pictures .* not encoded.*flagdit data encode .*/raw OUT"):
        Dataset.open(emoji_raw)
    with pytest.raises(DataError, match=r"/encoded: holds encoded latents"):
        Dataset.open(emoji_encoded, "raw")
    assert len(Dataset.open(emoji_raw, None)) == len(Dataset.open(emoji_encoded, None)) == 24


def test_folders_that_are_no_data_set(emoji_raw: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"nowhere: there is no such folder.*flagdit data build"):
        Dataset.open(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"has no dataset\.json.*Did you mean .*(raw|encoded)"):
        Dataset.open(emoji_raw.parent)
    with pytest.raises(DataError, match=r"has no dataset\.json.*Make one"):
        Dataset.open(tmp_path)
    (tmp_path / "building.json").write_text("{}")
    with pytest.raises(DataError, match=r"not complete.*Run that command again"):
        Dataset.open(tmp_path)


def test_missing_parts_are_named(emoji_encoded: Path, copy_of):
    folder = copy_of(emoji_encoded)
    (folder / "shards/train-000001.tar").unlink()
    with pytest.raises(DataError, match=r"1 of 4 shards are missing, train-000001\.tar first.*damaged"):
        Dataset.open(folder)
    (folder / "index/offset.npy").unlink()
    with pytest.raises(DataError, match=r"index/offset\.npy cannot be read"):
        Dataset.open(folder)
    np.save(folder / "index/offset.npy", np.zeros(3))
    with pytest.raises(DataError, match="3 rows for 24 samples"):
        Dataset.open(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 2}', '{"format": 99}', "\x00\xff"])
def test_broken_description(emoji_encoded: Path, copy_of, content: str):
    folder = copy_of(emoji_encoded)
    (folder / "dataset.json").write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match=r"dataset\.json|format 99"):
        Dataset.open(folder)


def test_reading_gives_own_fp32_memory(emoji_encoded: Path):
    dataset = Dataset.open(emoji_encoded)
    sample = dataset.read(5)
    assert sample.latent_CFHW.dtype == sample.text_LY.dtype == torch.float32
    sample.latent_CFHW.zero_()
    assert not torch.equal(sample.latent_CFHW, dataset.read(5).latent_CFHW)
    assert sample.caption.startswith(("a Twemoji", "an OpenMoji")) and sample.key == dataset.key(5)
    assert sample.sample_id == 5 and sample.label >= 0
    assert len(sample.text_LY) == dataset.columns["text_tokens"][5]


def test_a_changed_byte_names_the_sample(emoji_encoded: Path, copy_of):
    folder = copy_of(emoji_encoded)
    dataset = Dataset.open(folder)
    shard = folder / "shards/train-000000.tar"
    data = bytearray(shard.read_bytes())
    data[int(dataset.columns["offset"][2]) + 2000] ^= 0x10
    shard.write_bytes(bytes(data))
    with pytest.raises(DataError, match=rf"sample {dataset.key(2)}: .*checksum"):
        dataset.read(2)
    dataset.read(1), dataset.read(3)


def test_latents_that_are_not_as_the_index_says(emoji_encoded: Path, copy_of):
    folder = copy_of(emoji_encoded)
    shapes = np.load(folder / "index/shape.npy")
    shapes[0] = (3, 1, 8, 8)
    np.save(folder / "index/shape.npy", shapes)
    with pytest.raises(DataError, match=r"a latent of .* its index row says \(3, 1, 8, 8\)"):
        Dataset.open(folder).read(0)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"latent.npy": npy_bytes(np.array([[[[np.nan]]]]))}, "holds NaN or infinity"),
        ({"text.npy": npy_bytes(np.full((2, 4), np.inf))}, "holds NaN or infinity"),
        ({"text.npy": npy_bytes(np.ones((2, 5)))}, r"text features of \(2, 5\)"),
        ({"text.npy": npy_bytes(np.ones((0, 4)))}, r"text features of \(0, 4\)"),
        ({"latent.npy": b"junk"}, r"not a \.npy file"),
        ({"txt": b"\xff"}, "utf-8"),
        ({"text.npy": None}, r"has no text\.npy"),
    ],
)
def test_wrong_content_with_a_right_checksum_is_refused(members: dict, message: str, tmp_path: Path):
    files = {"latent.npy": npy_bytes(np.zeros((1, 1, 1, 1))), "text.npy": npy_bytes(np.ones((2, 4))), "txt": b"x"}
    files = {k: v for k, v in {**files, **members}.items() if v is not None}
    writer = DatasetWriter(tmp_path, {}, overwrite=False, resume=False)
    writer.put("train-000000", [Sample("bad", files, (1, 1, 1, 1), 2)])
    info = {"kind": "encoded", "modality": "image", "text": {"dim": 4}}
    with pytest.raises(DataError, match=rf"sample train-000000/bad: .*{message}"):
        writer.finish(info, ["train-000000"], []).read(0)


def test_null_text(emoji_raw: Path, emoji_encoded: Path, copy_of):
    from flagdit.codecs.text import build_text_encoder
    from flagdit.config.schema import TextConfig

    null = build_text_encoder(TextConfig()).encode([""])[0]
    assert torch.equal(Dataset.open(emoji_encoded).null_text, null)
    assert Dataset.open(emoji_raw, "raw").null_text is None
    folder = copy_of(emoji_encoded)
    (folder / "null_text.npy").unlink()
    with pytest.raises(DataError, match=r"null_text\.npy cannot be read"):
        Dataset.open(folder).null_text  # noqa: B018


def test_missing_split(emoji_encoded: Path):
    with pytest.raises(DataError, match=r"no split 'test'; it has train \(21 samples\), heldout \(3 samples\)"):
        Dataset.open(emoji_encoded).split("test")


def test_pickled_data_sets_open_again(emoji_encoded: Path):
    dataset = Dataset.open(emoji_encoded)
    assert len(pickle.dumps(dataset)) < 1000, "the path, not the index"
    assert torch.equal(pickle.loads(pickle.dumps(dataset)).read(3).latent_CFHW, dataset.read(3).latent_CFHW)


def test_ten_million_samples_open_in_no_time(tmp_path: Path):
    n = 10_000_000
    (tmp_path / "index").mkdir()
    (tmp_path / "shards").mkdir()
    for name, column in COLUMNS.items():
        dtype, shape = column if isinstance(column, tuple) else (column, ())
        dtype = "S24" if name == "key" else dtype
        np.lib.format.open_memmap(tmp_path / "index" / f"{name}.npy", "w+", dtype, (n, *shape))  # sparse: no disk used
    (tmp_path / "shards/train-000000.tar").touch()
    info = {"format": FORMAT, "kind": "encoded", "modality": "image", "samples": n, "splits": {"train": [0, n]}}
    info |= {"shards": [["train-000000", n]], "shapes": [[[4, 1, 32, 32], n]]}
    (tmp_path / "dataset.json").write_text(json.dumps(info))

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before, start = resident(), time.perf_counter()
    dataset = Dataset.open(tmp_path)
    assert dataset.key(n - 1) == "train-000000/" and dataset.shape(n // 2) == (0, 0, 0, 0)
    assert time.perf_counter() - start < 0.5
    assert resident() - before < 50e6
