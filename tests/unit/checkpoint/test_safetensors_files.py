"""Streaming safetensors: what the library reads and writes, in another way."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flagdit.checkpoint.safetensors_files import SafetensorsFiles, open_sharded, write_file, write_sharded
from flagdit.checkpoint.tensors import InMemory, cast, in_order
from flagdit.errors import CheckpointError

TENSORS = {
    "blocks.10.w": torch.randn(3, 5),
    "blocks.2.w": torch.randn(4),
    "half": torch.randn(7).bfloat16(),
    "sixteen": torch.randn(3, 1, 2).half(),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "flag": torch.tensor([True, False, True]),
    "long": torch.tensor([1, -(2**40)]),
    "view": torch.randn(6, 4).t(),
}


def same(found, wanted) -> bool:
    return found.keys() == wanted.keys() and all(
        torch.equal(found[n], x) and found[n].dtype == x.dtype for n, x in wanted.items()
    )


def test_the_library_reads_what_is_written(tmp_path):
    seen = []
    record = write_file(tmp_path / "a.safetensors", InMemory(TENSORS), {"key": "value"}, seen.append)
    assert same(load_file(tmp_path / "a.safetensors"), TENSORS)
    assert record["bytes"] == (tmp_path / "a.safetensors").stat().st_size
    assert sum(seen) == sum(x.nbytes for x in TENSORS.values())
    with safe_open(tmp_path / "a.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt", "key": "value"}


def test_what_the_library_writes_is_read(tmp_path):
    contiguous = {n: x.contiguous() for n, x in TENSORS.items()}
    save_file(contiguous, tmp_path / "a.safetensors", metadata={"rank": "3"})
    source = SafetensorsFiles(tmp_path / "a.safetensors")
    assert same(dict(source.items()), TENSORS) and source.metadata == {"rank": "3"}


def test_bytes_depend_on_the_tensors_alone(tmp_path):
    one = write_file(tmp_path / "a.safetensors", InMemory(TENSORS))
    other = write_file(tmp_path / "b.safetensors", InMemory(dict(reversed(TENSORS.items()))))
    assert one == other
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_order_is_that_of_numbers_and_aligned():
    names = in_order(InMemory({f"blocks.{i}.w": torch.zeros(1) for i in (10, 9, 2)} | {"a": torch.zeros(1).half()}))
    assert names == ["blocks.2.w", "blocks.9.w", "blocks.10.w", "a"]


def test_shards_and_their_index(tmp_path):
    (tmp_path / "many").mkdir()
    (tmp_path / "one").mkdir()
    records = write_sharded(tmp_path / "many", "model", InMemory(TENSORS), 60)
    files = sorted(n for n in records if n.endswith(".safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in TENSORS.values())
    assert same(dict(open_sharded(tmp_path / "many", "model").items()), TENSORS)
    assert list(write_sharded(tmp_path / "one", "model", InMemory(TENSORS), 10**9)) == ["model.safetensors"]
    assert same(dict(open_sharded(tmp_path / "one", "model").items()), TENSORS)


def test_damaged_files_are_refused(tmp_path):
    write_file(tmp_path / "whole.safetensors", InMemory(TENSORS))
    raw = (tmp_path / "whole.safetensors").read_bytes()
    for damaged in (b"", raw[:4], raw[:100], raw[:-1], raw + b"x", b"\xff" * 8 + raw[8:]):
        (tmp_path / "a.safetensors").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="not a whole safetensors file"):
            SafetensorsFiles(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        SafetensorsFiles(tmp_path / "nowhere.safetensors")


def test_shards_that_do_not_match_their_index_are_refused(tmp_path):
    write_sharded(tmp_path, "model", InMemory(TENSORS), 60)
    index_file = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    some = next(iter(index["weight_map"].values()))
    for change, told in (
        ({"surprise": some}, "disagree about surprise"),
        ({"w": "../elsewhere.safetensors"}, "outside its folder"),
        ({"w": "model-00099-of-00099.safetensors"}, "not there"),
    ):
        index_file.write_text(json.dumps({"weight_map": index["weight_map"] | change}))
        with pytest.raises(CheckpointError, match=told):
            open_sharded(tmp_path, "model")
    index_file.write_text("{}")
    with pytest.raises(CheckpointError, match="index cannot be read"):
        open_sharded(tmp_path, "model")
    with pytest.raises(CheckpointError, match="is in"):
        SafetensorsFiles(tmp_path / some, tmp_path / some)


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    write_file(tmp_path / "a.safetensors", InMemory({"w": torch.randn(1000)}))
    source = SafetensorsFiles(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="ends inside w"):
        source.read("w")


def test_cast():
    assert cast(InMemory(TENSORS), None).entries["half"].dtype == torch.bfloat16
    as_fp32 = cast(InMemory({"half": TENSORS["half"]}), torch.float32)
    assert torch.equal(as_fp32.read("half"), TENSORS["half"].float())
