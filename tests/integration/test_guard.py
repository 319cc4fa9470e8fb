"""Steps that go wrong in the middle of real runs, and what the guard makes of them."""

import math
import shutil
from pathlib import Path

import pytest
from run_files import lines, same, tensors

from flagdit.checkpoint import store
from flagdit.data_pipelines.loader import build_loader
from flagdit.train import step as step_module
from flagdit.train.guard import TrainingError
from flagdit.train.loop import train


@pytest.fixture
def spoil(monkeypatch):
    """Multiplies what the model is to predict for one sample, in its epoch, by a factor, at its first so many
    forwards."""

    def spoil(victim, factor: float = math.nan, times: int = 10**9) -> None:
        honest, left = step_module.draw_path, [times]

        def draw(batch, *rest):
            path = honest(batch, *rest)
            for i, segment in enumerate(batch.segments):
                if segment == victim and left[0] > 0:
                    left[0] -= 1
                    path.velocity["image"][batch.layout.patch_segment["image"] == i] *= factor
            return path

        monkeypatch.setattr(step_module, "draw_path", draw)

    return spoil


def victim_of(recipe, step: int):
    """A sample of the batch of that step."""
    return next(build_loader(recipe, step - 1))[-1].segments[0]


def test_a_bad_step_touches_nothing_and_is_written_down(tiny, spoil, capsys):
    recipe = tiny(checkpoint__every=1, train__steps=6, train__accumulation=2)
    bad_step = 3
    victim = victim_of(recipe, bad_step)
    spoil(victim)
    folder = train(recipe)

    before, after, last = (tensors(folder, step) for step in (bad_step - 1, bad_step, 6))
    assert same(before, after) and not same(after, last)
    assert all(t.isfinite().all() for t in last.values())
    (entry,) = lines(folder / "ledger.jsonl")
    assert entry["step"] == bad_step and entry["reason"] == "loss is nan" and entry["suspects"] == [victim.sample_id]
    assert (entry["cause"], entry["decision"], entry["ranks"]) == ("data or weights", "skipped", [0])
    assert {s["key"] for s in entry["samples"]} == {
        s.key for batch in next(build_loader(recipe, bad_step - 1)) for s in batch.segments
    }
    logged = lines(folder / "metrics.jsonl")
    assert logged[bad_step - 1]["loss"] is None and [line["bad_steps"] for line in logged] == [0, 0, 1, 1, 1, 1]
    assert f"step {bad_step} skipped: loss is nan" in capsys.readouterr().out
    assert "loss is nan" in (folder / "report.html").read_text()


def test_an_accident_of_the_machine_changes_no_number(tiny, spoil, capsys):
    recipe = tiny(name="hit", train__accumulation=2)
    honest = train(tiny(name="honest", train__accumulation=2))
    victim = victim_of(recipe, 3)
    spoil(victim, times=1)
    hit = train(recipe)
    assert same(tensors(honest, 6), tensors(hit, 6))
    (entry,) = lines(hit / "ledger.jsonl")
    assert (entry["cause"], entry["decision"]) == ("machine", "applied at the second try")
    assert entry["suspects"] == [victim.sample_id] and entry["loss"] == "nan" and math.isfinite(entry["again"]["loss"])
    assert [line["loss"] for line in lines(hit / "metrics.jsonl")] == [
        line["loss"] for line in lines(honest / "metrics.jsonl")
    ]
    assert "step 3 was good at its second try only; at the first: loss is nan" in capsys.readouterr().out


def test_without_replay_an_accident_costs_the_step(tiny, spoil):
    recipe = tiny(guard__replay=False)
    spoil(victim_of(recipe, 3), times=1)
    (entry,) = lines(train(recipe) / "ledger.jsonl")
    assert (entry["cause"], entry["decision"], entry["again"]) == ("unknown", "skipped", None)


def test_a_spike_is_left_out_before_it_does_harm(tiny, spoil):
    keys = {"train__steps": 16, "guard__window": 8, "checkpoint__every": 1}
    recipe = tiny(guard__spike=20, **keys)
    victim = victim_of(recipe, 10)
    spoil(victim, factor=100.0)
    folder = train(recipe)
    (entry,) = lines(folder / "ledger.jsonl")
    assert entry["step"] == 10 and "deviations above the median" in entry["reason"]
    assert entry["suspects"] == [victim.sample_id] and entry["again"]["loss"] == entry["loss"]
    assert same(tensors(folder, 9), tensors(folder, 10))
    unguarded = train(tiny(name="unguarded", guard__spike=0, **keys))
    assert not (unguarded / "ledger.jsonl").exists() and not same(tensors(unguarded, 9), tensors(unguarded, 10))


def test_a_return_leaves_out_all_batches_since_the_checkpoint(tiny, spoil, capsys):
    recipe = tiny(guard__policy="rollback", checkpoint__every=4, train__steps=9)
    spoil(victim_of(recipe, 7))
    folder = train(recipe)
    told = "step 7: loss is nan; back to the checkpoint of step 4, and the batches since are left out"
    assert told in capsys.readouterr().out
    bad, back = lines(folder / "ledger.jsonl")
    assert bad["step"] == back["step"] == 7 and bad["decision"] == "returns to a checkpoint"
    loader = build_loader(recipe)
    assert back["batches"] == {str(step): loader.ids_of(step - 1) for step in (5, 6, 7)}
    assert sorted(back["batches"]["7"]) == sorted(s["id"] for s in bad["samples"])
    assert [line["step"] for line in lines(folder / "metrics.jsonl")] == list(range(1, 10))

    # The state of step 8 is that of step 4, trained on batch 8 alone.
    optimizer = {step: tensors(folder, step)["optimizer/step"].item() for step in (4, 8, 9)}
    assert optimizer == {4: 4, 8: 5, 9: 6}

    # A kill after the return loses nothing: from checkpoint 4 the same happens again.
    last = tensors(folder, 9)
    for step in (8, 9):
        shutil.rmtree(store.find(folder, step))
    train(recipe)
    assert same(last, tensors(folder, 9)) and len(lines(folder / "ledger.jsonl")) == 2


def test_without_a_checkpoint_to_return_to_the_batch_alone_is_left_out(tiny, spoil, capsys):
    recipe = tiny(guard__policy="rollback", checkpoint__every=4)
    spoil(victim_of(recipe, 2))
    train(recipe)
    assert "step 2: loss is nan; no checkpoint to return to yet" in capsys.readouterr().out


def test_the_policy_to_stop(tiny, spoil):
    recipe = tiny(guard__policy="stop", checkpoint__every=1)
    spoil(victim_of(recipe, 3))
    with pytest.raises(TrainingError, match=r"step 3 is bad: loss is nan"):
        train(recipe)
    folder = Path(recipe.run_dir) / "tiny"
    assert [step for step, _ in store.complete(folder)] == [1, 2]
    assert lines(folder / "ledger.jsonl")[0]["decision"] == "stopped"


def test_too_many_bad_steps_stop_the_run_and_save_nothing(tiny):
    recipe = tiny(guard__max_grad_norm=1e-9, guard__max_consecutive=3, checkpoint__every=4)
    with pytest.raises(TrainingError, match=r"3 bad steps in a row up to step 3.*guard\.max_grad_norm=1e-09"):
        train(recipe)
    folder = Path(recipe.run_dir) / "tiny"
    assert store.complete(folder) == [] and len(lines(folder / "ledger.jsonl")) == 3
    # The guard may be set otherwise; the same run then goes on.
    train(tiny(guard__max_grad_norm=0))
    assert len(tensors(folder, 6)) and lines(folder / "ledger.jsonl") == []
