"""Files of torch.save: read without executing anything that is in them."""

import argparse
import pickle
import zipfile

import pytest
import torch

from flagdit.checkpoint import pth
from flagdit.checkpoint.pth import PthFile, read_namespace
from flagdit.errors import CheckpointError

VALUES = {"model": "NextDiT_2B_patch2", "lr": 1e-4, "steps": 10**12, "ema": True, "lm": None, "sizes": [256, (1, 2)]}
VALUES |= {"nested": {"a": -1}, "empty": [], "one": (3,), "text": "λ" * 300, "no": False}


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def trap(tmp_path):
    return tmp_path / "executed"


def test_arguments_are_read_as_they_were_saved(tmp_path):
    torch.save(argparse.Namespace(**VALUES), tmp_path / "zip.pth")
    assert read_namespace(tmp_path / "zip.pth") == VALUES
    for protocol in (2, 3, 4, 5):
        (tmp_path / "bare.pth").write_bytes(pickle.dumps(argparse.Namespace(**VALUES), protocol=protocol))
        assert read_namespace(tmp_path / "bare.pth") == VALUES, protocol


@pytest.mark.parametrize("hidden", ["alone", "inside", "key"])
def test_malicious_arguments_are_refused_and_not_executed(tmp_path, trap, hidden):
    evil = Evil(trap)
    content = {"alone": evil, "inside": argparse.Namespace(x=[evil]), "key": argparse.Namespace(x={"a": (evil,)})}
    torch.save(content[hidden], tmp_path / "model_args.pth")
    with pytest.raises(CheckpointError, match="Nothing in it was executed"):
        read_namespace(tmp_path / "model_args.pth")
    assert not trap.exists()
    torch.load(tmp_path / "model_args.pth", weights_only=False)
    assert trap.exists(), "the trap works where it is not refused"


@pytest.mark.parametrize(
    "content",
    [argparse.Action([], "x"), {"a": 1}, [argparse.Namespace()], "text", torch.zeros(2)],
    ids=["other class", "dict", "list", "text", "tensor"],
)
def test_other_content_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"not a plain argparse.Namespace"):
        read_namespace(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"junk",
        b"\x80\x02}q\x00.",
        b"\x80\x02cargparse\nNamespace\n)\x81.",
        b"\x80\x02cargparse\nNamespace\n)R}b.",
        b"\x80\x02cargparse\nNamespace\n)\x81K\x01b.",
        b"\x80\x02(K\x01K\x02u.",
        b"\x80\x02h\x07.",
        b"\x80\x02cos\nsystem\n(X\x02\x00\x00\x00lstR.",
    ],
)
def test_broken_pickles_are_refused(tmp_path, raw):
    (tmp_path / "a.pth").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"not a plain argparse.Namespace"):
        read_namespace(tmp_path / "a.pth")


def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(pth, "LARGEST_ARGUMENTS", 1000)
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"0" * 100_000)
    with pytest.raises(CheckpointError, match="far too large"):
        read_namespace(tmp_path / "a.pth")


def test_weights_are_read_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(pth, "REMAP_AFTER", 100)
    weights = {f"w{i}": torch.randn(5, 7, dtype=torch.float32) for i in range(6)} | {"b": torch.ones(3).bfloat16()}
    weights["view"] = torch.arange(12.0).reshape(3, 4).t()
    torch.save(weights, tmp_path / "consolidated.03-of-04.pth")
    source = PthFile(tmp_path / "consolidated.03-of-04.pth")
    assert source.saved_as == "consolidated.03-of-04"
    assert source.entries["b"].dtype == torch.bfloat16 and source.entries["view"].shape == (4, 3)
    for name, x in source.items():
        assert torch.equal(x, weights[name]) and x.is_contiguous()


def test_the_format_before_torch_16_is_read_too(tmp_path):
    torch.save({"w": torch.arange(5.0)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    source = PthFile(tmp_path / "old.pth")
    assert torch.equal(source.read("w"), torch.arange(5.0)) and source.saved_as == ""


def test_malicious_weights_are_refused_and_not_executed(tmp_path, trap):
    for new in (True, False):
        torch.save({"w": torch.zeros(2), "x": Evil(trap)}, tmp_path / "a.pth", _use_new_zipfile_serialization=new)
        with pytest.raises(CheckpointError, match="nothing was"):
            PthFile(tmp_path / "a.pth")
        assert not trap.exists()


def test_truncated_and_other_files_are_refused(tmp_path):
    torch.save({f"w{i}": torch.randn(100) for i in range(9)}, tmp_path / "whole.pth")
    raw = (tmp_path / "whole.pth").read_bytes()
    for length in (0, 10, len(raw) // 2, len(raw) - 30):
        (tmp_path / "cut.pth").write_bytes(raw[:length])
        with pytest.raises(CheckpointError, match="truncated"):
            PthFile(tmp_path / "cut.pth")
    for content in ([torch.zeros(2)], {"w": 1}, {"model": {"w": torch.zeros(2)}}, {1: torch.zeros(2)}):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(CheckpointError, match="does not hold named tensors"):
            PthFile(tmp_path / "other.pth")
