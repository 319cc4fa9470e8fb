"""Global batches: pure functions of k, nothing lost or repeated, full packs, mixtures by weight, any place at once."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from flagdit.data_pipelines.batches import Batches, Part
from flagdit.data_pipelines.index import FORMAT
from flagdit.data_pipelines.mixture import Mixture, Shares
from flagdit.errors import DataError, RecipeError

from .synthetic import make_set, recipe_for


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, float]:
    """A large set of pictures, a small one, and clips: folder → weight."""
    root = tmp_path_factory.mktemp("sets")
    make_set(root / "large", 150, heldout=10)
    make_set(root / "small", 40, seed=1)
    make_set(root / "clips", 60, modality="video", shapes=((3, 3, 4, 4), (3, 7, 4, 8)), seed=2)
    return {str(root / "large"): 5, str(root / "small"): 2, str(root / "clips"): 3}


def batches(sets: dict[str, float], **data: object) -> Batches:
    recipe = recipe_for(sets, **data)
    return Batches(recipe, Mixture(sets))


def pairs(parts: list[Part]) -> list[tuple[int, int]]:
    return [pair for p in parts for pair in zip(p.epochs.tolist(), p.ids.tolist(), strict=True)]


@pytest.mark.parametrize(
    "data", [{"batch_size": 24}, {"batch_size": 24, "pack_tokens": 100}, {"batch_size": 16, "pack_tokens": 500}]
)
def test_no_sample_is_lost_or_repeated(sets, data):
    made = batches(sets, **data, shuffle_shards=3)
    seen: Counter[tuple[int, int]] = Counter()
    whole_windows = 3 * (made.windows.packs // made.batch) if made.budget else 120
    for k in range(whole_windows):
        seen.update(pairs(made.batch_of(k)))
    assert set(seen.values()) == {1}, "a sample comes once in an epoch"
    for member in made.mixture.members:
        ids = range(member.first_id, member.first_id + len(member.dataset.split("train")))
        passes = {i: sorted(e for e, j in seen if j == i) for i in ids}
        # Whoever has come n times has come in epochs 0 to n−1, and all have come equally often, but for one.
        assert all(found == list(range(len(found))) for found in passes.values())
        counts = [len(found) for found in passes.values()]
        assert max(counts) - min(counts) <= 1 and max(counts) >= 2


@pytest.mark.parametrize("pack_tokens", [0, 100])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_ranks_and_accumulation_change_nothing_of_a_batch(sets, pack_tokens, ranks, accumulation):
    made, fresh = (batches(sets, batch_size=72, pack_tokens=pack_tokens) for _ in range(2))
    for k in (0, 1, 7, 40, 41, 3):
        shared = made.shared(k, accumulation, ranks)
        assert len(shared) == accumulation and {len(s) for s in shared} == {ranks}
        assert sorted(pairs([p for s in shared for p in s])) == sorted(pairs(fresh.batch_of(k)))
        if pack_tokens:
            most = 72 // (ranks * accumulation) * pack_tokens
            assert all(p.tokens.sum() <= most for s in shared for p in s)
        else:
            assert {len(p) for s in shared for p in s} == {72 // (ranks * accumulation)}


@pytest.mark.parametrize("pack_tokens", [0, 100])
def test_weights_are_shares_of_samples(sets, pack_tokens):
    made = batches(sets, batch_size=32, pack_tokens=pack_tokens)
    ids = np.concatenate([p.ids for k in range(60) for p in made.batch_of(k)])
    which = np.searchsorted([m.first_id for m in made.mixture.members], ids, side="right") - 1
    np.testing.assert_allclose(np.bincount(which) / len(ids), [0.5, 0.2, 0.3], atol=0.01)


def test_shares_are_even_over_short_stretches():
    shares = Shares([0.5, 0.2, 0.3])
    taken = np.stack([shares.among_first(x) for x in range(2500)])
    assert (taken.sum(axis=1) == np.arange(2500)).all() and (np.diff(taken, axis=0) >= 0).all()
    windows = taken[20:] - taken[:-20]
    assert np.abs(windows - [10, 4, 6]).max() <= 1
    assert taken[1000].tolist() == [500, 200, 300]


def test_packs_are_full_and_alike_and_never_go_over_their_budget(sets):
    made = batches(sets, batch_size=8, pack_tokens=600)
    packs = [p for k in range(96) for p in made.batch_of(k)]
    loads = np.array([p.tokens.sum() for p in packs])
    assert loads.max() <= 600 and loads.mean() > 0.98 * 600
    assert made.windows.fill > 0.98
    costs = np.array([p.cost for p in packs])
    assert costs.max() < 1.6 * costs.mean()
    assert [p.ids.tolist() for p in made.batch_of(3)] != [p.ids.tolist() for p in made.batch_of(4)]


def test_no_window_is_special_where_shards_are_sorted_by_length(tmp_path):
    """All short samples in the first shards, all long ones in the last: a stretch of such a stream packs badly."""
    made_of = make_set(tmp_path / "sorted", 120, shapes=[(3, 1, 2 * n, 2 * n) for n in (1, 2, 5, 7)], by_length=True)
    made = batches({str(made_of.path): 1.0}, batch_size=4, pack_tokens=64, shuffle_shards=1)
    loads = np.array([[p.tokens.sum() for p in made.batch_of(k)] for k in range(128)])
    assert loads.max() <= 64
    longest = [max(p.tokens.max() for p in made.batch_of(k)) for k in range(128)]
    assert np.mean(np.array(longest) == 56) > 0.9, "long samples come at any time"


def test_held_out_samples_stay_out(sets):
    made = batches(sets, batch_size=24)
    ids = {i for k in range(40) for _, i in pairs(made.batch_of(k))}
    assert not ids & set(range(140, 150)) and max(ids) == 249


def test_faults_are_named(sets, tmp_path):
    with pytest.raises(RecipeError, match=r"clips: data\.pack_tokens=72 is less than the 77 tokens.*Set it to 77"):
        batches(sets, pack_tokens=72)
    with pytest.raises(RecipeError, match=r"batch_size=210, of which this set gives 42, .*has 40 samples.*Try 200"):
        batches(sets, batch_size=210)
    with pytest.raises(RecipeError, match=r"data\.sets\..*small=0 is less than 1/1000"):
        Mixture({**sets, list(sets)[1]: 0.0})
    with pytest.raises(DataError, match="there is no such folder"):
        Mixture({str(tmp_path / "none"): 1.0})


def test_a_mixture_reads_and_names_the_right_samples(sets):
    mixture = Mixture(sets)
    large, small, clips = (m.dataset for m in mixture.members)
    assert [m.first_id for m in mixture.members] == [0, 150, 190]
    for sample_id, dataset, local in ((149, large, 149), (150, small, 0), (249, clips, 59)):
        assert mixture.read(sample_id).key == dataset.key(local)
        assert mixture.key(sample_id) == f"{dataset.path}/{dataset.key(local)}"
    assert mixture.content != Mixture({**sets, next(iter(sets)): 4}).content != large.info["content"]
    assert Mixture({str(large.path): 3}).content == large.info["content"]


CONTINUE = """
import json, resource, sys, time
from flagdit.data_pipelines.batches import Batches
from flagdit.data_pipelines.mixture import Mixture
from tests_synthetic import recipe_for
path, pack_tokens = sys.argv[1], int(sys.argv[2])
recipe = recipe_for({path: 1.0}, batch_size=256, pack_tokens=pack_tokens)
start = time.process_time()
made = Batches(recipe, Mixture({path: 1.0}))
k = 39062 if not pack_tokens else 10**7 * 40 // (pack_tokens * 256)
samples = sum(len(p) for p in made.batch_of(k))
print(json.dumps([time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, samples]))
"""


@pytest.fixture(scope="module")
def giant(tmp_path_factory) -> Path:
    return giant_index(tmp_path_factory.mktemp("giant"), 10_000_000)


@pytest.mark.parametrize("pack_tokens", [0, 4096])
def test_continuing_at_sample_ten_million_takes_no_time_and_little_memory(giant, tmp_path: Path, pack_tokens: int):
    (tmp_path / "tests_synthetic.py").write_text((Path(__file__).parent / "synthetic.py").read_text())
    best = [9.0, 9.0, 0]
    for _ in range(3):  # in seconds of the processor, since others may hold the machine; the best of three
        done = subprocess.run(
            [sys.executable, "-c", CONTINUE, str(giant), str(pack_tokens)], capture_output=True, text=True, check=True,
            env={"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[3]}", "OMP_NUM_THREADS": "1", "PATH": ""},
        )  # fmt: skip
        best = min(best, json.loads(done.stdout))
        if best[0] < 1:
            break
    seconds, gib, samples = best
    assert seconds < 1 and gib < 1
    assert samples == 256 or (pack_tokens and samples > 20_000)


def giant_index(folder: Path, count: int) -> Path:
    """The index of a data set whose shards are empty files."""
    (folder / "index").mkdir(parents=True)
    (folder / "shards").mkdir()
    shapes = np.array([[2, 1, 4, 4], [2, 1, 8, 8], [2, 1, 12, 16]], np.int32)
    columns = {
        "shape": np.tile(shapes, (count // 3 + 1, 1))[:count],
        "shard": np.repeat(np.arange(count // 1000, dtype=np.int32), 1000),
    }
    for name, dtype in {"offset": "i8", "nbytes": "i8", "xxh3": "u8", "text_tokens": "i4", "label": "i4"}.items():
        columns[name] = np.zeros(count, dtype)
    columns["key"] = np.zeros(count, "S8")
    for name, column in columns.items():
        np.save(folder / "index" / f"{name}.npy", column)
    shards = [[f"train-{i:06d}", 1000] for i in range(count // 1000)]
    for name, _ in shards:
        (folder / "shards" / f"{name}.tar").touch()
    info = {"format": FORMAT, "kind": "encoded", "modality": "image", "samples": count, "splits": {"train": [0, count]}}
    info |= {"shards": shards, "shapes": [[s.tolist(), count // 3] for s in shapes], "content": "0"}
    (folder / "dataset.json").write_text(json.dumps(info))
    return folder
