"""Retrieval: a model that draws the right pictures scores 1, one that draws others does not."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from flagdit.config.schema import Recipe
from flagdit.data_pipelines.build import build_dataset
from flagdit.data_pipelines.encode import encode_dataset
from flagdit.data_pipelines.index import Dataset
from flagdit.errors import DataError, RecipeError
from flagdit.generate import evaluate, scores
from flagdit.generate.evaluate import evaluate_retrieval, evaluate_run, flow_losses, nearest
from flagdit.generate.pipeline import Pipeline
from flagdit.model.tokens import modality_of, patchify

COUNT = 12


def test_nearest_is_by_l2_among_pictures_of_the_same_size():
    flat = [torch.full((3, 1, 2, 2), v) for v in (-1.0, 0.0, 0.5)] + [torch.zeros(3, 1, 2, 4)]
    near = [torch.full((3, 1, 2, 2), v) for v in (-0.6, 0.2, 0.9)]
    assert nearest(near, flat) == [0, 1, 2]
    assert nearest([torch.ones(3, 1, 2, 4), torch.ones(3, 1, 9, 9)], flat) == [3, -1]
    # one pixel far off counts more than many a little: L2, not L1
    picture, little, far = torch.zeros(3, 1, 2, 2), torch.full((3, 1, 2, 2), 0.2), torch.zeros(3, 1, 2, 2)
    far[0, 0, 0, 0] = 1.0
    assert nearest([picture], [far, little]) == [1] and far.sum() < little.sum()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    """12 pictures of two sizes and 12 classes, some of them held out, encoded as pixels without text."""
    root = tmp_path_factory.mktemp("retrieval")
    (root / "src").mkdir()
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        shape = [(8, 8, 3), (4, 12, 3)][i % 2]
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(root / f"src/p{i:02d}.png")
        (root / f"src/p{i:02d}.json").write_text(json.dumps({"caption": f"picture {i}", "label": i}))
    build_dataset("folder", root / "raw", src=root / "src", size=8, multiple=4, holdout=0.3)
    recipe = Recipe(model=replace(Recipe().model, text_dim=0, num_classes=COUNT))
    return encode_dataset(root / "raw", root / "encoded", recipe)


class Oracle(nn.Module):
    """Knows the picture of every class: v = (x1 − x)/(1 − t), whose last Euler step arrives at it."""

    def __init__(self, cfg, pictures):
        super().__init__()
        self.cfg, self.pictures = cfg, pictures
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x, t_S, batch, inference=None):
        patch = modality_of("image").patch(self.cfg.patch_size)
        known = torch.cat([patchify(self.pictures[int(label)], patch) for label in batch.labels_S])
        return {"image": (known - x["image"]) / (1 - t_S[batch.layout.patch_segment["image"]])[:, None]}


@pytest.fixture
def oracle(class_recipe, dataset):
    """A function: class → which class's picture is drawn → a pipeline."""

    def make(draws=lambda label: label) -> Pipeline:
        model = replace(class_recipe.model, num_classes=COUNT)
        recipe = replace(class_recipe, model=model, sample=replace(class_recipe.sample, guidance=1.0, prompts=[]))
        latents = {s.label: s.latent_CFHW for s in map(dataset.read, range(len(dataset)))}
        pictures = {label: latents[draws(label)] for label in latents}
        return Pipeline.build(Oracle(recipe.model, pictures), recipe)

    return make


def test_a_model_that_draws_what_is_asked_scores_one(oracle, dataset):
    found = evaluate_retrieval(oracle(), dataset)
    assert found.top1 == {"train": 1.0, "heldout": 1.0}
    for split, ids in dataset.splits.items():
        assert len(found.drawn[split].pictures) == len(ids) > 1
        for drawn, real in zip(found.drawn[split].pictures, found.drawn[split].references, strict=True):
            torch.testing.assert_close(drawn, real, rtol=0, atol=1e-5)


def test_a_model_that_draws_other_pictures_scores_their_share(oracle, dataset):
    heldout = {dataset.read(i).label for i in dataset.splits["heldout"]}
    same_size = {label: (label + 2) % COUNT for label in range(COUNT)}
    found = evaluate_retrieval(oracle(lambda label: same_size[label] if label in heldout else label), dataset)
    assert found.top1 == {"train": 1.0, "heldout": 0.0}, "held-out pictures compete with those of training"


