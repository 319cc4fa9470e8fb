"""The loader: the same batches under every layout and from every start; bad samples left out, recorded and limited."""

import os
import signal
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from flagdit.batch import PackedBatch
from flagdit.data_pipelines import loader as loader_module
from flagdit.data_pipelines import packs as packs_module
from flagdit.data_pipelines import parcel
from flagdit.data_pipelines.batches import Batches
from flagdit.data_pipelines.index import Dataset
from flagdit.data_pipelines.loader import build_loader, validation_batches
from flagdit.data_pipelines.mixture import Mixture
from flagdit.errors import DataError, RecipeError
from flagdit.model.tokens import TokenSpec, unpack


def take(recipe, number: int, start: int = 0) -> list[list[PackedBatch]]:
    return list(islice(build_loader(recipe, start), number))


def contents(packs: list[PackedBatch], patch_size: int = 2) -> list[tuple]:
    """(segment, latent, text) of every sample, by epoch and id."""
    found = []
    for pack in packs:
        latents = unpack(pack.patches, pack.segments, TokenSpec(patch_size, True, True))
        found += list(zip(pack.segments, latents, pack.text.unpack(), strict=True))
    return sorted(found, key=lambda x: (x[0].epoch, x[0].sample_id))


def equal(a: list[PackedBatch], b: list[PackedBatch]) -> bool:
    return len(contents(a)) == len(contents(b)) and all(
        x[0] == y[0] and torch.equal(x[1], y[1]) and torch.equal(x[2], y[2])
        for x, y in zip(contents(a), contents(b), strict=True)
    )


def test_batches_hold_the_samples_of_the_order(recipe, emoji_encoded: Path):
    dataset = Dataset.open(emoji_encoded)
    order = Batches(recipe, Mixture({str(emoji_encoded): 1.0}))
    seen = []
    for k, packs in enumerate(take(recipe, 7)):
        ((part,),) = order.shared(k, 1, 1)
        (batch,) = packs
        assert [s.sample_id for s in batch.segments] == part.ids.tolist()
        assert [s.epoch for s in batch.segments] == part.epochs.tolist()
        seen += [(s.epoch, s.sample_id) for s in batch.segments]
        latents = unpack(batch.patches, batch.segments, TokenSpec.from_model(recipe.model))
        for segment, latent, text in zip(batch.segments, latents, batch.text.unpack(), strict=True):
            sample = dataset.read(segment.sample_id)
            assert torch.equal(latent, sample.latent_CFHW) and torch.equal(text, sample.text_LY)
            assert segment.key == sample.key and segment.modality == "image" and batch.labels_S is None
    assert sorted(seen) == [(epoch, i) for epoch in range(2) for i in range(21)]


