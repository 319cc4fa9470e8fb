"""When hooks act."""

from types import SimpleNamespace

from flagdit.train.hooks import SaveCheckpoint, due


def test_due():
    assert [step for step in range(1, 10) if due(step, 3)] == [3, 6, 9]
    assert not any(due(step, 0) for step in range(10))


def test_a_step_is_saved_once():
    saved = []

    def save(final):
        saved.append((run.step, final))
        run.saver.saved = run.step

    recipe = SimpleNamespace(checkpoint=SimpleNamespace(every=2), train=SimpleNamespace(steps=5))
    saver = SimpleNamespace(saved=0, poll=lambda: None, wait=lambda: None)
    run = SimpleNamespace(step=0, recipe=recipe, save=save, saver=saver)
    hook = SaveCheckpoint()
    hook.save(run)  # a signal before the first step: nothing new
    for run.step in range(1, 6):
        hook.after_step(run, SimpleNamespace(step=run.step))
    hook.save(run)
    assert saved == [(2, False), (4, False), (5, True)]
