"""Data sets by address: the same samples, copied into a bounded cache, and no address that runs anything."""

import pickle
from pathlib import Path

import fsspec
import pytest
import torch

from flagdit.data_pipelines import remote
from flagdit.data_pipelines.index import Dataset
from flagdit.data_pipelines.loader import build_loader
from flagdit.data_pipelines.remote import GIB, Cache
from flagdit.errors import DataError

from .synthetic import make_set, recipe_for


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A data set of 42 samples in six shards, in fsspec's store in memory."""
    make_set(tmp_path / "made", 42)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "made"), "/bucket/set", recursive=True)
    yield "memory://bucket/set"
    memory.rm("/bucket", recursive=True)


def test_the_same_samples_as_on_disk(url, tmp_path):
    local, far = Dataset.open(tmp_path / "made"), Dataset.open(url, cache=Cache(str(tmp_path / "cache"), 1))
    assert len(far) == 42 and not list((tmp_path / "cache").rglob("*.tar")), "shards come when they are needed"
    for i in (0, 20, 41):
        assert torch.equal(far.read(i).latent_CFHW, local.read(i).latent_CFHW)
    assert len(list((tmp_path / "cache").rglob("*.tar"))) == 3
    again = pickle.loads(pickle.dumps(far))
    assert torch.equal(again.read(7).latent_CFHW, local.read(7).latent_CFHW)


def test_training_reads_it_and_the_cache_stays_in_bounds(url, tmp_path):
    size = max(p.stat().st_size for p in (tmp_path / "made/shards").iterdir())
    limits = {"cache": str(tmp_path / "cache"), "cache_gib": 2.5 * size / GIB}
    near = build_loader(recipe_for({str(tmp_path / "made"): 1}, batch_size=6))
    far = build_loader(recipe_for({url: 1}, batch_size=6, **limits))
    for _ in range(14):
        (a,), (b,) = next(near), next(far)
        assert a.segments == b.segments and torch.equal(a.patches["image"], b.patches["image"])
        kept = list((tmp_path / "cache").rglob("*.tar"))
        assert sum(p.stat().st_size for p in kept) <= 2.5 * size
    assert 1 <= len(kept) < 6


def test_a_data_set_that_was_made_anew_is_fetched_anew(url, tmp_path):
    cache = Cache(str(tmp_path / "cache"), 1)
    Dataset.open(url, cache=cache).read(0)
    other = make_set(tmp_path / "other", 20, seed=5)
    memory = fsspec.filesystem("memory")
    memory.rm("/bucket/set", recursive=True)
    memory.put(str(tmp_path / "other"), "/bucket/set", recursive=True)
    again = Dataset.open(url, cache=cache)
    assert len(again) == 20 and torch.equal(again.read(3).latent_CFHW, other.read(3).latent_CFHW)


def test_a_shard_that_cannot_be_had_is_a_bad_sample_and_passing_faults_are_not(url, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "WAIT", 0.001)
    far = Dataset.open(url, cache=Cache(str(tmp_path / "cache"), 1))
    fsspec.filesystem("memory").rm("/bucket/set/shards/train-000002.tar")
    with pytest.raises(DataError, match="cannot be read"):
        far.read(15)
    real, calls = fsspec.open, []

    def flaky(*args, **kwargs):
        calls.append(args)
        if len(calls) < 3:
            raise OSError("connection reset")
        return real(*args, **kwargs)

    monkeypatch.setattr(fsspec, "open", flaky)
    far.read(0)
    assert len(calls) == 3


@pytest.mark.parametrize(
    "address", ["pipe://cat /etc/passwd", "ssh://host/x", "simplecache::memory://bucket/set", "zip://x"]
)
def test_only_stores_are_read(address, tmp_path):
    with pytest.raises(DataError, match="is not read"):
        Dataset.open(address, cache=Cache(str(tmp_path), 1))


def test_no_such_place(tmp_path):
    with pytest.raises(DataError, match=r"cannot be fetched.*s3fs"):
        Dataset.open("memory://nowhere/set", cache=Cache(str(tmp_path), 1))
    with pytest.raises(DataError, match="Copy the data set first"):
        Dataset.open("memory://nowhere/set")
