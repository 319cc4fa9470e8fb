"""Hostile and broken inputs: nothing runs, nothing hangs, nothing is replaced, and the ledger says exactly what was
left out and why."""

import io
import json
import os
import pickle
import struct
import tarfile
import time
import wave
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flagdit.config.schema import LimitsConfig
from flagdit.data_pipelines import user_files
from flagdit.data_pipelines.build import build_dataset
from flagdit.data_pipelines.sources import folder as folder_source
from flagdit.errors import DataError

LIMITS = LimitsConfig(
    max_pixels=100_000, max_frames=50, max_seconds=2, max_sample_bytes=200_000, max_caption=500, sample_seconds=10
)
CANARY = "executed"

Expected = dict[str, str]
"""Key in the ledger → part of its reason."""


def png(width: int = 16, height: int = 16) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def huge_png(side: int) -> bytes:
    """A few hundred bytes that promise side² pixels."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


class Runs:
    """Writes the canary when it is unpickled."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        return (os.system, (f"touch {self.place / CANARY}",))


def beside(name: str, data: bytes, reason: str, caption: bytes | None = b"a caption", key: str = "") -> Callable:
    """A file in a folder, next to a good one."""

    def plant(src: Path) -> Expected:
        (src / name).write_bytes(data)
        if caption is not None:
            (src / name).with_suffix(".txt").write_bytes(caption)
        return {key or name: reason}

    return plant


def json_beside(content: str, reason: str) -> Callable:
    def plant(src: Path) -> Expected:
        (src / "bad.png").write_bytes(png())
        (src / "bad.json").write_text(content)
        return {"bad.png": reason}

    return plant


def link_out(src: Path) -> Expected:
    (src.parent / "secret.png").write_bytes(png())
    (src / "bad.png").symlink_to(src.parent / "secret.png")
    (src / "bad.txt").write_text("a secret")
    return {"bad.png": "a link that leads out"}


def tar_with(*members: tuple[str, bytes | tarfile.TarInfo], cut: int = 0) -> Callable[[Path], None]:
    def write(src: Path) -> None:
        with tarfile.open(src / "data.tar", "w") as archive:
            for name, data in [("good.png", png()), ("good.txt", b"good"), *members]:
                info = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
                info.name = name
                if isinstance(data, bytes):
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
                else:
                    archive.addfile(info)
        if cut:
            os.truncate(src / "data.tar", cut)

    return write


def special(kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, target
    return info


def in_tar(expected: Expected, *members, cut: int = 0) -> Callable:
    def plant(src: Path) -> Expected:
        tar_with(*members, cut=cut)(src)
        return expected

    return plant


def in_table(row: str, reason: str, key: str = "rows.jsonl:2") -> Callable:
    def plant(src: Path) -> Expected:
        (src / "up").mkdir()
        (src / "up/good.png").write_bytes(png())
        (src / "secret.png").write_bytes(png())
        (src / "up/rows.jsonl").write_text(f'{{"file": "good.png", "caption": "good"}}\n{row}\n')
        return {key: reason}

    return plant


def sound(samples: np.ndarray, rate: int = 8000, kind: int = 1) -> bytes:
    """A mono WAV file; kind 3: 32-bit floats."""
    data = samples.astype("<i2" if kind == 1 else "<f4").tobytes()
    width = 2 if kind == 1 else 4
    head = struct.pack("<HHIIHH", kind, 1, rate, rate * width, width, 8 * width)
    form = b"WAVEfmt " + struct.pack("<I", 16) + head + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(form)) + form


TONE = (np.sin(np.arange(8000) / 5) * 9000).astype(np.int16)


def clip(frames: int, side: int = 32) -> bytes:
    stream = io.BytesIO()
    pictures = [Image.new("RGB", (side, side), (i * 7 % 256, 100, 50)) for i in range(frames)]
    pictures[0].save(stream, "GIF", save_all=True, append_images=pictures[1:], duration=100)
    return stream.getvalue()


CUBE = "\n".join(["v 0 0 0", "v 1 0 0", "v 0 1 0", "v 0 0 1", "f 1 2 3", "f 1 2 4", "f 2 3 4"]) + "\n"