def test_pictures_of_the_same_class_are_all_right(oracle, dataset, monkeypatch):
    pipeline = oracle(lambda label: (label + 2) % COUNT)
    monkeypatch.setattr(evaluate, "_condition", lambda sample, pipeline: sample.label)
    assert evaluate_retrieval(pipeline, dataset).top1 == {"train": 0.0, "heldout": 0.0}
    parity = evaluate._condition
    monkeypatch.setattr(evaluate, "_condition", lambda sample, pipeline: parity(sample, pipeline) % 2)
    pipeline.model.pictures = {k % 2: v for k, v in pipeline.model.pictures.items() if k < 2}
    assert evaluate_retrieval(pipeline, dataset).top1 == {"train": 1.0, "heldout": 1.0}


def test_a_part_of_the_captions_is_spread_over_the_split(oracle, dataset):
    found = evaluate_retrieval(oracle(), dataset, most=2)
    assert {k: len(v.pictures) for k, v in found.drawn.items()} == {"train": 2, "heldout": 2}
    assert evaluate._spread(range(10, 20), 5) == [10, 12, 14, 16, 18]
    assert evaluate._spread(range(3), 7) == [0, 1, 2] and evaluate._spread(range(0), None) == []


def test_what_cannot_be_evaluated_is_told(oracle, dataset, recipe, random_model):
    bare = replace(recipe, model=replace(recipe.model, text_dim=0))
    with pytest.raises(RecipeError, match="neither captions nor classes"):
        evaluate_retrieval(Pipeline.build(random_model(bare), bare), dataset)
    pipeline = oracle()
    pipeline.codec.spec = lambda: {"kind": "other"}
    with pytest.raises(DataError, match="--data"):
        evaluate_retrieval(pipeline, dataset)


@pytest.fixture
def evaluated(oracle, dataset, monkeypatch):
    """A pipeline that the functions under test open instead of a run, and features that need no network."""
    pipeline = oracle()
    pipeline.recipe = replace(pipeline.recipe, data=replace(pipeline.recipe.data, path=str(dataset.path)))
    pipeline.step = 7
    monkeypatch.setattr(evaluate, "load_pipeline", lambda run, step, ema: pipeline)
    monkeypatch.setattr(scores, "lite0_installed", lambda: True)
    monkeypatch.setattr(scores, "lite0", lambda: lambda pictures: torch.stack([p.mean((1, 2, 3)) for p in pictures]))
    return pipeline


def test_a_run_gets_figures_and_sheets(evaluated, dataset, tmp_path):
    figures = evaluate_run(tmp_path)
    train, heldout = (len(dataset.splits[s]) for s in ("train", "heldout"))
    assert figures == {
        "retrieval_top1": 1.0,
        "prompts": train,
        "lite0_top1": 1.0,
        "fd_lite0": pytest.approx(0, abs=1e-3),
        "heldout_top1": 1.0,
        "heldout_prompts": heldout,
        "heldout_lite0_top1": 1.0,
        "heldout_fd_lite0": pytest.approx(0, abs=1e-3),
    }
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    about = json.loads((tmp_path / "evaluation.json").read_text())
    assert about["figures"] == figures and about["step"] == 7
    sheet = np.asarray(Image.open(tmp_path / "retrieval_heldout.png"))
    assert sheet.std() > 10 and Image.open(tmp_path / "retrieval_train.png").size[0] > 100
    assert evaluate_run(tmp_path, data=str(dataset.path), most=1)["prompts"] == 1
    with pytest.raises(DataError, match="no such folder"):
        evaluate_run(tmp_path, data=str(tmp_path / "nowhere"))


