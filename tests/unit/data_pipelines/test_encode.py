"""Encoding: equal to encoding by hand, resumable to the byte, parallel, and refusing what does not fit."""

import io
import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flagdit.codecs.latents import build_codec
from flagdit.codecs.text import build_text_encoder
from flagdit.config.schema import CodecConfig, ModelConfig, Recipe, TextConfig
from flagdit.data_pipelines import encode
from flagdit.data_pipelines.build import build_dataset
from flagdit.data_pipelines.encode import encode_dataset
from flagdit.data_pipelines.index import Dataset
from flagdit.errors import DataError, RecipeError

LABELS_ONLY = Recipe(model=ModelConfig(text_dim=0, num_classes=10))


def pixels_of(raw: Dataset, i: int) -> torch.Tensor:
    picture = Image.open(io.BytesIO(raw.members(i)["png"]))
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[:, None].float() / 127.5 - 1


@pytest.mark.parametrize("codec", [CodecConfig(kind="pixels"), CodecConfig(kind="haar", factor=4)])
def test_encoded_samples_equal_encoding_by_hand(codec: CodecConfig, emoji_raw: Path, tmp_path: Path):
    recipe = Recipe(codec=codec)
    dataset = encode_dataset(emoji_raw, tmp_path / "out", recipe)
    raw, by_hand, text = Dataset.open(emoji_raw, "raw"), build_codec(codec), build_text_encoder(recipe.text)
    assert len(dataset) == len(raw) and dataset.splits == raw.splits
    assert dataset.codec == by_hand.spec() and dataset.text == text.spec()
    for i in range(0, len(raw), 5):
        sample = dataset.read(i)
        assert torch.equal(sample.latent_CFHW, by_hand.encode(pixels_of(raw, i)))
        assert sample.caption == bytes(raw.members(i)["txt"]).decode()
        torch.testing.assert_close(sample.text_LY, text.encode([sample.caption])[0], rtol=1e-4, atol=1e-5)
        assert sample.key == raw.key(i) and sample.label == raw.columns["label"][i]
        assert json.loads(bytes(dataset.members(i)["json"])) == json.loads(bytes(raw.members(i)["json"]))


def test_autoencoder_folder_makes_fp16(emoji_raw: Path, tmp_path: Path):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    ).save_pretrained(tmp_path / "vae")
    recipe = replace(LABELS_ONLY, codec=CodecConfig(kind="diffusers", path=str(tmp_path / "vae")))
    dataset = encode_dataset(emoji_raw, tmp_path / "out", recipe)
    stored = np.load(io.BytesIO(bytes(dataset.members(0)["latent.npy"])))
    assert stored.dtype == np.float16 and dataset.info["channels"] == 4 and dataset.info["factor"] == 2
    by_hand = build_codec(recipe.codec).encode(pixels_of(Dataset.open(emoji_raw, "raw"), 0))
    torch.testing.assert_close(dataset.read(0).latent_CFHW, by_hand, rtol=1e-3, atol=1e-3)
    assert dataset.text is None and dataset.null_text is None and dataset.read(0).text_LY is None


def test_a_chosen_dtype_is_kept(emoji_raw: Path, tmp_path: Path):
    dataset = encode_dataset(emoji_raw, tmp_path / "out", Recipe(codec=CodecConfig(kind="haar")), dtype="fp16")
    for name in ("latent.npy", "text.npy"):
        assert np.load(io.BytesIO(bytes(dataset.members(0)[name]))).dtype == np.float16
    with pytest.raises(RecipeError, match="--dtype fp8"):
        encode_dataset(emoji_raw, tmp_path / "other", Recipe(), dtype="fp8")


def test_bfloat16_is_read_back_as_it_was_rounded_and_its_error_measured(emoji_raw: Path, tmp_path: Path):
    recipe = Recipe(codec=CodecConfig(kind="haar"))
    exact, half, brain = (encode_dataset(emoji_raw, tmp_path / d, recipe, dtype=d) for d in ("fp32", "fp16", "bf16"))
    for i in range(len(exact)):
        want, got = exact.read(i), brain.read(i)
        assert torch.equal(got.latent_CFHW, want.latent_CFHW.bfloat16().float())
        assert torch.equal(got.text_LY, want.text_LY.bfloat16().float())
    assert brain.columns["nbytes"].sum() < 0.7 * exact.columns["nbytes"].sum()
    assert exact.info["dtype_error"] == 0 < half.info["dtype_error"] < 5e-4 < brain.info["dtype_error"] < 4e-3


class Killed(BaseException):
    pass


@pytest.mark.parametrize("shards", [0, 1, 3])
def test_killed_between_shards_and_continued_to_the_same_bytes(
    shards: int, emoji_raw: Path, emoji_encoded: Path, make_recipe, tmp_path: Path, tree, monkeypatch, capsys
):
    real, done = encode.Machine.encode_shard, []

    def dying(self, writer, number, advance):
        if len(done) == shards:
            (writer.out / "shards" / ".x.tar.1.tmp").write_bytes(b"half a shard")
            raise Killed
        done.append(number)
        real(self, writer, number, advance)

    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(encode.Machine, "encode_shard", dying)
        encode_dataset(emoji_raw, tmp_path / "out", make_recipe())
    with pytest.raises(DataError, match="not complete"):
        Dataset.open(tmp_path / "out")
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "out/shards").glob("*.tar")}
    assert len(kept) == shards
    encode_dataset(emoji_raw, tmp_path / "out", make_recipe())
    assert not shards or f"{shards} of 4 shards are done already" in capsys.readouterr().out
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items()), "finished shards are not made again"
    assert tree(tmp_path / "out") == tree(emoji_encoded)


