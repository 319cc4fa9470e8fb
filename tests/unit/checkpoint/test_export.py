"""Exports: exact both ways, the same bytes whoever trained, whole or not there at all."""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flagdit.checkpoint import export as export_module
from flagdit.checkpoint import lumina_files, store
from flagdit.checkpoint.export import FORMATS, Options, export_run
from flagdit.checkpoint.importing import import_weights
from flagdit.checkpoint.inspect import diff, inspect
from flagdit.checkpoint.lumina import expected_shapes
from flagdit.checkpoint.pth import read_namespace
from flagdit.checkpoint.weights import open_weights
from flagdit.config.load import load_recipe, save_recipe
from flagdit.config.schema import Recipe
from flagdit.errors import CheckpointError, RecipeError

FP32 = Options(dtype="fp32", encoders=False)


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    return dict(open_weights(run).tensors.items())


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def trained(tmp_path):
    """A run with averages, as training leaves it: a function of changes to the recipe → its folder."""

    def make(folder: str, **blocks) -> Path:
        recipe = load_recipe("quickstart", ["model.dim=32", "model.num_layers=12", "model.num_heads=2"])
        recipe = replace(recipe, name="mine", run_dir=str(tmp_path / folder))
        for block, changes in blocks.items():
            recipe = replace(recipe, **{block: replace(getattr(recipe, block), **changes)})
        run = tmp_path / folder / "mine"
        run.mkdir(parents=True)
        save_recipe(recipe, run / "recipe.yaml")
        generator = torch.Generator().manual_seed(0)
        groups = {
            group: {n: torch.randn(s, generator=generator) for n, s in expected_shapes(recipe.model).items()}
            for group in ("model", "ema_0.995", "ema_0.98")
        }
        if blocks:  # another order of parameters, as another engine may keep them
            groups = {group: dict(reversed(named.items())) for group, named in groups.items()}
        store.save(run, 40, groups, {"data": "c0ffee", "recipe": "x", "base": None})
        return run

    return make


@pytest.mark.parametrize("kind", FORMATS)
def test_round_trips_are_exact(kind, golden, imported, tmp_path):
    export_run(imported, tmp_path / "out", kind, replace(FP32, parts=2, shard_gb=0.0003))
    import_weights(tmp_path / "out", tmp_path / "again")
    assert equal(tensors_of(tmp_path / "again"), tensors_of(imported))
    mine, theirs = (load_recipe(run / "recipe.yaml") for run in (imported, tmp_path / "again"))
    assert replace(theirs, name=mine.name, run_dir=mine.run_dir) == mine
    # … and out again: the same files.
    export_run(tmp_path / "again", tmp_path / "out2", kind, replace(FP32, parts=2, shard_gb=0.0003))
    before, after = files_of(tmp_path / "out"), files_of(tmp_path / "out2")
    weights = [name for name in before if name.endswith(".safetensors")]
    assert len(weights) > 1 and all(before[name] == after[name] for name in weights)


def test_a_run_that_the_official_code_lacks_goes_out_and_comes_back(trained, tmp_path):
    run = trained("a")
    for kind in ("safetensors", "diffusers"):
        export_run(run, tmp_path / kind, kind, FP32)
        assert "step 40" in import_weights(tmp_path / kind, tmp_path / f"again_{kind}")
        assert equal(tensors_of(tmp_path / f"again_{kind}"), tensors_of(run))
        assert load_recipe(tmp_path / f"again_{kind}/recipe.yaml").text == load_recipe(run / "recipe.yaml").text
    with pytest.raises(CheckpointError, match=r"the official code has no such network: model.qk_norm is rms"):
        export_run(run, tmp_path / "never", "lumina", FP32)
    assert not (tmp_path / "never").exists()


