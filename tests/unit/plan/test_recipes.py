"""The recipes that scale: what their comments say of meshes is what the plan says, and it fits."""

import re
from pathlib import Path

import pytest

from flagdit.config import load
from flagdit.config.load import load_recipe
from flagdit.plan.report import make_plan

NAMES = ("t2i/600m", "t2i/3b", "t2i/5b", "t2i/7b", "t2v/7b_128k")
LINE = re.compile(r"#\s+(\d+) GPUs: (.*) → (\d+) GB")


def meshes(name: str) -> list[tuple[int, list[str], int]]:
    text = (Path(load.SHIPPED) / f"{name}.yaml").read_text()
    return [(int(m[1]), m[2].split(), int(m[3])) for m in LINE.finditer(text)]


@pytest.mark.parametrize("name", NAMES)
def test_meshes_for_8_64_and_512_gpus_fit_80_gb_as_the_comments_say(name):
    found = meshes(name)
    assert [gpus for gpus, _, _ in found] == [8, 64, 512]
    for gpus, overrides, gigabytes in found:
        plan = make_plan(load_recipe(name, overrides), gpu="a100-80", gpus=gpus)
        assert plan.fits and plan.memory.total / 1e9 == pytest.approx(gigabytes, abs=0.6), (gpus, overrides)


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_as_it_stands_fits_on_64(name):
    assert make_plan(load_recipe(name), gpu="h100", gpus=8 if name == "t2i/600m" else 64).fits


def test_the_long_video_is_128k_tokens():
    work = make_plan(load_recipe("t2v/7b_128k"), gpus=64).work
    assert work.seqlens == (128755,) and work.tokens_per_step == 8 * 128755