def test_workers_make_the_same_bytes(emoji_raw: Path, tmp_path: Path, tree):
    for workers in (0, 2):
        encode_dataset(emoji_raw, tmp_path / str(workers), LABELS_ONLY, workers=workers)
    assert tree(tmp_path / "2") == tree(tmp_path / "0")


def test_a_dead_encoding_process_is_one_paragraph(emoji_raw: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(encode, "_work", os._exit)
    monkeypatch.setattr(encode, "_start_worker", int)
    monkeypatch.setattr(encode, "get_context", lambda method: multiprocessing.get_context("fork"))
    with pytest.raises(DataError, match=r"an encoding process died.*fewer --workers"):
        encode_dataset(emoji_raw, tmp_path / "out", LABELS_ONLY, workers=1)


def test_a_finished_encode_is_left_alone(emoji_raw: Path, emoji_encoded: Path, make_recipe, capsys):
    before = {p: p.stat().st_mtime_ns for p in emoji_encoded.rglob("*")}
    encode_dataset(emoji_raw, emoji_encoded, make_recipe())
    assert "complete and up to date" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in emoji_encoded.rglob("*")}


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"codec": CodecConfig(kind="haar")}, "codec"),
        ({"text": TextConfig(max_length=8)}, "text"),
        ({"model": ModelConfig(text_dim=0)}, "text"),
    ],
)
def test_other_settings_are_refused(changed: dict, name: str, emoji_raw: Path, emoji_encoded: Path, make_recipe):
    with pytest.raises(DataError, match=rf"/encoded: .*other settings \({name}.*--overwrite"):
        encode_dataset(emoji_raw, emoji_encoded, replace(make_recipe(), **changed))


def test_another_source_is_refused(emoji_encoded: Path, make_recipe, tmp_path: Path):
    build_dataset("emoji", tmp_path / "raw", limit=2, size=16)
    with pytest.raises(DataError, match=r"other settings \(source\)"):
        encode_dataset(tmp_path / "raw", emoji_encoded, make_recipe())


def test_a_corrupt_raw_sample_is_left_out_and_named(emoji_raw: Path, copy_of, tmp_path: Path):
    folder = copy_of(emoji_raw)
    raw = Dataset.open(folder, "raw")
    shard = folder / "shards/train-000001.tar"
    data = bytearray(shard.read_bytes())
    data[int(raw.columns["offset"][10]) + 1100] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(DataError, match=rf"1 of 24 samples cannot be used.*{raw.key(10)}: .*checksum"):
        encode_dataset(folder, tmp_path / "out", LABELS_ONLY)
    dataset = encode_dataset(folder, tmp_path / "out", LABELS_ONLY, max_bad=0.1)
    assert len(dataset) == 23 and dataset.info["quarantined"] == 1
    keys = {dataset.key(i) for i in range(23)}
    assert keys == {raw.key(i) for i in range(24)} - {raw.key(10)}
    assert json.loads((tmp_path / "out/quarantine.jsonl").read_text())["key"] == raw.key(10)


def test_latents_that_overflow_are_left_out(emoji_raw: Path, tmp_path: Path, monkeypatch):
    from flagdit.codecs.latents import PixelCodec

    monkeypatch.setattr(PixelCodec, "_encode", lambda self, x: x * 1e6)
    with pytest.raises(DataError, match="not finite in fp16"):
        encode_dataset(emoji_raw, tmp_path / "out", LABELS_ONLY, dtype="fp16")


def test_sizes_that_the_codec_cannot_take(tmp_path: Path):
    build_dataset("emoji", tmp_path / "raw", limit=2, size=12)
    with pytest.raises(DataError, match=r"multiples of 8 px.*12×12 px \(2\).*--multiple 8"):
        encode_dataset(
            tmp_path / "raw", tmp_path / "out", replace(LABELS_ONLY, codec=CodecConfig(kind="dct", factor=8))
        )


def test_hub_names_leave_no_folder(emoji_raw: Path, tmp_path: Path):
    for recipe in (
        Recipe(codec=CodecConfig(kind="diffusers", path="stabilityai/sd-vae")),
        Recipe(text=TextConfig(kind="transformers", path="google/t5-base")),
    ):
        with pytest.raises(RecipeError, match="hub name"):
            encode_dataset(emoji_raw, tmp_path / "out", recipe)
        assert not (tmp_path / "out").exists()


def test_encoding_needs_a_raw_data_set(emoji_encoded: Path, tmp_path: Path):
    with pytest.raises(DataError, match="holds encoded latents"):
        encode_dataset(emoji_encoded, tmp_path / "out", Recipe())
    with pytest.raises(DataError, match="no such folder"):
        encode_dataset(tmp_path / "none", tmp_path / "out", Recipe())


def test_stock_webdataset_reads_encoded_shards(emoji_encoded: Path):
    import webdataset

    dataset = Dataset.open(emoji_encoded)
    urls = [str(emoji_encoded / "shards" / f"train-{i:06d}.tar") for i in range(3)]
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len(read) == len(dataset.splits["train"])
    for i, r in enumerate(read):
        np.testing.assert_array_equal(r["latent.npy"], dataset.read(i).latent_CFHW.numpy())
        assert r["txt"] == dataset.read(i).caption and r["json"]["label"] == dataset.read(i).label