@pytest.mark.parametrize(("workers", "accumulation", "start"), [(0, 2, 0), (0, 3, 5), (2, 1, 0), (2, 2, 4), (2, 1, 7)])
def test_no_layout_and_no_start_changes_a_batch(
    workers: int, accumulation: int, start: int, make_recipe, emoji_encoded: Path
):
    reference = take(make_recipe(emoji_encoded), 9)
    for k, packs in enumerate(
        take(make_recipe(emoji_encoded, 6, accumulation, workers), 9 - start, start), start=start
    ):
        assert len(packs) == accumulation and {len(p.segments) for p in packs} == {6 // accumulation}
        assert equal(packs, reference[k])


@pytest.mark.parametrize(("ranks", "accumulation", "workers"), [(2, 1, 0), (3, 2, 0), (2, 3, 1), (6, 1, 0)])
def test_ranks_share_out_the_same_batches(ranks, accumulation, workers, make_recipe, emoji_encoded: Path):
    recipe = make_recipe(emoji_encoded, 6, accumulation, workers)
    reference = take(make_recipe(emoji_encoded), 5)
    loaders = [build_loader(recipe, 1, rank, ranks) for rank in range(ranks)]
    for k in range(1, 5):
        shares = [next(loader) for loader in loaders]
        assert all(len(packs) == accumulation for packs in shares)
        assert all(len(p.segments) == 6 // (ranks * accumulation) for packs in shares for p in packs)
        together = [packs[a] for a in range(accumulation) for packs in shares]
        assert equal(together, reference[k])


def test_batches_that_cannot_be_shared_out_name_what_fits(make_recipe, emoji_encoded: Path):
    with pytest.raises(
        RecipeError, match=r"data\.batch_size=6 .* 4 data ranks.*accumulation=1\. Try data\.batch_size=4 or 8\.$"
    ):
        build_loader(make_recipe(emoji_encoded), 0, 0, 4)
    with pytest.raises(
        RecipeError, match=r"3 data ranks.*accumulation=4\. Try data\.batch_size=12, or train\.accumulation=1 or 2"
    ):
        build_loader(make_recipe(emoji_encoded, 6, 4), 0, 0, 3)


def test_a_pack_without_a_readable_sample_is_weightless(recipe, make_recipe, with_block, emoji_encoded: Path, copy_of):
    folder = copy_of(emoji_encoded)
    ids = [s.sample_id for s in take(make_recipe(emoji_encoded, 6, 3), 1)[0][1].segments]
    broken = with_block(make_recipe(damaged(folder, *ids), 6, 3), "data", max_bad_samples=1.0)
    packs = next(build_loader(broken))
    assert [p.weightless for p in packs] == [False, True, False]
    (segment,) = packs[1].segments
    assert segment.shape == (3, 1, 2, 2) and not packs[1].patches["image"].any()
    assert torch.equal(packs[1].text.features_MY, Dataset.open(folder).null_text)
    classes = with_block(broken, "model", num_classes=10, text_dim=0, modalities={"image": 3, "video": 5})
    pack = packs_module.placeholder(Mixture({str(folder): 1.0}), classes)
    assert pack.labels_S.tolist() == [10, 10] and pack.text is None and pack.weightless
    assert {m: x.shape for m, x in pack.patches.items()} == {"image": (1, 12), "video": (1, 20)}


def test_validation_is_shared_out(recipe, with_block):
    train = with_block(recipe, "validation", split="train", samples=7)
    whole = [s.sample_id for b in validation_batches(train) for s in b.segments]
    for ranks in (2, 3, 6):
        shares = [validation_batches(train, rank, ranks) for rank in range(ranks)]
        assert len({len(packs) for packs in shares}) == 1
        seen = [s.sample_id for packs in shares for b in packs if not b.weightless for s in b.segments]
        assert sorted(seen) == whole


def test_a_split_that_does_not_begin_at_zero(recipe, with_block):
    held = with_block(recipe, "data", split="heldout", batch_size=3)
    assert [sorted(s.sample_id for s in packs[0].segments) for packs in take(held, 2)] == [[21, 22, 23]] * 2


def test_another_seed_is_another_order(recipe, make_recipe, emoji_encoded: Path):
    a, b = take(recipe, 1)[0][0], take(replace(recipe, seed=1), 1)[0][0]
    assert [s.sample_id for s in a.segments] != [s.sample_id for s in b.segments]


def test_state_is_one_integer(recipe):
    loader = build_loader(recipe, 4)
    next(loader)
    assert loader.step == 5
    assert equal(next(loader), next(build_loader(recipe, loader.step - 1)))


def test_loading_leaves_the_global_generator_alone(recipe):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(recipe, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_labels_for_class_models(recipe, with_block, emoji_encoded: Path):
    (batch,) = take(with_block(recipe, "model", num_classes=10, text_dim=0), 1)[0]
    dataset = Dataset.open(emoji_encoded)
    assert batch.text is None
    assert batch.labels_S.tolist() == [dataset.columns["label"][s.sample_id] for s in batch.segments]


def damaged(folder: Path, *sample_ids: int) -> Path:
    dataset = Dataset.open(folder)
    for i in sample_ids:
        shard = folder / "shards" / f"{dataset.shard_names[dataset.columns['shard'][i]]}.tar"
        data = bytearray(shard.read_bytes())
        data[int(dataset.columns["offset"][i]) + 1100] ^= 1
        shard.write_bytes(bytes(data))
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_left_out_and_recorded_once(
    workers: int, make_recipe, with_block, emoji_encoded: Path, copy_of
):
    folder = damaged(copy_of(emoji_encoded), 4, 9)
    recipe = with_block(make_recipe(folder, 6, 2, workers), "data", max_bad_samples=0.1)
    clean = take(make_recipe(emoji_encoded, 6, 2), 9)
    loader = build_loader(recipe)
    seen = []
    for expected, packs in zip(clean, islice(loader, 9), strict=True):
        for before, pack in zip(expected, packs, strict=True):
            ids = [s.sample_id for s in pack.segments]
            assert ids == [s.sample_id for s in before.segments if s.sample_id not in (4, 9)], "no neighbour steps in"
            seen += ids
    assert len(seen) == 9 * 6 - sum(
        i in (4, 9) for packs in clean for p in packs for i in [s.sample_id for s in p.segments]
    )
    assert sorted(b.sample_id for b in loader.bad) == [4, 9]
    assert all(b.key == Dataset.open(folder).key(b.sample_id) and "checksum" in b.reason for b in loader.bad)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_stop_the_run(workers: int, make_recipe, with_block, emoji_encoded: Path, copy_of):
    folder = damaged(copy_of(emoji_encoded), 4, 9, 11)
    recipe = with_block(make_recipe(folder, workers=workers), "data", max_bad_samples=0.1)
    message = (
        r"3 of 21 samples cannot be read, more than data\.max_bad_samples=0\.1.*checksum.*encode the data set again"
    )
    with pytest.raises(DataError, match=message):
        take(recipe, 9)


def test_a_batch_that_is_mostly_unreadable_stops_the_run(make_recipe, with_block, emoji_encoded: Path, copy_of):
    folder = copy_of(emoji_encoded)
    recipe = with_block(make_recipe(folder), "data", max_bad_samples=1.0)
    loader = build_loader(recipe)
    next(loader)
    for name in os.listdir(folder / "shards"):
        os.truncate(folder / "shards" / name, 0)
    with pytest.raises(DataError, match="6 of the 6 samples of one batch cannot be read"):
        next(loader)


def test_a_dead_worker_is_one_paragraph(make_recipe, emoji_encoded: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loader_module, "MP_STATUS_CHECK_INTERVAL", 0.5)
    loader = build_loader(make_recipe(emoji_encoded, workers=1))
    next(loader)
    handler = signal.getsignal(signal.SIGCHLD)
    assert not getattr(handler, "__module__", "").startswith("torch"), "it would raise anywhere in a step"
    (worker,) = loader._loaded._workers
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"1 of 1 loader processes died.*lower data\.workers"):
        for _ in range(100):
            next(loader)


def test_a_worker_that_dies_before_it_sends_anything_is_noticed_within_seconds(
    make_recipe, emoji_encoded: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loader_module, "MP_STATUS_CHECK_INTERVAL", 0.5)
    monkeypatch.setattr(Mixture, "read", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    recipe = make_recipe(emoji_encoded, workers=1)
    assert recipe.limits.stall_seconds >= 300
    loader = build_loader(recipe)
    began = time.monotonic()
    with pytest.raises(DataError, match="1 of 1 loader processes died"):
        next(loader)
    assert time.monotonic() - began < 30


def test_unsuitable_data_is_refused_before_any_batch(recipe, with_block, emoji_raw: Path):
    with pytest.raises(DataError, match=r"modalities\.image=4"):
        build_loader(with_block(recipe, "model", modalities={"image": 4}))
    with pytest.raises(DataError, match="not encoded"):
        build_loader(with_block(recipe, "data", path=str(emoji_raw)))


def test_validation_is_the_same_every_time(recipe, with_block, emoji_encoded: Path):
    ids = [[s.sample_id for b in validation_batches(recipe) for s in b.segments] for _ in range(2)]
    assert ids[0] == ids[1] == [21, 22, 23]
    few = with_block(recipe, "validation", samples=2)
    assert [s.sample_id for b in validation_batches(few) for s in b.segments] == [21, 22]
    train = with_block(with_block(recipe, "validation", split="train", samples=7), "data", batch_size=6)
    batches = validation_batches(with_block(train, "train", accumulation=2))
    assert [s.sample_id for b in batches for s in b.segments] == [0, 3, 6, 9, 12, 15, 18]
    assert [len(b.segments) for b in batches] == [3, 3, 1]


def test_validation_refuses_bad_samples_and_unsuitable_data(recipe, with_block, emoji_encoded: Path, copy_of):
    folder = damaged(copy_of(emoji_encoded), 22)
    with pytest.raises(DataError, match="checksum"):
        validation_batches(with_block(recipe, "validation", path=str(folder)))
    with pytest.raises(DataError, match=r"validation\.split=test"):
        validation_batches(with_block(recipe, "validation", split="test"))


def test_packs_travel_in_one_block_and_come_out_the_same(recipe, with_block, monkeypatch: pytest.MonkeyPatch):
    for keys in ({}, {"num_classes": 10, "text_dim": 0}):
        (batch,) = take(with_block(recipe, "model", **keys), 1)[0]
        travelling = packs_module.Loaded([batch, batch], []).wrapped(parcel.Blocks())
        assert travelling.blocks[0].is_shared() and not torch.is_tensor(travelling.packs[0].patches["image"])
        pinned: list[torch.Tensor] = []
        with monkeypatch.context() as m:
            m.setattr(torch.Tensor, "pin_memory", lambda self, to=pinned: to.append(self) or self.clone())
            travelling = travelling.pin_memory()
        assert len(pinned) == 1, "one block, not ten tensors"
        for again in travelling.unwrapped().packs:
            assert again.segments == batch.segments and again.layout.seqlens == batch.layout.seqlens
            for name, value in vars(batch.layout).items():
                for a, b in zip(_tensors(value), _tensors(getattr(again.layout, name)), strict=True):
                    assert a.dtype == b.dtype and torch.equal(a, b), name
            assert torch.equal(again.patches["image"], batch.patches["image"])
            assert batch.text is None or torch.equal(again.text.features_MY, batch.text.features_MY)
            assert batch.labels_S is None or torch.equal(again.labels_S, batch.labels_S)


def test_a_block_is_used_again_when_its_last_tensor_is_gone(recipe, with_block):
    blocks = parcel.Blocks()
    (pack,) = take(with_block(recipe, "model", num_classes=10, text_dim=0), 1)[0]

    def send() -> packs_module.Loaded:
        patches = blocks.empty(*pack.patches["image"].shape).copy_(pack.patches["image"])
        sent = packs_module.Loaded([replace(pack, patches={"image": patches})], []).wrapped(blocks)
        assert sent.packs[0].patches["image"].start == parcel.ALIGNED, "patches are where they were made"
        return sent

    def memory(sent: packs_module.Loaded) -> int:
        (block,) = sent.blocks
        return block.data_ptr()

    first = send()
    used = memory(first)
    second = send()
    assert memory(second) != used, "in use, on its way"
    arrived = first.unwrapped().packs[0]
    row = arrived.patches["image"][1:2].T
    del first, arrived
    third = send()
    assert memory(third) not in (used, memory(second)), "in use, for one row"
    assert torch.equal(row, pack.patches["image"][1:2].T)
    del row
    assert memory(send()) == used


def test_a_forked_process_gives_no_block_back(recipe, with_block):
    (pack,) = take(with_block(recipe, "model", num_classes=10, text_dim=0), 1)[0]
    travelling = packs_module.Loaded([pack], []).wrapped(parcel.Blocks())
    (block,) = travelling.blocks
    arrived = travelling.unwrapped()
    if (child := os.fork()) == 0:
        del arrived
        os._exit(0)
    os.waitpid(child, 0)
    assert block[0] == 1, "the child let go of its copies only"
    del arrived
    assert block[0] == 0


def test_blocks_grow_with_the_batches():
    blocks, many = parcel.Blocks(), parcel.SMALLEST // 4

    def made(*counts: int) -> list[torch.Tensor]:
        tensors = [blocks.empty(n).fill_(i) for i, n in enumerate(counts)]
        assert all(x.eq(i).all() for i, x in enumerate(tensors)), "none over another"
        return blocks.hand_over()

    (small,) = made(10, 20)
    assert small.nbytes == parcel.ALIGNED * (1 + 1 + 2), "what is used of it"
    parcel.free(small)
    (again,) = made(30)
    assert again.data_ptr() == small.data_ptr()
    parcel.free(again)
    sent = made(10, 3 * many, 2 * many)
    assert len(sent) == 3, "larger than any before"
    for block in sent:
        parcel.free(block)
    (whole,) = made(10, 3 * many, 2 * many)
    assert whole.data_ptr() not in [block.data_ptr() for block in sent]
    parcel.free(whole)
    (last,) = made(10)
    assert last.data_ptr() == whole.data_ptr(), "the small ones are given up"


def test_batches_that_are_kept_stay_as_they_are(recipe, with_block):
    recipe = with_block(recipe, "model", num_classes=10, text_dim=0)
    expected = take(recipe, 12)
    kept = take(with_block(recipe, "data", workers=1), 12)
    for got, want in zip(kept, expected, strict=True):
        assert got[0].segments == want[0].segments and torch.equal(got[0].patches["image"], want[0].patches["image"])


def _tensors(value: object) -> list[torch.Tensor]:
    values = value.values() if isinstance(value, dict) else [value]
    return [x for x in values if isinstance(x, torch.Tensor)]


def test_pinning_reaches_every_tensor_that_moves_to_the_gpu(recipe, with_block, monkeypatch: pytest.MonkeyPatch):
    moved: list[int] = []
    with monkeypatch.context() as m:
        m.setattr(torch.Tensor, "to", lambda self, *a, **k: moved.append(self.data_ptr()) or self)
        batches = [
            take(with_block(recipe, "model", **keys), 1)[0][0] for keys in ({}, {"num_classes": 10, "text_dim": 0})
        ]
        m.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.data_ptr()) or self)
        for batch in batches:
            moved, pinned = [], []
            batch.to("cuda")
            again = packs_module.Loaded([batch], []).pin_memory().packs[0]
            assert sorted(pinned) == sorted(moved) and len(moved) >= 9
            assert again.segments == batch.segments and again.layout.seqlens == batch.layout.seqlens
