"""Recipe against data set: each fault named, all of them at once."""

from pathlib import Path

import pytest

from flagdit.data_pipelines.check import check_dataset
from flagdit.data_pipelines.index import Dataset
from flagdit.errors import DataError


def test_a_recipe_that_suits_passes(recipe, emoji_encoded: Path):
    check_dataset(recipe, Dataset.open(emoji_encoded))


@pytest.mark.parametrize(
    ("block", "keys", "message"),
    [
        ("model", {"modalities": {"image": 4}}, r"3 channels, and model\.modalities\.image=4"),
        ("model", {"modalities": {"audio": 3}}, r"holds image, and model\.modalities has audio"),
        ("model", {"text_dim": 512}, r"384 wide, and model\.text_dim=512"),
        ("model", {"patch_size": 8}, r"cannot be cut into patches of model\.patch_size=8: .*--multiple 8"),
        ("model", {"num_classes": 1, "text_dim": 0}, r"labels go up to \d, and model\.num_classes=1"),
        ("codec", {"kind": "haar"}, r"codec\.kind 'pixels', and the recipe has 'haar'"),
        ("codec", {"kind": "diffusers", "path": "a/b"}, r"codec\.path: 'a/b' is not a folder"),
        ("text", {"max_length": 8}, r"text\.max_length 64, and the recipe has 8"),
        ("text", {"prompt_template": "a {}"}, r"text\.prompt_template '\{\}', and the recipe has 'a \{\}'"),
        ("text", {"layer": -2}, r"text\.layer -1, and the recipe has -2"),
        ("data", {"split": "test"}, r"data\.split=test is not one of its splits: train, heldout"),
        ("data", {"batch_size": 22}, r"data\.batch_size=22 is larger than its split train; try 21"),
        ("validation", {"split": "test"}, r"validation\.split=test"),
        ("validation", {"path": "/none"}, r"validation\.path: /none: there is no such folder"),
    ],
)
def test_each_fault_is_named(recipe, with_block, emoji_encoded: Path, block: str, keys: dict, message: str):
    with pytest.raises(DataError, match=message):
        check_dataset(with_block(recipe, block, **keys), Dataset.open(emoji_encoded))


def test_another_text_encoder_is_told_by_its_files(recipe, emoji_encoded: Path, copy_of):
    folder = copy_of(emoji_encoded)
    text = (folder / "dataset.json").read_text()
    model = Dataset.open(folder).text["model"]
    (folder / "dataset.json").write_text(text.replace(model, "0" * 16))
    with pytest.raises(DataError, match=rf"the text model \(by its files\) '0+', and the recipe has '{model}'"):
        check_dataset(recipe, Dataset.open(folder))


def test_all_faults_are_listed_at_once(recipe, with_block, emoji_encoded: Path):
    wrong = with_block(recipe, "model", modalities={"image": 4}, text_dim=512, patch_size=5)
    wrong = with_block(with_block(wrong, "codec", kind="dct"), "data", split="test")
    with pytest.raises(DataError) as caught:
        check_dataset(wrong, Dataset.open(emoji_encoded))
    for part in ("1. ", "modalities.image=4", "text_dim=512", "patch_size=5", "codec.kind", "data.split=test"):
        assert part in str(caught.value)


def test_class_models_need_no_text_features(recipe, with_block, emoji_encoded: Path):
    check_dataset(with_block(recipe, "model", num_classes=10, text_dim=0), Dataset.open(emoji_encoded))


def test_data_without_text_or_labels(recipe, with_block, emoji_encoded: Path, copy_of):
    folder = copy_of(emoji_encoded)
    dataset = Dataset.open(folder)
    dataset.info["text"] = None
    with pytest.raises(DataError, match=r"no text features, and model\.text_dim=384"):
        check_dataset(recipe, dataset)
    dataset.info["labels"] = {"samples": 20, "max": 3}
    with pytest.raises(DataError, match=r"4 samples have no label, and model\.num_classes=10"):
        check_dataset(with_block(recipe, "model", num_classes=10, text_dim=0), dataset)


def test_validation_is_not_asked_for_when_there_is_none(recipe, with_block, emoji_encoded: Path):
    check_dataset(with_block(recipe, "validation", every=0, split="test"), Dataset.open(emoji_encoded))
