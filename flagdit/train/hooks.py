"""What happens around the steps: logs, validation, sample grids, checkpoints."""

from __future__ import annotations

import time
from typing import Protocol, runtime_checkable

from flagdit.train.folder import read_lines
from flagdit.train.metrics import StepResult
from flagdit.train.run import Run
from flagdit.train.samples import SampleGrids
from flagdit.train.validation import HeldOut


class Hook(Protocol):
    """Called after every step, good or bad, in the order of the list that `hooks_of` makes."""

    def after_step(self, run: Run, result: StepResult) -> None: ...


@runtime_checkable
class PatientHook(Hook, Protocol):
    """One that changes nothing of the run and takes its time: where the run is asked to stop, it is not called, and the
    next start makes up for it."""

    def make_up(self, run: Run) -> None:
        """Does what was due at `run.step`, from which the run continues, unless it is done."""
        ...


class LogMetrics:
    """Measures every step; writes and shows a line every `train.log_every` steps and at the last one."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def after_step(self, run: Run, result: StepResult) -> None:
        now = time.perf_counter()
        run.meter.add(result, now - self._since)
        self._since = now
        run.display.advance(result.step)
        if result.bad is not None:
            run.display.note(f"step {result.step} skipped: {result.bad}; samples in {run.folder.ledger}")
        if result.accident is not None:
            run.display.note(f"step {result.step} was good at its second try only; at the first: {result.accident}")
        if due(result.step, run.recipe.train.log_every) or result.step == run.recipe.train.steps:
            line = run.meter.line(result, run.guard.bad_steps)
            line |= run.saver.figures()
            run.log(line)
            run.display.metrics(line)


class Validate:
    """Held-out loss every `validation.every` steps and at the last one, from the first average."""

    def __init__(self, run: Run):
        self._held_out = HeldOut(run)

    def after_step(self, run: Run, result: StepResult) -> None:
        if due(result.step, run.recipe.validation.every) or result.step == run.recipe.train.steps:
            self._measure(run)

    def make_up(self, run: Run) -> None:
        lines = read_lines(run.folder.metrics) if run.folder.metrics.exists() else []
        done = any(line["step"] == run.step and "val_loss" in line for line in lines)
        if due(run.step, run.recipe.validation.every) and not run.engine.mesh.from_first(done):
            self._measure(run)

    def _measure(self, run: Run) -> None:
        line = self._held_out.measure(run)
        run.log(line)
        run.validated = (run.step, line["val_loss"])
        run.display.note(f"step {run.step}  held-out loss {line['val_loss']:.4f} ({line['val_weights']})")


class Sample:
    """A picture grid every `sample.every` steps and at the last one."""

    def __init__(self, run: Run):
        self._grids = SampleGrids(run)

    def after_step(self, run: Run, result: StepResult) -> None:
        if due(result.step, run.recipe.sample.every) or result.step == run.recipe.train.steps:
            self._draw(run)

    def make_up(self, run: Run) -> None:
        done = run.engine.mesh.from_first(run.folder.sample_grid(run.step).exists())
        if due(run.step, run.recipe.sample.every) and not done:
            self._draw(run)

    def _draw(self, run: Run) -> None:
        file = self._grids.draw(run)
        run.display.note(f"step {run.step}  samples in {file}")
        if run.wandb:
            run.wandb.picture(file, run.step, caption=" · ".join(run.recipe.sample.prompts))


class SaveCheckpoint:
    """A checkpoint every `checkpoint.every` steps and at the last one. Comes last, to hold what others did."""

    def after_step(self, run: Run, result: StepResult) -> None:
        run.saver.poll()
        if result.step == run.recipe.train.steps:
            self.save(run)
        elif due(result.step, run.recipe.checkpoint.every):
            run.save(final=False)

    def save(self, run: Run) -> None:
        """Saves this step for good, unless it is saved already."""
        run.saver.wait()
        if run.step != run.saver.saved:
            run.save(final=True)


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens now; 0: never."""
    return every > 0 and step > 0 and step % every == 0