FOLDER = {"size": 16, "multiple": 4}
CASES: dict[str, tuple[str, Callable[[Path], Expected]]] = {
    "picture cut off": ("folder", beside("bad.png", png(64, 64)[:5000], "cannot be decoded")),
    "picture of nothing": ("folder", beside("bad.png", b"", "empty file")),
    "picture that is a text": ("folder", beside("bad.jpg", b"hello" * 100, "not a PNG")),
    "pixel bomb": ("folder", beside("bad.png", huge_png(8000), "pixels allowed")),
    "pixel bomb beyond the decoder": ("folder", beside("bad.png", huge_png(60_000), "pixels allowed")),
    "PostScript with a picture's name": ("folder", beside("bad.png", b"%!PS-Adobe-3.0 EPSF-3.0\n(x) run", "not a PNG")),
    "too many bytes": ("folder", beside("bad.png", png() + b"\0" * 300_000, "limits.max_sample_bytes")),
    "caption in Latin-1": ("folder", beside("bad.png", png(), "not UTF-8", "für".encode("latin-1"))),
    "caption in UTF-16": ("folder", beside("bad.png", png(), "not UTF-8", "für".encode("utf-16"))),
    "caption of spaces": ("folder", beside("bad.png", png(), "empty", b" \n\t ")),
    "caption without end": ("folder", beside("bad.png", png(), "limits.max_caption", b"x" * 501)),
    "caption with NUL": ("folder", beside("bad.png", png(), "not text", b"a\0b")),
    "no caption": ("folder", beside("bad.png", png(), "no caption", None)),
    "caption nested a million times": ("folder", json_beside("[" * 1_000_000, "cannot be read")),
    "caption that is a number": ("folder", json_beside('{"caption": 7}', "not a text")),
    "link out of the folder": ("folder", link_out),
    "tar cut off": ("tar", in_tar({"data/a": "cut off or broken"}, ("a.txt", b"a"), ("a.png", png(80, 80)), cut=6000)),
    "tar path traversal": ("tar", in_tar({"data/etc/evil": "has no caption"}, ("../../etc/evil.png", png()))),
    "tar symbolic link": ("tar", in_tar({"data/a.png": "a link"}, ("a.png", special(tarfile.SYMTYPE, "/etc/passwd")))),
    "tar device": ("tar", in_tar({"data/a.png": "a device"}, ("a.png", special(tarfile.CHRTYPE)))),
    "tar key twice": (
        "tar",
        in_tar(
            {"data/good": "comes twice"}, ("b.png", png()), ("b.txt", b"b"), ("good.png", png()), ("good.txt", b"x")
        ),
    ),
    "tar file twice": (
        "tar",
        in_tar({"data/b": "two files .png"}, ("b.png", png()), ("b.png", png()), ("b.txt", b"b")),
    ),
    "tar without a picture": ("tar", in_tar({"data/b": "0 pictures"}, ("b.txt", b"b"))),
    "tar sample of too many bytes": (
        "tar",
        in_tar({"data/b": "limits.max_sample_bytes"}, ("b.png", png() + bytes(300_000)), ("b.txt", b"b")),
    ),
    "shell address": ("table", in_table('{"file": "pipe:touch executed", "caption": "x"}', "not fetched")),
    "web address": ("table", in_table('{"file": "http://localhost/x.png", "caption": "x"}', "not fetched")),
    "path out of the table's folder": ("table", in_table('{"file": "../secret.png", "caption": "x"}', "leads out")),
    "absolute path": ("table", in_table('{"file": "/etc/passwd", "caption": "x"}', "leads out")),
    "row that is no JSON": ("table", in_table("{'file': ", "not JSON")),
    "row of another picture's name": ("table", in_table('{"file": "good.png", "caption": "x"}', "again")),
    "video cut off": ("video", beside("bad.mp4", b"\0\0\0\x18ftypmp42" + bytes(500), "cannot be decoded as video")),
    "video that is a text": ("video", beside("bad.mp4", b"hello" * 99, "cannot be decoded as video")),
    "video of too many frames": ("video", beside("bad.gif", clip(80), "limits.max_frames")),
    "video of too many pixels": ("video", beside("bad.gif", clip(5, 400), "limits.max_pixels")),
    "video that is too short": ("video", beside("bad.gif", clip(2), "a clip needs 4")),
    "sound with NaN": ("sounds", beside("bad.wav", sound(np.where(TONE > 0, np.nan, 0), kind=3), "NaN or infinity")),
    "sound without end": ("sounds", beside("bad.wav", sound(np.tile(TONE, 9)), "limits.max_seconds")),
    "sound of silence": ("sounds", beside("bad.wav", sound(TONE * 0), "silent")),
    "sound that is a text": ("sounds", beside("bad.mp3", b"hello" * 99, "cannot be decoded as sound")),
    "mesh without faces": ("meshes", beside("bad.obj", b"v 0 0 0\n", "bad.obj")),
    "mesh of NaN": ("meshes", beside("bad.stl", b"solid x\nfacet nan\n", "bad.stl")),
}


