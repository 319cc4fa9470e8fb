"""The user's own pictures: captions from three places, and every defect rejected with its reason."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flagdit.config.schema import LimitsConfig
from flagdit.data_pipelines.records import Raw, Rejected
from flagdit.data_pipelines.sources.folder import source
from flagdit.errors import DataError, RecipeError


def picture(path: Path, width: int = 40, height: int = 30, caption: str | bytes | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path.name))
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_bytes(caption if isinstance(caption, bytes) else caption.encode())
    return path


def read(folder: Path, **options) -> tuple[dict[str, Raw], dict[str, str]]:
    given = source(src=folder, size=16, **options)
    items = list(given.items)
    assert len(items) == given.total
    return {i.key: i for i in items if isinstance(i, Raw)}, {i.key: i.reason for i in items if isinstance(i, Rejected)}


def test_captions_from_three_places(tmp_path: Path):
    picture(tmp_path / "dog.png", caption="  a dog\non grass ")
    picture(tmp_path / "sub/cat.jpg").with_suffix(".json").write_text('{"caption": "eine Katze", "label": 3}')
    picture(tmp_path / "fox.webp")
    (tmp_path / "captions.jsonl").write_text(json.dumps({"file": "fox.webp", "caption": "a fox", "label": 1}) + "\n\n")
    good, bad = read(tmp_path)
    assert bad == {}
    assert {k: (r.caption, r.label) for k, r in good.items()} == {
        "dog": ("a dog on grass", -1),
        "sub/cat": ("eine Katze", 3),
        "fox": ("a fox", 1),
    }
    assert all(r.shape == (3, 1, 12, 16) for r in good.values())
    assert good["sub/cat"].meta == {"file": "sub/cat.jpg", "pixels": [40, 30]}


def test_every_defect_is_rejected_with_its_reason(tmp_path: Path):
    picture(tmp_path / "good.png", caption="fine")
    picture(tmp_path / "empty.png", caption=" \n")
    picture(tmp_path / "none.png")
    picture(tmp_path / "latin.png", caption="für".encode("latin-1"))
    picture(tmp_path / "list.png").with_suffix(".json").write_text('{"caption": ["a", "b"]}')
    picture(tmp_path / "broken.png").with_suffix(".json").write_text("{")
    picture(tmp_path / "class.png").with_suffix(".json").write_text('{"caption": "x", "label": "dog"}')
    picture(tmp_path / "twin.jpg", caption="two")
    picture(tmp_path / "twin.png")
    picture(tmp_path / "tiny.png", 3, 30, caption="tiny")
    picture(tmp_path / "long.png", caption="x" * 10_001)
    cut = picture(tmp_path / "cut.png", caption="cut")
    cut.write_bytes(cut.read_bytes()[:600])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "text.txt").write_text("caption")
    picture(tmp_path / "old.gif", caption="old")
    (tmp_path / "captions.jsonl").write_text(
        '{"file": "gone.png", "caption": "x"}\nnonsense\n{"caption": "x"}\n{"file": "../up.png", "caption": "x"}\n'
    )
    good, bad = read(tmp_path)
    assert set(good) == {"good", "twin"}
    expected = {
        "empty.png": "empty",
        "none.png": "no caption",
        "latin.png": "not UTF-8",
        "list.png": "not a text",
        "broken.png": "cannot be read",
        "class.png": "not a class number",
        "twin.png": "same name as twin.jpg",
        "tiny.png": "smaller than 4 px",
        "long.png": "10001 letters",
        "cut.png": "cannot be decoded",
        "text.png": "not a PNG, JPEG or WebP",
        "old.gif": ".gif files are not read",
        "gone.png": "not there",
        "../up.png": "not there",
        "captions.jsonl:2": "not a line",
        "captions.jsonl:3": "not a line",
    }
    assert set(bad) == set(expected)
    for key, reason in expected.items():
        assert reason in bad[key], (key, bad[key])


def test_sizes_keep_the_aspect_within_the_budget(tmp_path: Path):
    for name, size in {"wide": (120, 60), "tall": (60, 120), "small": (9, 12)}.items():
        picture(tmp_path / f"{name}.png", *size, caption=name)
    good, _ = read(tmp_path)
    assert {k: r.shape[2:] for k, r in good.items()} == {"wide": (12, 20), "tall": (20, 12), "small": (12, 8)}


def test_held_out_pictures_follow_the_seed(tmp_path: Path):
    for i in range(40):
        picture(tmp_path / f"{i}.png", caption="x")
    held = [{k for k, r in read(tmp_path, holdout=0.3, seed=s)[0].items() if r.split == "heldout"} for s in (0, 0, 1)]
    assert held[0] == held[1] != held[2] and 4 <= len(held[0]) <= 20
    assert all(r.split == "train" for r in read(tmp_path)[0].values())


def test_settings_know_the_files(tmp_path: Path):
    picture(tmp_path / "a.png", caption="x")
    first = source(src=tmp_path).settings
    assert source(src=tmp_path).settings == first
    (tmp_path / "a.txt").write_text("another")
    assert source(src=tmp_path).settings != first


def test_own_pixel_limit(tmp_path: Path):
    picture(tmp_path / "a.png", caption="x")
    assert "40×30 px is more than the 1000" in read(tmp_path, limits=LimitsConfig(max_pixels=1000))[1]["a.png"]


def test_wrong_folders_and_options(tmp_path: Path):
    with pytest.raises(DataError, match=r"nowhere: there is no such folder.*--from"):
        source(src=tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no pictures"):
        source(src=tmp_path)
    with pytest.raises(RecipeError, match="--size 30 is not a multiple"):
        source(src=tmp_path, size=30)
    with pytest.raises(RecipeError, match=r"--holdout 1\.5"):
        source(src=tmp_path, holdout=1.5)
