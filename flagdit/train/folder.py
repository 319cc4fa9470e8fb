"""The run folder: what is in it, who may write to it, and whether a recipe may continue it.

runs/NAME/
    recipe.yaml         the resolved recipe
    metrics.jsonl       one JSON object a line: training lines and validation lines, by step
    ledger.jsonl        one JSON object per bad step, with its samples and what was decided
    environment.jsonl   one JSON object per start: versions, hardware, command line
    checkpoints/        step_00001000/ …
    samples/            step_00001000.png … picture grids
    wandb/              offline files for `wandb sync`; parts/ holds what `flagdit wandb` has merged
    logs/               what each rank wrote, where `flagdit launch` started it
    slurm/              what `flagdit launch slurm` submitted, and what became of it
    report.html         the page about the run
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from flagdit.config.keys import flatten
from flagdit.config.load import diff, load_recipe, to_yaml
from flagdit.config.schema import Recipe
from flagdit.errors import CheckpointError, RecipeError

BEFORE_THE_RUN = (".lock", "logs", "slurm", "recipe.yaml.tmp")
"""What a folder may hold before it is a run; the last is left where a kill meets the very first write."""

LOCK_PATIENCE = 2.0
"""Seconds to wait for a folder that another process holds."""

FREE_KEYS = (
    "name",
    "run_dir",
    "model.attention",
    "model.kernels",
    "model.checkpointing",
    "model.checkpoint_every",
    "codec.path",
    "text.path",
    "audio.path",
    "audio.griffin_lim",
    "data.path",
    "data.sets",
    "data.cache",
    "data.cache_gib",
    "data.workers",
    "data.prefetch",
    "data.max_bad_samples",
    "train.init_from",
    "train.steps",
    "train.accumulation",
    "train.device",
    "train.compile",
    "train.deterministic",
    "train.log_every",
    "guard.",
    "limits.",
    "parallel.",
    "validation.",
    "sample.",
    "checkpoint.",
    "log.",
    "cluster.",
)
"""Keys that may change when a run is continued: they decide how long and where it trains, and what is watched and kept.
A name with a dot at its end stands for the whole block. Folders may move: what is in them is compared instead, the data
set's content with the checkpoint's and the encoders' fingerprints with the data set's."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def environment(self) -> Path:
        return self.path / "environment.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def wandb(self) -> Path:
        return self.path / "wandb"

    @property
    def wandb_id(self) -> Path:
        """What the run is called there; also in every checkpoint."""
        return self.wandb / "run_id"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def sample_grid(self, step: int) -> Path:
        return self.samples / f"step_{step:08d}.png"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder, and keeps every other training process out of it.

        Raises:
            CheckpointError: the folder cannot be written, or another process trains in it.
        """
        with contextlib.ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context((self.path / ".lock").open("w"))
            except OSError as error:
                raise CheckpointError(
                    f"the run folder cannot be written: {error.strerror}",
                    where=str(self.path),
                    fix="Choose another folder with run_dir=… or name=….",
                ) from error
            # What a killed start has left behind, such as a child that was being born, may take a moment to die.
            end = time.monotonic() + LOCK_PATIENCE
            while not _lock(file):
                if time.monotonic() > end:
                    raise CheckpointError(
                        "another process is training in this run folder",
                        where=str(self.path),
                        fix="Wait for it, stop it, or choose another folder with name=….",
                    )
                time.sleep(0.05)
            yield

    def check(self, recipe: Recipe) -> None:
        """Whether this recipe may continue what is in the folder. Reads only.

        Raises:
            RecipeError: keys differ that make it another run; all of them are listed.
            CheckpointError: the folder holds something that is not a run.
        """
        if self.recipe.exists():
            changed = [change for change in diff(load_recipe(self.recipe), recipe) if not free(change[0])]
            if changed:
                listed = "; ".join(f"{key} is {theirs} in the run and {ours} now" for key, theirs, ours in changed)
                raise RecipeError(
                    f"another run is in this folder: {listed}",
                    where=str(self.path),
                    fix="Set these keys back to continue it, give the new run another name with name=…, or remove the "
                    "folder to start afresh.",
                )
        elif found := sorted(p.name for p in self.path.iterdir() if p.name not in BEFORE_THE_RUN):
            raise CheckpointError(
                f"the folder holds files but no recipe.yaml, so it is not a run ({', '.join(found[:3])})",
                where=str(self.path),
                fix="Choose another folder with name=… or run_dir=….",
            )

    def write_recipe(self, recipe: Recipe) -> None:
        """Saves the resolved recipe; a kill leaves the old file or the new one."""
        write_atomically(self.recipe, to_yaml(recipe))

    def rewind(self, step: int) -> None:
        """Drops what was logged past `step`, so that a continued run has every step once."""
        for file in (self.metrics, self.ledger):
            if file.exists():
                write_lines(file, [line for line in read_lines(file) if line["step"] <= step])
        for file in self.samples.glob("step_*"):
            if file.suffix == ".tmp" or int(file.stem.removeprefix("step_")) > step:
                file.unlink()


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def free(key: str) -> bool:
    """Whether a key may change when a run is continued."""
    return any(key == free or (free.endswith(".") and key.startswith(free)) for free in FREE_KEYS)


def recipe_hash(recipe: Recipe) -> str:
    """Names a run by the keys that may not change."""
    fixed = {key: value for key, value in flatten(recipe).items() if not free(key)}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The JSON objects of a log, one per line; a last line that a kill cut short is left out.

    Raises:
        CheckpointError: a line before the last is damaged.
    """
    lines = file.read_text().splitlines()
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise CheckpointError(
                    f"line {number} is damaged: {error.msg}", where=str(file), fix="Remove the line to read the rest."
                ) from error
    return found


def write_lines(file: Path, lines: list[dict[str, Any]]) -> None:
    """Replaces a log."""
    write_atomically(file, "".join(json.dumps(line) + "\n" for line in lines))


def append_line(file: Path, line: dict[str, Any]) -> None:
    """Adds one JSON object to a log.

    Raises:
        CheckpointError: the disk is full or refuses.
    """
    with writing(file), file.open("a") as f:
        f.write(json.dumps(line) + "\n")


def write_atomically(file: Path, text: str) -> None:
    """Replaces a file: a crash or a full disk leaves the old content or the new one.

    Raises:
        CheckpointError: the disk is full or refuses.
    """
    staged = file.with_name(file.name + ".tmp")
    with writing(file):
        try:
            with staged.open("w") as f:
                f.write(text)
                f.flush()
                os.fsync(f.fileno())
            os.replace(staged, file)
        finally:
            staged.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(file: Path) -> Iterator[None]:
    """Turns a failed write into an error that a person can act on.

    Raises:
        CheckpointError: the disk is full or refuses.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot be written: {error.strerror or error}",
            where=str(file),
            fix="Make room on the disk, or the folder writable, and start the same command again.",
        ) from error