def test_bytes_do_not_depend_on_who_trained(trained, tmp_path):
    one = trained("a")
    other = trained(
        "b",
        parallel={"tensor": 2, "zero": 3, "context": 2},
        train={"accumulation": 2, "device": "cpu"},
        data={"workers": 3},
        model={"checkpointing": "block"},
    )
    for kind in ("safetensors", "diffusers"):
        export_run(one, tmp_path / f"a_{kind}", kind, FP32)
        export_run(other, tmp_path / f"b_{kind}", kind, FP32)
        assert files_of(tmp_path / f"a_{kind}") == files_of(tmp_path / f"b_{kind}")


def test_averages_dtypes_and_shards(trained, tmp_path):
    run = trained("a")
    groups = {g: store.load(store.find(run)).tensors[g] for g in ("model", "ema_0.995", "ema_0.98")}
    for ema, group in ((None, "ema_0.995"), (1, "ema_0.98"), (-1, "model")):
        export_run(run, tmp_path / group, "safetensors", Options(dtype="fp32", ema=ema))
        assert equal(load_file(tmp_path / group / "model.safetensors"), groups[group])
    for dtype in ("bf16", "fp16"):
        export_run(run, tmp_path / dtype, "safetensors", Options(dtype=dtype, shard_gb=0.0001))
        index = json.loads((tmp_path / dtype / "model.safetensors.index.json").read_text())
        found = {}
        for file in set(index["weight_map"].values()):
            assert (tmp_path / dtype / file).stat().st_size < 120_000
            found |= load_file(tmp_path / dtype / file)
        cast_to = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        assert equal(found, {n: x.to(cast_to) for n, x in groups["ema_0.995"].items()})


def test_the_official_folder(goldens, imported, golden, tmp_path):
    export_run(imported, tmp_path / "out", "lumina", replace(FP32, parts=2, ema=-1))
    parts = [load_file(tmp_path / f"out/consolidated.{rank:02d}-of-02.safetensors") for rank in (0, 1)]
    assert parts[0].keys() == golden.weights.keys() == parts[1].keys()
    arguments = read_namespace(tmp_path / "out" / "model_args.pth")
    assert arguments["qk_norm"] is True and arguments["model_parallel_size"] == 2
    with pytest.raises(CheckpointError, match="cannot be split into 5 parts"):
        export_run(imported, tmp_path / "never", "lumina", replace(FP32, parts=5))
    assert not (tmp_path / "never").exists() and not list(tmp_path.glob(store.STAGING + "*"))


@pytest.mark.parametrize("kind", FORMATS)
def test_card_manifest_and_example(kind, golden, imported, tmp_path):
    (imported / "figures.json").write_text('{"retrieval_top1": 0.97, "each": [1, 2]}')
    folder = tmp_path / "out"
    export_run(imported, folder, kind, replace(FP32, licence="apache-2.0"))
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "as trained by others (lumina official)" in card and "| retrieval_top1 | 0.97 |" in card
    assert f"{sum(x.numel() for x in tensors_of(imported).values()):,}" in card and "each" not in card
    manifest = json.loads((folder / "manifest.json").read_text())["files"]
    assert manifest.keys() == files_of(folder).keys() - {"manifest.json"}
    for name, raw in files_of(folder).items():
        if name != "manifest.json":
            assert manifest[name] == {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}, name
    if kind != "diffusers":  # theirs runs in test_diffusers.py
        done = subprocess.run([sys.executable, "-I", folder / "example.py"], capture_output=True, text=True, check=True)
        assert "all hashes are right" in done.stdout


def test_a_card_without_a_licence_says_so(trained, tmp_path):
    export_run(trained("a"), tmp_path / "out", "safetensors", Options())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: other" in card and "set one before you publish" in card
    assert "encoded, content c0ffee, split train" in card and str(tmp_path) not in card


