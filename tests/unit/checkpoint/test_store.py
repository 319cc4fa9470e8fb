"""Checkpoints: what comes back, in every layout and for every reader, and what is refused."""

import json
import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader

from flagdit.checkpoint import folders, store
from flagdit.checkpoint.tensors import Derived, InMemory
from flagdit.errors import CheckpointError
from flagdit.parallel.shards import Shard, whole_shards

TENSORS = {"model": {"w": torch.arange(6.0).view(2, 3)}, "optimizer": {"w.exp_avg": torch.ones(2, 3)}}
STATE = {"batch": 7, "guard": {"bad": 0}, "x": 0.1 + 0.2}


@pytest.fixture
def tmp_path(memory_disk):
    return memory_disk


def empty_like(tensors: dict) -> dict[str, dict[str, torch.Tensor]]:
    return {group: {n: torch.full_like(t, 9) for n, t in named.items()} for group, named in tensors.items()}


def loaded(path, like: dict) -> dict[str, dict[str, torch.Tensor]]:
    found = empty_like(like)
    store.load_into(path, {group: whole_shards(named) for group, named in found.items()})
    return found


def test_what_is_saved_comes_back(tmp_path):
    path = store.save(tmp_path, 1000, TENSORS, STATE, documents={"recipe.yaml": "name: x\n"})
    assert path == tmp_path / "checkpoints/step_00001000" and path == store.latest(tmp_path)
    found = store.load(path)
    assert found.step == 1000 and found.state == STATE and list(found.tensors) == ["model", "optimizer"]
    assert torch.equal(found.tensors["model"]["w"], TENSORS["model"]["w"])
    assert sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()) == [
        "COMPLETE",
        "manifest.json",
        "model/index.json",
        "model/part_00000.safetensors",
        "optimizer/index.json",
        "optimizer/part_00000.safetensors",
        "recipe.yaml",
        "state.json",
    ]
    assert (path / "recipe.yaml").read_text() == "name: x\n"
    assert torch.equal(loaded(path, TENSORS)["optimizer"]["w.exp_avg"], torch.ones(2, 3))


def every_kind() -> dict[str, torch.Tensor]:
    base = torch.randn(4, 6)
    return {
        "base": base,
        "same": base,
        "view": base[1:3],
        "column": base[:, 2],
        "turned": base.t(),
        "scalar": torch.tensor(3.5),
        "bf16": base.bfloat16(),
        "half": base.half(),
        "long": torch.tensor([2**62]),
        "bool": torch.tensor([True, False]),
        "none": torch.empty(0, 3),
        "odd": torch.tensor([0x7FC00001, 0x7F800000, -1], dtype=torch.int32).view(torch.float32),
        "parameter": torch.nn.Parameter(base),
    }


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = (x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(a, b)


def test_every_kind_of_tensor_comes_back_bit_by_bit(tmp_path):
    tensors = every_kind()
    path = store.save(tmp_path, 1, {"g": tensors, "nothing": {}}, {})
    found = store.load(path).tensors
    assert found["nothing"] == {} and set(found["g"]) == set(tensors)
    into = loaded(path, {"g": tensors, "nothing": {}})["g"]
    for name, tensor in tensors.items():
        for back in (found["g"][name], into[name]):
            assert back.dtype == tensor.dtype and back.shape == tensor.shape and same_bits(back, tensor), name
    # a view is stored without the rest of its memory
    assert (path / "g/part_00000.safetensors").stat().st_size < 3500


def test_torchs_own_reader_reads_a_group(tmp_path):
    tensors = every_kind()
    path = store.save(tmp_path, 1, {"ema_0.9": tensors}, {})
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    dcp.load(into, storage_reader=HuggingFaceStorageReader(str(path / "ema_0.9")), no_dist=True)
    assert all(same_bits(into[name], tensor) for name, tensor in tensors.items())


def pieces(whole: torch.Tensor, cuts: list[int]) -> list[Shard]:
    """Shards of flat slices of the left and the right half, as two tensor ranks with ZeRO keep them."""
    shards = []
    for rank, half in enumerate(whole.chunk(2, 1)):
        flat = half.flatten()
        for start, stop in zip([0, *cuts], [*cuts, flat.numel()], strict=True):
            shards.append(
                Shard.slice(whole.shape, flat[start:stop].clone(), start, half.shape, (0, rank * half.shape[1]))
            )
    return shards


def joined(shards: list[Shard]) -> Shard:
    return Shard(shards[0].shape, shards[0].dtype, tuple(part for shard in shards for part in shard.parts))


@pytest.mark.parametrize("read_cuts", [[], [7, 40], [1, 2, 3]])
@pytest.mark.parametrize("write_cuts", [[], [13, 29], [4, 8, 55]])
def test_any_cut_is_read_into_any_other(tmp_path, write_cuts, read_cuts):
    whole = torch.randn(8, 14)
    path = store.save(tmp_path, 1, {"model": {"w": joined(pieces(whole, write_cuts))}}, {})
    assert torch.equal(store.open_group(path, "model").read("w"), whole)
    target = pieces(torch.zeros(8, 14), read_cuts)
    store.load_into(path, {"model": {"w": joined(target)}})
    for shard in target:
        assert all(torch.equal(memory, box.of(whole)) for box, memory in shard.parts)


def test_slabs_are_small_and_make_no_difference(tmp_path, monkeypatch):
    from flagdit.checkpoint import chunks
    from flagdit.checkpoint import dcp as on_disk

    whole = torch.randn(37, 14)
    for module in (chunks, on_disk):
        monkeypatch.setattr(module, "SLAB", 128)
    path = store.save(tmp_path, 1, {"model": {"w": whole}}, {})
    target = pieces(torch.zeros(37, 14), [11, 100])
    store.load_into(path, {"model": {"w": joined(target)}})
    assert all(torch.equal(memory, box.of(whole)) for shard in target for box, memory in shard.parts)
    turned = torch.zeros(14, 37).t()  # a target that is no contiguous memory
    store.load_into(path, {"model": whole_shards({"w": turned})})
    assert torch.equal(turned, whole)


def test_a_source_is_written_one_tensor_at_a_time_and_over_several_files(tmp_path):
    tensors = {f"t{i}": torch.randn(3, i + 1) for i in range(9)}
    source, alive = InMemory(tensors), []
    lazy = Derived(source.entries, lambda name: alive.append(name) or tensors[name].clone())
    path = store.save(tmp_path, 1, {"model": lazy}, {}, files=4)
    assert sorted(alive) == sorted(tensors)
    assert len(list(path.glob("model/part_*.safetensors"))) == 4
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in store.open_group(path, "model").items())


