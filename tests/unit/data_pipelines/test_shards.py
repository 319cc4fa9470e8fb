"""Shards: equal bytes, read by stock webdataset, checked on reading, hostile content refused."""

import errno
import io
import os
import pickle
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from flagdit.data_pipelines.shards import (
    Sample,
    ShardReader,
    atomic,
    npy_bytes,
    read_npy,
    split_members,
    write_shard,
)
from flagdit.errors import DataError

LATENT = np.arange(12, dtype=np.float32).reshape(3, 1, 2, 2)


def samples() -> list[Sample]:
    return [
        Sample(
            f"emoji/{i:02d}", {"txt": f"Wörter {i}".encode(), "latent.npy": npy_bytes(LATENT + i)}, (3, 1, 2, 2), i, i
        )
        for i in range(5)
    ]


def test_equal_samples_give_equal_bytes(tmp_path: Path):
    first = write_shard(tmp_path / "a.tar", samples())
    time.sleep(1.1)  # tar stores whole seconds
    assert write_shard(tmp_path / "b.tar", samples()) == first
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "b.tar"], "nothing staged is left"


def test_stock_webdataset_reads_a_shard(tmp_path: Path):
    import webdataset

    write_shard(tmp_path / "a.tar", samples())
    read = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False).decode())
    assert [r["__key__"] for r in read] == [s.key for s in samples()]
    assert read[2]["txt"] == "Wörter 2"
    np.testing.assert_array_equal(read[2]["latent.npy"], LATENT + 2)


def test_each_sample_is_read_by_its_row(tmp_path: Path):
    rows = write_shard(tmp_path / "a.tar", samples())
    reader = ShardReader(tmp_path)
    for sample, row in reversed(list(zip(samples(), rows, strict=True))):
        members = split_members(reader.span("a", row.offset, row.nbytes, row.xxh3))
        assert {k: bytes(v) for k, v in members.items()} == sample.members
        assert (row.key, row.shape, row.text_tokens, row.label) == (sample.key, sample.shape, *[sample.label] * 2)


def test_many_shards_stay_within_the_limit_of_open_files(tmp_path: Path):
    row = write_shard(tmp_path / "s0.tar", samples())[0]
    for i in range(1, 100):
        os.link(tmp_path / "s0.tar", tmp_path / f"s{i}.tar")
    before = len(os.listdir("/proc/self/fd"))
    reader = ShardReader(tmp_path)
    for i in range(100):
        reader.span(f"s{i}", row.offset, row.nbytes, row.xxh3)
    assert len(os.listdir("/proc/self/fd")) - before <= 64
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("where", [0, 600, -1])
def test_one_changed_byte_is_found(tmp_path: Path, where: int):
    row = write_shard(tmp_path / "a.tar", samples())[3]
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[row.offset + (where if where >= 0 else row.nbytes - 1)] ^= 1
    (tmp_path / "a.tar").write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"/a\.tar: checksum"):
        ShardReader(tmp_path).span("a", row.offset, row.nbytes, row.xxh3)


def test_truncated_and_missing_shards(tmp_path: Path):
    row = write_shard(tmp_path / "a.tar", samples())[4]
    os.truncate(tmp_path / "a.tar", row.offset + 700)
    with pytest.raises(DataError, match=rf"/a\.tar: ends at byte {row.offset + 700}"):
        ShardReader(tmp_path).span("a", row.offset, row.nbytes, row.xxh3)
    with pytest.raises(DataError, match=r"/b\.tar: cannot be read: No such file"):
        ShardReader(tmp_path).span("b", 0, 10, 0)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_leaves_what_stood_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int):
    (tmp_path / "a.tar").write_bytes(b"before")

    def fail(fd: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    expected = "Free some space" if code == errno.ENOSPC else "Make the folder writable"
    with pytest.raises(DataError, match=rf"a\.tar: cannot be written: .*{expected}"):
        write_shard(tmp_path / "a.tar", samples())
    assert os.listdir(tmp_path) == ["a.tar"] and (tmp_path / "a.tar").read_bytes() == b"before"


def test_an_error_in_the_body_writes_nothing(tmp_path: Path):
    with pytest.raises(KeyError), atomic(tmp_path / "x") as file:
        file.write(b"half")
        raise KeyError
    assert os.listdir(tmp_path) == []


def tar_of(*files: tarfile.TarInfo | tuple[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for file in files:
            if isinstance(file, tarfile.TarInfo):
                tar.addfile(file)
            else:
                info = tarfile.TarInfo(file[0])
                info.size = len(file[1])
                tar.addfile(info, io.BytesIO(file[1]))
        end = tar.offset
    return stream.getvalue()[:end]


def link(kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo("a.txt")
    info.type, info.linkname = kind, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    "span",
    [
        b"garbage",
        b"\0" * 512,
        tar_of(link(tarfile.SYMTYPE)),
        tar_of(link(tarfile.LNKTYPE)),
        tar_of(("a.txt", b"1"), ("b.json", b"2")),
        tar_of(("a.txt", b"1"), ("a.txt", b"2")),
        tar_of(("a.txt", b"x" * 2000))[:1024],
        tar_of(("a.txt", b"1")).replace(b"00000000001\0", b"9999999999z\0", 1),
    ],
    ids=["garbage", "zeros", "symlink", "hardlink", "two keys", "doubled", "cut off", "broken size"],
)
def test_hostile_spans_are_refused(span: bytes):
    with pytest.raises(DataError):
        split_members(span)


def test_names_never_become_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert bytes(split_members(tar_of(("../../evil.txt", b"1")))["txt"]) == b"1"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", "<i4", "|u1"])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3), (3, 1, 2, 2)])
def test_npy_round_trip(dtype: str, shape: tuple[int, ...]):
    array = np.ones(shape, dtype)
    np.testing.assert_array_equal(read_npy(memoryview(npy_bytes(array))), array)
    np.testing.assert_array_equal(np.load(io.BytesIO(npy_bytes(array)), allow_pickle=False), array)


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def hostile_npy() -> dict[str, bytes]:
    def with_header(header: str, body: bytes = b"") -> bytes:
        return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + body

    stream = io.BytesIO()
    np.save(stream, np.array([Bomb()], dtype=object), allow_pickle=True)
    return {
        "empty": b"",
        "pickle": pickle.dumps(Bomb()),
        "object": stream.getvalue(),
        "huge": with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}", b"1234"),
        "negative": with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -1)}", b"1234"),
        "code": with_header("__import__('os').mkdir('exploded')"),
        "nested": with_header("(" * 5000),
        "strings": with_header("{'descr': '<U1', 'fortran_order': False, 'shape': (1,)}", b"1234"),
        "no shape": with_header("{'descr': '<f4', 'fortran_order': False}", b"1234"),
        "cut": npy_bytes(LATENT)[:-1],
    }


@pytest.mark.parametrize("name", hostile_npy())
def test_hostile_npy_is_refused_and_runs_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError):
        read_npy(memoryview(hostile_npy()[name]))
    assert os.listdir(tmp_path) == []
