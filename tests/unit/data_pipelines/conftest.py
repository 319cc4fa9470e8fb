"""Small data sets of real pictures, made once."""

from dataclasses import replace
from pathlib import Path

import pytest

from flagdit.config.schema import DataConfig, ModelConfig, Recipe, TrainConfig, ValidationConfig
from flagdit.data_pipelines.build import build_dataset
from flagdit.data_pipelines.encode import encode_dataset


@pytest.fixture(scope="session")
def emoji_raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures: 4 subjects, two styles, three aspect ratios, one pair held out; several shards."""
    out = tmp_path_factory.mktemp("data") / "raw"
    styles, aspects = ("twemoji", "openmoji"), ("1:1", "3:2", "2:3")
    build_dataset(
        "emoji", out, size=16, limit=4, styles=styles, aspects=aspects, holdout=0.125, shard_samples=8, multiple=4
    )
    return out


@pytest.fixture(scope="session")
def emoji_encoded(emoji_raw: Path) -> Path:
    """`emoji_raw` as pixels with text features."""
    out = emoji_raw.parent / "encoded"
    encode_dataset(emoji_raw, out, base_recipe())
    return out


def base_recipe(path: Path | str = "unused", batch_size: int = 6, accumulation: int = 1, workers: int = 0) -> Recipe:
    return Recipe(
        model=ModelConfig(modalities={"image": 3}, patch_size=2, text_dim=384),
        data=DataConfig(path=str(path), batch_size=batch_size, workers=workers),
        train=TrainConfig(accumulation=accumulation, device="cpu"),
        validation=ValidationConfig(every=10, samples=3),
    )


@pytest.fixture
def recipe(emoji_encoded: Path) -> Recipe:
    """A recipe that suits `emoji_encoded`."""
    return base_recipe(emoji_encoded)


@pytest.fixture(scope="session")
def make_recipe():
    """make_recipe(path, batch_size=6, accumulation=1, workers=0): a recipe that suits `emoji_encoded`."""
    return base_recipe


@pytest.fixture(scope="session")
def tree():
    """tree(folder): relative path → bytes of every file in it."""

    def read(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    return read


@pytest.fixture
def with_block():
    """with_block(recipe, "data", batch_size=4): the recipe with keys of one block changed."""

    def change(recipe: Recipe, block: str, **keys: object) -> Recipe:
        return replace(recipe, **{block: replace(getattr(recipe, block), **keys)})

    return change


@pytest.fixture
def copy_of(tmp_path: Path):
    """copy_of(folder): a copy that a test may damage."""
    import shutil

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / f"copy_of_{folder.name}"))

    return copy