def test_same_content_gives_same_files(tmp_path):
    one, two = (store.save(tmp_path / run, 1, TENSORS, STATE) for run in "ab")
    for file in (p for p in one.rglob("*") if p.is_file()):
        assert file.read_bytes() == (two / file.relative_to(one)).read_bytes()
    assert store.fingerprint(one, "model") == store.fingerprint(two, "model") != store.fingerprint(one, "optimizer")


def test_a_checkpoint_of_another_model_is_refused_and_nothing_is_written(tmp_path):
    path = store.save(tmp_path, 1, {"model": {"a": torch.zeros(2), "weight": torch.zeros(3), "b": torch.ones(1)}}, {})
    into = {"a": torch.full((2,), 5.0), "weight": torch.zeros(9, 9), "bias": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"1 missing \(model/bias\).*\(model/b\).*another shape \(model/weight\)"):
        store.load_into(path, {"model": whole_shards(into)})
    assert into["a"].tolist() == [5, 5]


def test_rectangles_that_leave_a_hole_are_refused(tmp_path):
    whole = torch.randn(8, 14)
    path = store.save(tmp_path, 1, {"model": {"w": joined(pieces(whole, [13])[:-1])}}, {})
    with pytest.raises(CheckpointError, match=r"cover 69 of 112 elements"):
        store.load_into(path, {"model": whole_shards({"w": torch.zeros(8, 14)})})


def test_no_checkpoint_yet(tmp_path):
    assert store.latest(tmp_path) is None and store.latest(tmp_path / "nowhere") is None
    assert store.newest(tmp_path, pytest.fail) is None
    folders.retention(tmp_path, folders.Keep(1))
    folders.clean(tmp_path)
    with pytest.raises(CheckpointError, match="no run folder"):
        store.find(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        store.find(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        store.load(tmp_path / "nowhere")


def test_find_names_the_steps_that_are_there(tmp_path):
    for step in (5, 10):
        store.save(tmp_path, step, TENSORS, STATE)
    assert store.find(tmp_path).name == "step_00000010" and store.find(tmp_path, 5).name == "step_00000005"
    with pytest.raises(CheckpointError, match="steps 5, 10"):
        store.find(tmp_path, 7)


def test_a_part_is_read_and_verified_alone(tmp_path):
    path = store.save(tmp_path, 1, TENSORS, STATE)
    file = path / "optimizer/part_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    part = store.load(path, groups=["model"])
    assert list(part.tensors) == ["model"] and "w" in part.tensors["model"]
    with pytest.raises(CheckpointError, match="only model"):
        part.tensors["ema_0.9"]
    with pytest.raises(CheckpointError, match="the content of optimizer/part_00000"):
        store.load(path)
    assert "optimizer" in store.load(path, hashes=False).tensors


def test_other_formats_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "FORMAT", 99)
    path = store.save(tmp_path, 1, TENSORS, STATE)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format 99"):
        store.load(path)


def test_nothing_is_pickled(tmp_path):
    path = store.save(tmp_path, 1, TENSORS, STATE)
    for file in (p for p in path.rglob("*") if p.is_file()):
        assert not file.read_bytes()[:2].startswith((b"\x80", b"PK")), file.name
    json.loads((path / "state.json").read_text())


MEMORY = """
import resource, sys, torch
from pathlib import Path
from flagdit.checkpoint import store
from flagdit.parallel.shards import Shard, whole_shards
def peak():
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
def now():
    Path("/proc/self/clear_refs").write_text("5")
    return peak()
store.save(sys.argv[1] + "/warm", 1, {"g": {"w": torch.zeros(3)}}, {})
w = torch.ones(4096, 16384)  # 256 MiB
half = [Shard.slice(w.shape, part.flatten(), 0, part.shape, (0, 8192 * i)) for i, part in enumerate(w.chunk(2, 1))]
del w
shard = Shard(half[0].shape, half[0].dtype, tuple(part for s in half for part in s.parts))
before = now()
path = store.save(sys.argv[1], 1, {"g": {"w": shard}}, {})
print("save", (peak() - before) // 1024)
flat = torch.zeros(4096 * 16384 - 10000)
target = Shard.slice((4096, 16384), flat, 5000, (4096, 16384), (0, 0))
before = now()
store.load_into(path, {"g": {"w": target}})
print("load", (peak() - before) // 1024)
assert flat.eq(1).all()
"""


def test_memory_beside_the_state_is_one_slab(tmp_path):
    """256 MiB are saved and loaded, from columns into rows, with at most a slab of 64 MiB, and some change, beside."""
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    used = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()}
    assert used["save"] < 24 and used["load"] < 64 + 24, used
