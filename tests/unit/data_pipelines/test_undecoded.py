"""Training straight from pictures: the same batches as from an encoded data set, and only where nothing is missing."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flagdit.codecs.latents import build_codec
from flagdit.config.schema import CodecConfig, DataConfig, ModelConfig, Recipe, TrainConfig
from flagdit.data_pipelines.build import build_dataset
from flagdit.data_pipelines.encode import encode_dataset
from flagdit.data_pipelines.index import Dataset
from flagdit.data_pipelines.lint import lint
from flagdit.data_pipelines.loader import build_loader
from flagdit.data_pipelines.mixture import open_mixture
from flagdit.data_pipelines.show import write_page
from flagdit.errors import DataError


def recipe_for(path: Path, codec: CodecConfig, **data: object) -> Recipe:
    return Recipe(
        model=ModelConfig(modalities={"image": build_codec(codec).channels}, patch_size=1, text_dim=0),
        codec=codec,
        data=DataConfig(path=str(path), batch_size=6, **data),
        train=TrainConfig(device="cpu"),
    )


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Twelve smooth JPEGs of two sizes, one on its side by its EXIF, and a PNG."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for i in range(12):
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
        picture = small.resize((320, 240) if i % 2 else (240, 320), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        if i == 3:
            exif[0x0112] = 6
        picture.save(folder / f"{i:02d}.jpg", quality=95, exif=exif)
        (folder / f"{i:02d}.txt").write_text(f"picture {i}")
    picture.save(folder / "last.png")
    (folder / "last.txt").write_text("the last one")
    return folder


@pytest.fixture(scope="module")
def kept(photographs: Path) -> Path:
    """A raw data set with these files as they are."""
    out = photographs.parent / "kept"
    build_dataset("folder", out, src=photographs, size=32, multiple=8, keep_jpeg=True, shard_samples=5)
    return out


def test_kept_files_stay_as_they_are_and_read_as_the_resized_ones(photographs: Path, kept: Path, tmp_path: Path):
    resized = build_dataset("folder", tmp_path / "png", src=photographs, size=32, multiple=8)
    dataset = Dataset.open(kept, "raw")
    assert sorted(map(str, dataset.shapes)) == sorted(map(str, resized.shapes)) and len(dataset) == 13
    assert bytes(dataset.members(3)["jpg"]) == (photographs / "03.jpg").read_bytes()
    assert "png" in dataset.members(12) and dataset.shape(3) == dataset.shape(2), "on its side"
    recipe = recipe_for(kept, CodecConfig(kind="haar"))
    a, b = (encode_dataset(d, tmp_path / f"enc{i}", recipe) for i, d in enumerate((kept, tmp_path / "png")))
    for i in range(13):
        assert torch.equal(a.read(i).latent_CFHW, b.read(i).latent_CFHW)
    assert lint(kept) == []
    assert write_page(kept, tmp_path / "page.html").read_text().count("data:image/png") == 13


@pytest.mark.parametrize("codec", [CodecConfig(kind="pixels"), CodecConfig(kind="haar", factor=4)])
def test_batches_are_those_of_the_encoded_data_set(codec: CodecConfig, kept: Path, tmp_path: Path):
    encode_dataset(kept, tmp_path / "encoded", recipe_for(kept, codec))
    loaders = [
        build_loader(recipe_for(path, codec, workers=workers))
        for path, workers in ((kept, 0), (kept, 2), (tmp_path / "encoded", 0))
    ]
    for _ in range(5):
        live, in_workers, encoded = (next(loader)[0] for loader in loaders)
        assert live.segments == in_workers.segments == encoded.segments
        assert torch.equal(live.patches["image"], encoded.patches["image"])
        assert torch.equal(in_workers.patches["image"], encoded.patches["image"])


def test_a_broken_picture_is_left_out(kept: Path, copy_of, tmp_path: Path):
    folder = copy_of(kept)
    shard = folder / "shards/train-000001.tar"
    data = bytearray(shard.read_bytes())
    data[int(Dataset.open(folder, None).columns["offset"][6]) + 1600] ^= 1
    shard.write_bytes(bytes(data))
    loader = build_loader(recipe_for(folder, CodecConfig(kind="pixels"), max_bad_samples=0.1))
    seen = {s.sample_id for _ in range(3) for pack in next(loader) for s in pack.segments}
    assert seen == set(range(13)) - {6} and [b.sample_id for b in loader.bad] == [6]


def test_a_jpeg_that_is_cut_off_is_rejected_when_it_is_packed(photographs: Path, tmp_path: Path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src/cut.jpg").write_bytes((photographs / "00.jpg").read_bytes()[:4000])
    (tmp_path / "src/cut.txt").write_text("cut")
    with pytest.raises(DataError, match="cannot be decoded"):
        build_dataset("folder", tmp_path / "out", src=tmp_path / "src", size=32, keep_jpeg=True)


def test_what_needs_a_network_is_encoded_first(kept: Path):
    pixels = recipe_for(kept, CodecConfig(kind="pixels"))
    for recipe in (
        replace(pixels, model=replace(pixels.model, text_dim=384)),
        replace(pixels, codec=CodecConfig(kind="diffusers", path="/nowhere")),
    ):
        with pytest.raises(DataError, match=r"not encoded.*flagdit data encode"):
            open_mixture(recipe)
    with pytest.raises(DataError, match=r"codec\.kind 'pixels'|channels"):
        build_loader(replace(pixels, model=replace(pixels.model, modalities={"image": 12})))


def test_sizes_that_the_codec_cannot_take(photographs: Path, tmp_path: Path):
    build_dataset("folder", tmp_path / "raw", src=photographs, size=12, multiple=4, keep_jpeg=True)
    with pytest.raises(DataError, match=r"not multiples of 8 px.*--multiple 8"):
        open_mixture(recipe_for(tmp_path / "raw", CodecConfig(kind="dct", factor=8)))


def test_it_travels_to_other_processes_and_has_a_content_of_its_own(kept: Path):
    mixture = open_mixture(recipe_for(kept, CodecConfig(kind="haar")))
    again = pickle.loads(pickle.dumps(mixture))
    assert torch.equal(again.read(5).latent_CFHW, mixture.read(5).latent_CFHW)
    contents = {open_mixture(recipe_for(kept, CodecConfig(kind=kind))).content for kind in ("haar", "dct", "pixels")}
    assert len(contents) == 3 and Dataset.open(kept, "raw").info["content"] not in contents