def test_other_sizes_are_compared_at_the_size_of_the_data(evaluated, dataset, tmp_path, monkeypatch):
    asked = []

    def generate(conditions, cfg, *, sizes, ids, on_step=None):
        asked.extend(sizes)
        return [evaluate.resize(evaluated.model.pictures[c], size) for c, size in zip(conditions, sizes, strict=True)]

    monkeypatch.setattr(evaluated, "generate", generate)
    figures = evaluate_run(tmp_path, scales=[2.0])
    assert set(asked) == {(16, 16), (24, 8)}
    assert figures["retrieval_top1_at_2x"] == 1.0 and "fd_lite0_at_2x" in figures and "retrieval_top1" not in figures
    assert (tmp_path / "retrieval_train_at_2x.png").exists()
    assert [evaluate.scaled(24, s, 4) for s in (0.01, 1, 1.5, 2)] == [4, 24, 36, 48]


def test_flow_loss_is_by_size_and_time(evaluated, dataset):
    """The oracle's velocity is (x1 − x_t)/(1 − t) = x1 − x0: no loss, unless it draws another picture."""
    found = flow_losses(evaluated, dataset, "train", bins=4)
    assert set(found) == {"8×8", "12×4"} and set(found["8×8"]) == {"0.12", "0.38", "0.62", "0.88"}
    assert max(loss for at in found.values() for loss in at.values()) < 1e-6
    evaluated.model.pictures = {k: -v for k, v in evaluated.model.pictures.items()}
    wrong = flow_losses(evaluated, dataset, "train", bins=4)["8×8"]
    times = [float(t) for t in wrong]
    # the error is 2·x1/(1 − t): it grows towards data as 1/(1 − t)²
    ratio = wrong["0.88"] / wrong["0.12"]
    assert times == sorted(times) and ratio == pytest.approx(((1 - 0.125) / (1 - 0.875)) ** 2, rel=1e-3)


def test_given_networks_measure_too(evaluated, tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "inception", lambda weights: lambda pictures: torch.zeros(len(pictures), 2))
    clip = {"clip_score": 30.0, "clip_top1": 0.5}
    monkeypatch.setattr(scores, "ClipScores", lambda folder: lambda pictures, captions: dict(clip))
    figures = evaluate_run(tmp_path, fid=tmp_path, clip=tmp_path, most=2)
    assert figures["fid"] == figures["heldout_fid"] == 0
    assert figures["clip_score"] == 30 and figures["heldout_clip_top1"] == 0.5


def test_clips_are_drawn_at_their_own_length_and_sets_have_their_names(evaluated, tmp_path, monkeypatch):
    """Of several data sets each is measured; of sounds, which no network judges here, the flow loss alone."""
    opened = {"clips": _Set("video", [2, 2, 5], evaluated.codec.spec()), "sounds": _Set("audio", [1], None)}
    monkeypatch.setattr(evaluate.Dataset, "open", lambda path, *_, **__: opened[path])
    monkeypatch.setattr(evaluated, "of", lambda modality: evaluated)
    asked = []

    def generate(conditions, cfg, *, sizes, ids, on_step=None):
        asked.append((conditions, cfg.modality, cfg.frames, ids))
        return [opened["clips"].read(c).latent_CFHW for c in conditions]

    monkeypatch.setattr(evaluated, "generate", generate)
    monkeypatch.setattr(evaluate, "flow_losses", lambda pipeline, dataset, split: {dataset.modality: split})
    data = replace(evaluated.recipe.data, sets={"clips": 1.0, "sounds": 1.0})
    evaluated.recipe = replace(evaluated.recipe, data=data)
    figures = evaluate_run(tmp_path)
    assert asked == [([0, 1], "video", 2, [0, 1]), ([2], "video", 5, [2])]
    assert figures["video_retrieval_top1"] == 1 and figures["video_prompts"] == 3
    assert not any(name.startswith("audio") for name in figures)
    about = json.loads((tmp_path / "evaluation.json").read_text())
    assert about["loss_by_size_and_time"] == {"video_train": {"video": "train"}, "audio_train": {"audio": "train"}}


class _Set:
    """Stands in for a data set of random clips, each its own class."""

    def __init__(self, modality, frames, codec):
        self.info = {"kind": "encoded"}
        self.modality, self.codec, self.splits = modality, codec, {"train": range(len(frames))}
        self.samples = [SimpleNamespace(label=i, latent_CFHW=torch.rand(3, f, 4, 4)) for i, f in enumerate(frames)]

    def __len__(self):
        return len(self.samples)

    def read(self, i):
        return self.samples[i]