def good(kind: str, src: Path) -> dict:
    """Plants one good sample and returns the source's options; tars and tables bring their own."""
    if kind == "folder":
        (src / "good.png").write_bytes(png())
    elif kind == "video":
        (src / "good.gif").write_bytes(clip(6))
    elif kind == "sounds":
        (src / "good.wav").write_bytes(sound(TONE))
    elif kind == "meshes":
        (src / "good.obj").write_text(CUBE)
    (src / "good.txt").write_text("good")
    return {
        "folder": {"src": src, **FOLDER},
        "tar": {"src": src, **FOLDER},
        "table": {"src": src / "up/rows.jsonl", **FOLDER},
        "video": {"src": src, **FOLDER, "frames": 4, "fps": 10, "clips": 0},
        "sounds": {"src": src, "rate": 8000, "seconds": 2, "multiple": 512},
        "meshes": {"src": src, "size": 16, "multiple": 4, "count": 2},
    }[kind]


@pytest.mark.parametrize("case", CASES)
def test_hostile_input_is_left_out_with_its_reason(case: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kind, plant = CASES[case]
    (tmp_path / "src").mkdir()
    options = good(kind, tmp_path / "src")
    expected = plant(tmp_path / "src")
    start = time.monotonic()
    dataset = build_dataset(kind, tmp_path / "out", limits=LIMITS, max_bad=1.0, **options)
    assert time.monotonic() - start < 30, "it hangs"
    captions = [bytes(dataset.members(i)["txt"]).decode() for i in range(len(dataset))]
    assert captions.count("good") == 1 and set(captions) <= {"good", "b"}, "the good sample, and no other in its place"
    ledger = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()]
    assert {entry["key"] for entry in ledger} == set(expected) and len(ledger) == len(expected)
    for entry in ledger:
        reason = expected[entry["key"]]
        assert reason in entry["reason"] or reason in entry["key"], entry
    assert not list(tmp_path.rglob(CANARY)) and not Path("/etc/evil.png").exists(), "something was run or written"


def test_pickles_in_tars_are_never_opened(tmp_path: Path):
    (tmp_path / "src").mkdir()
    payload = pickle.dumps(Runs(tmp_path))
    tar_with(("good.pyd", payload), ("b.png", png()), ("b.txt", b"b"), ("b.pkl", payload))(tmp_path / "src")
    dataset = build_dataset("tar", tmp_path / "out", src=tmp_path / "src", **FOLDER)
    assert len(dataset) == 2 and not (tmp_path / CANARY).exists()


def test_lists_that_would_run_something_are_refused(tmp_path: Path):
    meta = tmp_path / "meta.yaml"
    meta.write_text(f"META: [!!python/object/apply:os.system ['touch {tmp_path / CANARY}']]\n")
    with pytest.raises(DataError, match="not a META list"):
        build_dataset("table", tmp_path / "out", src=meta)
    (tmp_path / "x.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        build_dataset("table", tmp_path / "out", src=tmp_path / "x.parquet")
    assert not (tmp_path / CANARY).exists()


def test_a_mesh_reads_nothing_outside_its_folder(tmp_path: Path, monkeypatch):
    from flagdit.data_pipelines.sources.meshes import beside as reader

    (tmp_path / "src").mkdir()
    (tmp_path / "secret.mtl").write_text("newmtl red\nKd 1 0 0\n")
    mesh = tmp_path / "src/a.obj"
    mesh.write_text("mtllib ../secret.mtl\nusemtl red\n" + CUBE)
    (tmp_path / "src/a.txt").write_text("a cube")
    for name in ("../secret.mtl", "/etc/passwd", "missing.mtl"):
        with pytest.raises(KeyError):
            reader(mesh, LIMITS)(name)
    dataset = build_dataset("meshes", tmp_path / "out", src=tmp_path / "src", size=16, multiple=4, count=1)
    pixels = np.array(Image.open(io.BytesIO(bytes(dataset.members(0)["png"]))))
    assert (pixels.std(axis=-1) < 2).all(), "plain grey, without the colour of the file outside"


def test_what_takes_too_long_is_left_out(tmp_path: Path, monkeypatch):
    (tmp_path / "slow.png").write_bytes(png())
    (tmp_path / "slow.txt").write_text("slow")
    monkeypatch.setattr(folder_source, "fitted", lambda *args: time.sleep(20))
    (rejected,) = folder_source.source(src=tmp_path, **FOLDER, limits=LimitsConfig(sample_seconds=0.2)).items
    assert "takes longer than limits.sample_seconds=0.2" in rejected.reason
    assert user_files.signal.getitimer(user_files.signal.ITIMER_REAL) == (0.0, 0.0)


def test_the_wave_module_agrees_with_the_test(tmp_path: Path):
    (tmp_path / "a.wav").write_bytes(sound(TONE))
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert file.getnframes() == 8000
