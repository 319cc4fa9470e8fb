"""The emoji source: names, choice, held-out pairs, canvases."""

import io

import numpy as np
import pytest
from PIL import Image

from flagdit.data_pipelines.sources import emoji
from flagdit.errors import DataError, RecipeError

BOTH = ("twemoji", "openmoji")


def items(**options) -> list:
    return list(emoji.source(**options).items)


def pixels(raw) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(raw.media["png"])))


def test_every_base_emoji_exists_in_both_styles():
    source = emoji.source(styles=BOTH)
    assert source.total == 2 * 1918
    names = [s.name for s in emoji.catalog().values()]
    assert len(set(names)) == len(names) and not [n for n in names if "skin tone" in n or "_" in n or ":" in n[-1:]]


def test_common_subjects_are_real_and_come_first_from_all_groups():
    subjects = emoji.choose(list(emoji.catalog().values()), 80, seed=0)
    names = {s.name for s in subjects}
    assert {"dog face", "trophy", "rocket", "red apple"} <= names
    assert {s.group for s in subjects} == set(emoji.GROUPS) - {"Other"}
    wanted = [" ".join(n.split()) for n in emoji.COMMON.split(",")]
    assert [s.name for s in emoji.choose(list(emoji.catalog().values()), len(wanted), 1)] == wanted
    assert len(set(wanted)) == len(wanted)


def test_limits_nest_and_the_rest_follows_the_seed():
    known = list(emoji.catalog().values())
    many = emoji.choose(known, 300, seed=0)
    assert emoji.choose(known, 120, seed=0) == many[:120]
    assert emoji.choose(known[::-1], 300, seed=0) == many, "the order of the package does not matter"
    assert {s.code for s in emoji.choose(known, 300, seed=1)} != {s.code for s in many}
    assert sorted(s.code for s in emoji.choose(known, 0, seed=3)) == sorted(s.code for s in known)


def test_common_subjects_are_visually_distinct():
    thumbs = np.stack([pixels(raw).astype(float).ravel() / 255 for raw in items(size=24, limit=96)])
    distance = ((thumbs[:, None] - thumbs[None]) ** 2).mean(-1) ** 0.5 + np.eye(96)
    assert distance.min() > 0.05


def test_held_out_subjects_are_trained_in_the_other_style():
    found = items(styles=BOTH, limit=20, holdout=0.25, aspects=("1:1", "3:2"))
    held = {(r.meta["subject"], r.meta["style"]) for r in found if r.split == "heldout"}
    trained = {(r.meta["subject"], r.meta["style"]) for r in found if r.split == "train"}
    assert len(held) == 10 and not held & trained
    assert {style for _, style in held} == set(BOTH), "both styles are held out"
    for subject, style in held:
        assert (subject, *set(BOTH) - {style}) in trained
    again = items(styles=BOTH, limit=20, holdout=0.25, aspects=("1:1", "3:2"), seed=1)
    assert {(r.meta["subject"], r.meta["style"]) for r in again if r.split == "heldout"} != held


@pytest.mark.parametrize("size", [16, 24, 80])
def test_pictures_fill_their_canvas(size: int):
    for raw in items(size=size, styles=BOTH, limit=2, aspects=("1:1", "3:2", "2:3")):
        image = pixels(raw)
        assert raw.shape == (3, 1, *image.shape[:2])
        drawn = (image < 250).any(-1)
        assert drawn.any() and image[0, 0].min() == 255, "a drawing on white"
        columns = np.nonzero(drawn)[1]
        assert abs((columns.min() + columns.max() + 1) / 2 - image.shape[1] / 2) <= image.shape[1] * 0.1


def test_captions_name_style_and_canvas():
    captions = {
        (r.meta["style"], r.meta["aspect"]): r.caption
        for r in items(styles=BOTH, limit=1, aspects=("1:1", "3:2", "2:3"))
    }
    assert captions[("twemoji", "1:1")] == "a Twemoji emoji of dog face"
    assert captions[("openmoji", "1:1")] == "an OpenMoji emoji of dog face"
    assert captions[("twemoji", "3:2")] == "a Twemoji emoji of dog face on a wide canvas"
    assert captions[("twemoji", "2:3")] == "a Twemoji emoji of dog face on a tall canvas"


def test_styles_draw_differently():
    first, second = (pixels(r).astype(int) for r in items(styles=BOTH, limit=1))
    assert abs(first - second).mean() > 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"styles": ("noto",)}, "--styles noto"),
        ({"styles": ("twemoji", "twemoji")}, "once at most"),
        ({"holdout": 0.1}, "--holdout 0.1 cannot be met"),
        ({"holdout": 0.6, "styles": BOTH}, "at most 0.5"),
        ({"aspects": ("wide",)}, "--aspects wide is not WIDTH:HEIGHT"),
        ({"aspects": ("1:0",)}, "--aspects 1:0"),
        ({"size": 25}, "Try 24 or 28"),
    ],
)
def test_impossible_emoji_options(options: dict, message: str):
    with pytest.raises(RecipeError, match=message):
        emoji.source(limit=4, **options)


def test_missing_emoji_packages_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(emoji, "find_spec", lambda name: None if name == "resvg_py" else object())
    with pytest.raises(DataError, match=r"packages resvg-py.*flagdit\[embedded\]"):
        emoji.source()
