"""The page about a run."""

import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from flagdit.config.load import save_recipe
from flagdit.config.schema import OptimizerConfig, Recipe, SampleConfig, TrainConfig
from flagdit.errors import CheckpointError
from flagdit.generate.images import grid
from flagdit.train.folder import RunFolder, append_line
from flagdit.train.report import MOST_STEPS, write_report

VOID = {"meta", "img", "line", "circle", "polyline", "br"}


class Page(HTMLParser):
    """Collects tags, checks that they close, and gathers text."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.links, self.images, self.words = [], [], [], []
        self.feed(html)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.links += [given[k] for k in ("href", "src") if k in given]
        if tag == "img":
            self.images.append(given)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    prompts = ["<script>alert(1)</script>", "dog"]
    optimizer = OptimizerConfig(warmup_steps=3)
    recipe = Recipe("a & b", optimizer=optimizer, train=TrainConfig(steps=30), sample=SampleConfig(prompts=prompts))
    folder = RunFolder(tmp_path)
    save_recipe(recipe, folder.recipe)
    return folder


def metrics(step: int, **changes) -> dict:
    line = {"step": step, "loss": 1 / step, "grad_norm": 0.5, "lr": 0.1, "tokens": 10 * step, "samples": step}
    return {
        **line,
        "tokens_per_s": 5.0,
        "samples_per_s": 1.0,
        "mfu": None,
        "bad_steps": 0,
        "seconds": 2.0 * step,
        **changes,
    }


def test_report_of_a_run_that_has_only_begun(folder):
    page = Page(write_report(folder.path).read_text())
    assert "step 0 of 30" in page.text and "a & b" in page.text and "model" in page.text
    assert not page.images


def test_report_of_a_full_run_is_one_file(folder):
    for step in range(1, 31):
        append_line(folder.metrics, metrics(step, mfu=0.4, loss=None if step == 7 else 1 / step))
    for step in (10, 30):
        line = {"step": step, "val_loss": 0.5, "val_loss_at": {"0.1": 0.75, "0.9": 0.25}, "val_weights": "ema_0.9999"}
        append_line(folder.metrics, {**line, "val_seconds": 1.0})
    samples = [{"id": i, "key": f"train-000000/p{i}", "epoch": 0, "loss": 0.5} for i in range(9)]
    event = {"kind": "step", "step": 7, "reason": "loss is nan", "loss": "nan", "grad_norm": 1.0}
    append_line(folder.ledger, {**event, "suspects": [3], "samples": samples})
    unread = {"kind": "sample", "step": 8, "reason": "checksum", "samples": [{"id": 1, "key": "train-000000/q"}]}
    append_line(folder.ledger, unread)
    (folder.path / "figures.json").write_text('{"retrieval_top1": 0.9653, "prompts": 1440, "seconds": 331.27}')
    Image.new("RGB", (300, 40), "red").save(folder.path / "subjects_and_styles.png")

    page = Page(write_report(folder.path).read_text())
    assert "finished" in page.text and "1m00s" in page.text and "MFU 40.0%" in page.text
    assert "retrieval top1 96.5%" in page.text and "1,440" in page.text and "331.3" in page.text
    assert "train-000000/p3" in page.text and "train-000000/p4" not in page.text and "train-000000/q" in page.text
    assert "best 0.5000 at 10" in page.text and "mean over t, ema_0.9999" in page.text and "t = 0.9" in page.text
    assert [image["alt"] for image in page.images] == ["subjects and styles"]
    assert all(link.startswith("data:image/") for link in page.links)


def test_samples_stand_by_prompt_and_step(folder):
    folder.samples.mkdir()
    about = {"prompts": ["<script>alert(1)</script>", "dog"], "weights": "ema_0.9", "columns": 8, "gap": 2, "zoom": 4}
    for step in range(1, 31):
        tiles = [Image.new("RGB", (6, 5), (step, i, 0)) for i in range(2)]
        grid(tiles, columns=8, zoom=4, gap=2).save(folder.sample_grid(step))
        folder.sample_grid(step).with_suffix(".json").write_text(json.dumps({**about, "tile": [6, 5]}))
    other = {**about, "prompts": ["cat"], "tile": [6, 5]}
    folder.sample_grid(2).with_suffix(".json").write_text(json.dumps(other))  # the prompts were changed later

    html = write_report(folder.path).read_text()
    page = Page(html)
    assert len(page.images) == 2 * MOST_STEPS and "alert(1)" in page.text and "<script>alert" not in html
    assert "step 1 " in page.text and "step 30 " in page.text and "step 2 " not in page.text
    assert page.images[0]["src"] != page.images[MOST_STEPS]["src"]
    import base64
    import io

    last_dog = Image.open(io.BytesIO(base64.b64decode(page.images[-1]["src"].partition(",")[2])))
    assert last_dog.size == (6, 5) and last_dog.getpixel((5, 4)) == (30, 1, 0)


def test_only_runs_have_reports(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no recipe\.yaml"):
        write_report(tmp_path)


def test_losses_of_an_evaluation_are_a_table(folder):
    losses = {"train": {"24×24": {"0.25": 1.5, "0.75": 0.25}}, "heldout": {"24×24": {"0.25": 1.75, "0.75": 0.5}}}
    (folder.path / "evaluation.json").write_text(json.dumps({"loss_by_size_and_time": losses}))
    text = Page(write_report(folder.path).read_text()).text
    assert "Flow loss by size and time" in text and "0.25 0.75" in text
    assert "train, 24×24 1.500 0.250" in text and "heldout, 24×24 1.750 0.500" in text
