"""A small model with random weights, a run folder that holds it, and a text encoder that needs no weights."""

import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flagdit.checkpoint import store
from flagdit.config.load import load_recipe, save_recipe
from flagdit.config.schema import Recipe
from flagdit.generate import pipeline as pipeline_module
from flagdit.model.flag_dit import FlagDiT

TEXT_DIM = 12


class Letters:
    """Stands in for a text encoder: one feature vector per word, drawn from its letters."""

    dim = TEXT_DIM

    def encode(self, prompts):
        return [torch.stack([self.word(w) for w in [*p.split(), "."]]) for p in prompts]

    def word(self, word: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(word.encode()))
        return torch.randn(TEXT_DIM, generator=generator)

    def to(self, device):
        return self


@pytest.fixture(autouse=True)
def letters(monkeypatch):
    monkeypatch.setattr(pipeline_module, "build_text_encoder", lambda cfg: Letters())


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    overrides = ["model.dim=32", "model.num_layers=2", "model.num_heads=2", "model.ffn_dim=48", "model.patch_size=2"]
    overrides += [f"model.text_dim={TEXT_DIM}", "sample.size=8x8", "sample.steps=3", "train.ema_decays=[0.9, 0.5]"]
    return load_recipe("quickstart", [*overrides, "sample.prompts=[a dog, a cat]", f"run_dir={tmp_path}", "name=run"])


@pytest.fixture
def class_recipe(recipe: Recipe) -> Recipe:
    model = replace(recipe.model, text_dim=0, num_classes=4)
    return replace(recipe, model=model, sample=replace(recipe.sample, prompts=["0", "3"]))


@pytest.fixture
def random_model():
    """A function: recipe and seed → a model whose every parameter is random (fresh ones give zero velocity)."""

    def make(recipe: Recipe, seed: int = 0) -> FlagDiT:
        model = FlagDiT(recipe.model).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * (0.2 if p.ndim > 1 else 0.5))
        return model

    return make


class Painter(torch.nn.Module):
    """Knows what every word looks like: v = (x1 − x)/(1 − t), with x1 the mean level of the prompt's words everywhere.

    Every solver arrives there up to its error, the last Euler step exactly; a prompt's level is `level(prompt)`.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.calls = []

    def forward(self, x, t_S, batch, inference=None):
        self.calls.append((t_S, batch, inference))
        level_S = torch.stack([level_of(f) for f in batch.text.unpack()])
        velocity = {}
        for modality, x_NP in x.items():
            segment_N = batch.layout.patch_segment[modality]
            velocity[modality] = (level_S[segment_N][:, None] - x_NP) / (1 - t_S[segment_N])[:, None]
        return velocity


def level_of(features: torch.Tensor) -> torch.Tensor:
    return features[:, 0].mean().tanh() * 0.8


@pytest.fixture
def level():
    """A function: prompt → the level that a Painter draws for it."""
    return lambda prompt: float(level_of(Letters().encode([prompt])[0]))


@pytest.fixture
def painting(recipe):
    """A function: modality and changes of the sample block → a pipeline whose model is a Painter."""

    def make(modality: str = "image", **sample) -> pipeline_module.Pipeline:
        model = replace(recipe.model, modalities={modality: 3})
        settings = {"modality": modality, "guidance": 1.0, "solver": "euler", "steps": 4, **sample}
        changed = replace(recipe, model=model, sample=replace(recipe.sample, **settings))
        return pipeline_module.Pipeline.build(Painter(changed.model), changed)

    return make


@pytest.fixture
def save_run(random_model):
    """A function: recipe → its run folder, with checkpoints of the given steps."""

    def save(recipe: Recipe, steps=(5, 10)) -> Path:
        run = Path(recipe.run_dir) / recipe.name
        run.mkdir(parents=True)
        save_recipe(recipe, run / "recipe.yaml")
        for step in steps:
            groups = ["model", *(f"ema_{d}" for d in recipe.train.ema_decays)]
            tensors = {g: random_model(recipe, seed=step + i).state_dict() for i, g in enumerate(groups)}
            store.save(run, step, tensors, {})
        return run

    return save