def test_a_card_names_every_data_set_with_its_weight(trained, tmp_path):
    sets = {"/home/me/photos/encoded": 6.0, "/home/me/clips/encoded": 3.0, "s3://bucket/notes": 0.5}
    export_run(trained("a", data={"sets": sets}), tmp_path / "out", "safetensors", Options())
    card = (tmp_path / "out" / "README.md").read_text()
    named = "photos/encoded (weight 6), clips/encoded (weight 3), bucket/notes (weight 0.5), content c0ffee"
    assert named in card and "/home/me" not in card


def test_a_full_disk_leaves_nothing(imported, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "write_card", full)
    with pytest.raises(CheckpointError, match="No space left"):
        export_run(imported, tmp_path / "out", "safetensors", FP32)
    assert {p.name for p in tmp_path.iterdir()} == {"runs", "official"}


def test_wrong_requests(imported, tmp_path):
    for kind, options, told in (
        ("onnx", FP32, "--format onnx"),
        ("safetensors", Options(dtype="int8"), "--dtype int8"),
        ("safetensors", Options(step=3), "no complete checkpoint of step 3"),
        ("diffusers", Options(), "hub name"),
    ):
        with pytest.raises((CheckpointError, RecipeError), match=told):
            export_run(imported, tmp_path / "out", kind, options)
        assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists"):
        export_run(imported, tmp_path / "out", "safetensors", FP32)


def test_every_topology_key_is_dropped_from_the_exported_recipe():
    assert export_module.portable(replace(Recipe(), run_dir="/x")).run_dir == Recipe().run_dir
    assert lumina_files.same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))


def test_inspect(imported, golden, tmp_path):
    facts = inspect(imported, tensors=True)
    tensors = tensors_of(imported)
    assert facts["format"] == "run" and facts["tensors"] == len(tensors) and facts["checkpoints"] == [0]
    assert facts["parameters"] == sum(x.numel() for x in tensors.values()) and facts["dtypes"] == ["float32"]
    assert facts["norm"] == pytest.approx(torch.cat([x.flatten() for x in tensors.values()]).norm().item(), rel=1e-5)
    assert facts["model"]["dim"] == 96 and facts["topology"]["tensor"] == 1 and facts["not_finite"] == []
    name = "blocks.1.feed_forward.w2.weight"
    assert facts["each"][name]["shape"] == [96, 256]
    assert facts["each"][name]["norm"] == pytest.approx(tensors[name].norm().item())
    official = inspect(tmp_path / "official")
    assert (
        official["format"] == "lumina"
        and official["norm"] == pytest.approx(facts["norm"])
        and "topology" not in official
    )
    json.dumps(facts)


def test_diff(goldens, save_official, imported, golden, tmp_path):
    assert diff(imported, tmp_path / "official")["equal"], "across formats"
    changed = dict(golden.weights)
    changed["layers.1.feed_forward.w1.weight"] = changed["layers.1.feed_forward.w1.weight"] + 0.25
    changed["layers.0.attention.gate"] = changed["layers.0.attention.gate"] * float("nan")
    found = diff(imported, save_official(tmp_path / "changed", changed))
    assert not found["equal"]
    assert found["values"].keys() == {"blocks.1.feed_forward.w1.weight", "blocks.0.attention.gate"}
    assert found["values"]["blocks.1.feed_forward.w1.weight"]["largest"] == pytest.approx(0.25)
    same = diff(save_official(tmp_path / "copy", changed), tmp_path / "changed")
    assert same["equal"], "NaNs in the same places are no difference"
    other = next(g for n, g in goldens.items() if n != golden.name)
    against = diff(imported, save_official(tmp_path / "other", other.weights))
    assert against["only_a"] and against["only_b"] and "model.block" in against["recipe"]
    half = {n: x.bfloat16().float() for n, x in golden.weights.items()}
    lower = {n: x.bfloat16() for n, x in golden.weights.items()}
    found = diff(save_official(tmp_path / "half", half), save_official(tmp_path / "lower", lower))
    assert found["equal"] and found["dtypes"]
