"""Hostile data in training: latents that lie, and processes that die, run out of memory or stall. What cannot be read
is left out by name, nothing steps in for it, and what stops a run costs it no sample."""

import os
import signal
import struct
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from flagdit.config.schema import LimitsConfig
from flagdit.data_pipelines.index import Dataset
from flagdit.data_pipelines.lint import lint
from flagdit.data_pipelines.loader import build_loader
from flagdit.data_pipelines.mixture import Mixture
from flagdit.errors import DataError

from .synthetic import make_set, recipe_for

CANARY = "executed"


def spoiled(folder: Path, sample_id: int, member: bytes) -> Path:
    """An encoded data set in which a sample's latent is replaced by other bytes, with a right checksum."""
    dataset = Dataset.open(folder)
    offset, nbytes = (int(dataset.columns[c][sample_id]) for c in ("offset", "nbytes"))
    shard = folder / "shards" / f"{dataset.shard_names[dataset.columns['shard'][sample_id]]}.tar"
    data = bytearray(shard.read_bytes())
    at = data.index(b"\x93NUMPY", offset)
    data[at : at + len(member)] = member
    shard.write_bytes(bytes(data))
    columns = np.load(folder / "index/xxh3.npy")
    columns[sample_id] = xxhash.xxh3_64_intdigest(bytes(data[offset : offset + nbytes]))
    np.save(folder / "index/xxh3.npy", columns)
    return folder


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text.encode()


ENCODED = {
    "pickled latent": (header("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}".ljust(118)), "numeric .npy"),
    "latent of ten terabytes": (
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 1, 1000000, 1000000)}".ljust(118)),
        "bytes for shape",
    ),
    "latent whose header runs": (header("__import__('os').system('touch executed')".ljust(118)), "not a .npy file"),
    "latent of another shape": (
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 1, 2, 8)}".ljust(117) + "\n"),
        "its index row says",
    ),
    "latent of NaN": (
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 1, 4, 4)}".ljust(117) + "\n") + b"\xff" * 12,
        "NaN or infinity",
    ),
}


@pytest.mark.parametrize("case", ENCODED)
def test_hostile_latents_are_left_out_of_training(case: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    member, reason = ENCODED[case]
    make_set(tmp_path / "set", 20, shapes=((3, 1, 4, 4),))
    folder = spoiled(tmp_path / "set", 5, member)
    loader = build_loader(recipe_for({str(folder): 1}, batch_size=4, max_bad_samples=0.1))
    seen = [s.sample_id for _ in range(5) for pack in next(loader) for s in pack.segments]
    assert sorted(seen) == [i for i in range(20) if i != 5], "left out, and none in its place"
    ((bad,),) = [loader.bad]
    assert bad.sample_id == 5 and reason in bad.reason
    assert [f.where for f in lint(folder)] == [Dataset.open(folder).key(5)]
    assert not list(tmp_path.rglob(CANARY))


STOPS = {
    "worker killed": (
        lambda: os.kill(os.getpid(), signal.SIGKILL),
        r"1 of 1 loader processes died.*lower data\.workers",
    ),
    "worker out of memory": (lambda: np.ones(1 << 50), r"ran out of memory.*lower data\."),
    "source that stalls": (lambda: time.sleep(60), r"nothing was read in 1 s \(limits\.stall_seconds\)"),
}


@pytest.mark.parametrize("case", STOPS)
def test_what_stops_a_run_costs_it_no_sample(case: str, tmp_path: Path, monkeypatch):
    happens, told = STOPS[case]
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)
    make_set(tmp_path / "set", 20)
    recipe = recipe_for({str(tmp_path / "set"): 1}, batch_size=4, workers=1)
    recipe = replace(recipe, limits=LimitsConfig(stall_seconds=1))
    reference = build_loader(replace(recipe, data=replace(recipe.data, workers=0)))
    expected = [next(reference)[0].segments for _ in range(5)]
    third, read = expected[3][1].sample_id, Mixture.read

    def failing(self: Mixture, sample_id: int, epoch: int = 0):
        if sample_id == third:
            happens()
        return read(self, sample_id, epoch)

    seen = []
    with monkeypatch.context() as m:
        m.setattr(Mixture, "read", failing)
        loader = build_loader(recipe)
        start = time.monotonic()
        with pytest.raises(DataError, match=told):
            while True:
                seen.append(next(loader)[0].segments)
        assert time.monotonic() - start < 30, "it hangs"
    assert loader.bad == [] and loader.step == len(seen), "a fault of the machine is no fault of a sample"
    again = build_loader(recipe, loader.step)
    seen += [next(again)[0].segments for _ in range(5 - loader.step)]
    assert seen == expected, "as if nothing had happened"
