"""Logs, free keys and rewinding."""

import json
import resource

import pytest

from flagdit.config.keys import all_keys
from flagdit.config.schema import Recipe
from flagdit.errors import CheckpointError
from flagdit.train.folder import FREE_KEYS, RunFolder, append_line, free, read_lines, recipe_hash, write_atomically


def test_free_keys_exist_and_the_rest_makes_the_run():
    for name in FREE_KEYS:
        assert any(key == name or (name.endswith(".") and key.startswith(name)) for key in all_keys()), name
    assert free("train.steps") and free("guard.max_grad_norm") and free("log.wandb_project")
    fixed = [
        "seed",
        "model.dim",
        "flow.shift",
        "data.batch_size",
        "optimizer.lr",
        "train.precision",
        "train.ema_decays",
    ]
    assert not any(free(key) for key in fixed)


def test_recipe_hash_follows_the_keys_that_make_the_run():
    from dataclasses import replace

    recipe = Recipe()
    assert recipe_hash(replace(recipe, name="other", train=replace(recipe.train, steps=7))) == recipe_hash(recipe)
    assert recipe_hash(replace(recipe, seed=1)) != recipe_hash(recipe)


def test_a_line_cut_short_is_left_out_and_a_damaged_one_is_named(tmp_path):
    file = tmp_path / "log.jsonl"
    append_line(file, {"step": 1})
    append_line(file, {"step": 2})
    with file.open("a") as f:
        f.write('{"step": 3, "lo')
    assert read_lines(file) == [{"step": 1}, {"step": 2}]
    file.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(CheckpointError, match="line 2 is damaged"):
        read_lines(file)


def test_rewinding_drops_what_lies_past_the_step(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (2, 4, 6):
        append_line(folder.metrics, {"step": step})
        append_line(folder.ledger, {"step": step})
        folder.samples.mkdir(exist_ok=True)
        folder.sample_grid(step).write_bytes(b"")
        folder.sample_grid(step).with_suffix(".json").write_text("{}")
    with folder.metrics.open("a") as f:
        f.write('{"step"')
    (folder.samples / "step_00000002.tmp").write_text("")
    folder.rewind(4)
    for log in (folder.metrics, folder.ledger):
        assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [2, 4]
    kept = sorted(p.name for p in folder.samples.iterdir())
    assert kept == [f"step_0000000{n}.{kind}" for n in (2, 4) for kind in ("json", "png")]
    folder.rewind(0)
    assert folder.metrics.read_text() == "" and list(folder.samples.iterdir()) == []
    assert not list(tmp_path.glob("*.tmp"))


def test_what_a_kill_leaves_of_the_very_first_write_is_no_stranger(tmp_path):
    (tmp_path / "recipe.yaml.tmp").write_text("half a rec")
    RunFolder(tmp_path).check(Recipe())
    (tmp_path / "thesis.txt.tmp").write_text("chapter 1")
    with pytest.raises(CheckpointError, match=r"it is not a run \(thesis\.txt\.tmp\)"):
        RunFolder(tmp_path).check(Recipe())


def test_atomic_writing_replaces_the_whole_file(tmp_path):
    file = tmp_path / "x"
    write_atomically(file, "long content")
    write_atomically(file, "short")
    assert file.read_text() == "short" and list(tmp_path.iterdir()) == [file]


def test_a_full_disk_is_told_and_keeps_the_old_file(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    file = tmp_path / "x"
    write_atomically(file, "old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, hard))
    try:
        with pytest.raises(CheckpointError, match=r"x: cannot be written: File too large\. Make room"):
            write_atomically(file, "much longer than the old one")
        with pytest.raises(CheckpointError, match="cannot be written"):
            append_line(tmp_path / "log", {"a": "much longer than five"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_text() == "old" and not list(tmp_path.glob("*.tmp"))
