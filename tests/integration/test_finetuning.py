"""Training from imported weights, whole or with adapters: started, continued, sampled, exported."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flagdit.checkpoint import store
from flagdit.checkpoint.export import Options, export_run
from flagdit.checkpoint.importing import import_weights
from flagdit.checkpoint.inspect import diff
from flagdit.checkpoint.weights import open_weights
from flagdit.config.load import load_recipe, save_recipe
from flagdit.errors import CheckpointError, RecipeError
from flagdit.generate.pipeline import load_pipeline
from flagdit.train.loop import train

ONE = {"train__steps": 1, "optimizer__warmup_steps": 1}
LORA = {"lora__rank": 2, "lora__alpha": 4, "lora__targets": "[wq,wo,w2]"}


@pytest.fixture
def imported(tiny, tmp_path):
    """A run of imported weights of the tiny network: trained, exported, imported."""
    run = train(tiny(name="first", train__steps=2))
    export_run(run, tmp_path / "exported", "safetensors", Options(dtype="fp32"))
    import_weights(tmp_path / "exported", tmp_path / "runs" / "imported")
    return tmp_path / "runs" / "imported"


def raw(run: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    return dict(open_weights(run, step=step, ema=-1).tensors.items())


def groups(run: Path) -> dict:
    return store.load(store.find(run)).tensors


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[n]) for n, x in a.items())


def test_training_starts_from_imported_weights(tiny, imported, tmp_path):
    recipe = tiny(name="tuned", train__init_from=imported, optimizer__lr=0, **ONE)
    run = train(recipe)
    assert equal(raw(run), raw(imported)), "with a learning rate of zero nothing moves"
    assert equal(groups(run)["ema_0.99"], raw(imported)), "averages start as copies"
    assert not groups(run)["optimizer"]["step"].item() > 1, "the optimizer is fresh"
    from_seed = train(tiny(name="seed", optimizer__lr=0, **ONE))
    assert not equal(raw(from_seed), raw(imported))


def test_which_average_to_start_from(tiny, imported, tmp_path):
    first = tmp_path / "runs" / "first"
    for ema in (-1, 0, 1):
        recipe = tiny(name=f"e{ema}", train__init_from=first, train__init_ema=ema, optimizer__lr=0, **ONE)
        wanted = dict(open_weights(first, ema=ema).tensors.items())
        assert equal(raw(train(recipe)), wanted), ema


def test_a_tuned_run_continues_without_its_start(tiny, imported, tmp_path):
    whole = train(tiny(name="whole", train__init_from=imported, train__steps=4))
    halves = dict(name="halves", train__init_from=imported)
    train(tiny(**halves, train__steps=2))
    imported.rename(tmp_path / "elsewhere")
    assert equal(raw(train(tiny(**halves, train__steps=4))), raw(whole))


def test_only_adapters_train_and_are_saved(tiny, imported, tmp_path):
    run = train(tiny(name="lora", train__init_from=imported, **LORA))
    base, tuned = raw(imported), raw(run)
    changed = {name for name, x in tuned.items() if not torch.equal(x, base[name])}
    assert changed == {n for n in base if n.endswith((".wq.weight", ".wo.weight", ".w2.weight"))}
    saved = groups(run)
    assert saved["model"].keys() == {f"{n.removesuffix('.weight')}.lora_{ab}.weight" for n in changed for ab in "ab"}
    assert saved["ema_0.5"].keys() == saved["model"].keys()
    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert len(lines) == 6


def test_adapters_continue_exactly_and_need_their_base(tiny, imported, tmp_path):
    whole = train(tiny(name="whole", train__init_from=imported, **LORA, train__steps=4))
    halves = dict(name="halves", train__init_from=imported, **LORA)
    train(tiny(**halves, train__steps=2))
    run = train(tiny(**halves, train__steps=4))
    assert equal(raw(run), raw(whole))
    other = train(tiny(name="other", seed=9, **ONE))
    with pytest.raises(CheckpointError, match="stand on other weights"):
        train(tiny(**{**halves, "train__init_from": other}, train__steps=6))
    recipe = load_recipe(run / "recipe.yaml")
    save_recipe(replace(recipe, train=replace(recipe.train, init_from=str(other))), run / "recipe.yaml")
    with pytest.raises(CheckpointError, match="belong to other weights"):
        open_weights(run)
    save_recipe(replace(recipe, train=replace(recipe.train, init_from="gone")), run / "recipe.yaml")
    with pytest.raises(CheckpointError, match="init_from=gone"):
        open_weights(run)


def test_a_tuned_run_samples_and_exports_merged(tiny, imported, tmp_path):
    run = train(tiny(name="lora", train__init_from=imported, **LORA))
    pipeline = load_pipeline(run, ema=-1)
    with torch.no_grad():
        for name, p in pipeline.model.named_parameters():
            assert torch.equal(p, raw(run)[name])
    (picture,) = pipeline.generate([""], pipeline.recipe.sample)
    assert picture.shape == (3, 1, 8, 8)
    export_run(run, tmp_path / "merged", "diffusers", Options(dtype="fp32", ema=-1))
    import_weights(tmp_path / "merged", tmp_path / "runs" / "again")
    assert equal(raw(tmp_path / "runs" / "again"), raw(run))
    assert not diff(tmp_path / "runs" / "again", imported)["equal"]
    assert "Adapters (merged) | rank 2, alpha 4, on wq, wo, w2" in (tmp_path / "merged" / "README.md").read_text()


def test_adapters_in_bf16(tiny, imported):
    run = train(tiny(name="half", train__init_from=imported, train__precision="bf16", **LORA, train__steps=2))
    assert {x.dtype for x in groups(run)["model"].values()} == {torch.float32}
    assert not equal(raw(run), raw(imported))


def test_what_cannot_be_started_is_told(tiny, imported, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds imported weights.*init_from"):
        train(load_recipe(imported / "recipe.yaml", ["train.steps=9"]))
    with pytest.raises(RecipeError, match=r"another network: model.dim is 16 there and 32 here"):
        train(tiny(name="wide", train__init_from=imported, model__dim=32))
    with pytest.raises(RecipeError, match=r"model.time_scale is 1000.0 there and 1.0 here"):
        train(tiny(name="scale", train__init_from=imported, model__time_scale=1.0))
    with pytest.raises(CheckpointError, match="init_from=nowhere: there is no such folder"):
        train(tiny(name="gone", train__init_from="nowhere"))
    for name in ("wide", "scale", "gone"):
        assert not (tmp_path / "runs" / name / "recipe.yaml").exists()
    for keys, told in (
        ({"lora__rank": 2}, "init_from names none"),
        ({"lora__rank": 2, "train__init_from": "x", "lora__targets": "[wx]"}, r"names wx; use some of wq"),
        ({"lora__rank": 2, "train__init_from": "x", "lora__targets": "[]"}, r"lora.targets is empty"),
        ({"train__init_ema": 0}, r"no effect without train.init_from"),
    ):
        with pytest.raises(RecipeError, match=told):
            tiny(**keys)
