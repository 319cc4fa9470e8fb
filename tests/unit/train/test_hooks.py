"""When hooks act."""

from types import SimpleNamespace

from flagdit.train.hooks import SaveCheckpoint, due


def test_due():
    assert [step for step in range(1, 10) if due(step, 3)] == [3, 6, 9]
    assert not any(due(step, 0) for step in range(10))


def test_a_step_is_saved_once():
    saved = []
    recipe = SimpleNamespace(checkpoint=SimpleNamespace(every=2), train=SimpleNamespace(steps=5))
    run = SimpleNamespace(step=0, recipe=recipe, save=lambda: saved.append(run.step))
    run.display = SimpleNamespace(note=lambda text: None)
    hook = SaveCheckpoint(run)
    hook.save(run)  # a signal before the first step: nothing new
    for run.step in range(1, 6):
        hook.after_step(run, SimpleNamespace(step=run.step))
    hook.save(run)
    assert saved == [2, 4, 5]
