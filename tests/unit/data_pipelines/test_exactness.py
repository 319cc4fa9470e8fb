"""The same run under every layout: ranks × loader processes × accumulation, stopped and continued all the time."""

import hashlib
import random
from collections import Counter
from itertools import product

import pytest

from flagdit.data_pipelines.loader import build_loader

from .synthetic import make_set, recipe_for

LAYOUTS = list(product((1, 2, 3, 4, 8), (0, 1, 3), (1, 2)))
"""Ranks, loader processes of each, accumulation."""
BATCH, SAMPLES = 48, 144
TWO_EPOCHS = 2 * SAMPLES // BATCH


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, float]:
    """As many samples of each as its weight says, so that both end their epochs together."""
    root = tmp_path_factory.mktemp("exact")
    make_set(root / "pictures", 96)
    make_set(root / "clips", 48, modality="video", shapes=((3, 3, 4, 4), (3, 2, 4, 8)), seed=1)
    return {str(root / "pictures"): 2, str(root / "clips"): 1}


def contents(packs) -> list[tuple[int, int, str]]:
    """(epoch, sample id, hash of its patches) of every sample of the packs."""
    found = []
    for pack in packs:
        for i, segment in enumerate(pack.segments):
            own = pack.patches[segment.modality][pack.layout.patch_segment[segment.modality] == i]
            found.append((segment.epoch, segment.sample_id, hashlib.sha256(own.numpy().tobytes()).hexdigest()))
    return sorted(found)


def run(sets, layout: tuple[int, int, int], start: int, stop: int, **data) -> list[list[tuple[int, int, str]]]:
    """Contents of the global batches from start to stop, all ranks together."""
    ranks, workers, accumulation = layout
    recipe = recipe_for(sets, batch_size=BATCH, workers=workers, accumulation=accumulation, **data)
    loaders = [build_loader(recipe, start, rank, ranks) for rank in range(ranks)]
    batches = []
    for _ in range(start, stop):
        shares = [next(loader) for loader in loaders]
        assert {len(packs) for packs in shares} == {accumulation}
        batches.append(contents(pack for packs in shares for pack in packs))
    return batches


@pytest.mark.parametrize("pack_tokens", [0, 60])
def test_every_layout_continues_the_same_run(sets, pack_tokens: int):
    """One run after another over two epochs, each stopped at a random batch and continued under the next layout."""
    reference = run(sets, (1, 0, 1), 0, TWO_EPOCHS, pack_tokens=pack_tokens)
    if not pack_tokens:
        assert Counter((e, i) for batch in reference for e, i, _ in batch) == Counter(
            (e, i) for e in range(2) for i in range(SAMPLES)
        ), "two epochs: every sample twice, none lost, none repeated"
    # With a budget the layouts without loader processes are enough: they read what they are told all the same.
    layouts = [layout for layout in LAYOUTS if not pack_tokens or not layout[1]]
    rng = random.Random(0)
    rng.shuffle(layouts)
    at = done = 0
    for layout in layouts:
        stop = min(at + rng.randint(1, 3), TWO_EPOCHS)
        assert run(sets, layout, at, stop, pack_tokens=pack_tokens) == reference[at:stop], (layout, at)
        done += stop - at
        at = stop % TWO_EPOCHS
    assert done >= 2 * TWO_EPOCHS or pack_tokens


def test_one_sample_of_difference_is_seen(sets):
    reference = run(sets, (1, 0, 1), 0, 2)
    assert reference != run(sets, (1, 0, 1), 1, 3)
    assert [len({i for _, i, _ in batch}) for batch in reference] == [48, 48]
