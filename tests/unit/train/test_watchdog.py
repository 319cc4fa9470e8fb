"""A hang names the rank that causes it; in processes of their own, without any collective."""

import subprocess
import sys
import threading
import time

from torch import nn

from flagdit.train.watchdog import HANGING, Place, Watchdog, stuck, told

RANK = """
import sys, time
from pathlib import Path
from flagdit.train import watchdog
watchdog.EXCHANGE = 3.0
rank, folder, mode = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
sys.path.insert(0, str(folder))

def training_code():
    time.sleep(60)

with watchdog.Watchdog(folder / "hang", rank, 2, 100.0 if mode == "moves" else 1.0) as dog:
    dog.beat(6, "data")
    dog.beat(7, "data")
    dog.beat(7, "step")
    if mode == "waits":
        from torch_stand_in.torch.distributed import collective
        collective.wait()
    elif mode == "works":
        training_code()
    elif mode == "moves":
        class Model:
            def register_forward_pre_hook(self, hook):
                self.forward = hook
        model = Model()
        with watchdog.Watchdog(folder / "hang", rank, 2, 1.0, model) as dog:
            while True:
                model.forward(model, ())
                time.sleep(0.1)
    elif mode == "dies":
        import os
        os.kill(os.getpid(), 19)  # SIGSTOP: a frozen process
"""


def ranks_of(tmp_path, *modes, environment=None):
    package = tmp_path / "torch_stand_in" / "torch" / "distributed"
    package.mkdir(parents=True)
    (package / "collective.py").write_text("import time\ndef wait():\n    time.sleep(60)\n")
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path), mode],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank, mode in enumerate(modes)
    ]


def run_ranks(tmp_path, *modes, environment=None):
    said = []
    ranks = ranks_of(tmp_path, *modes, environment=environment)
    for process, mode in zip(ranks, modes, strict=True):
        if mode == "dies":
            continue
        said.append(process.communicate(timeout=60)[1])
        assert process.returncode == HANGING
    for process in ranks:
        process.kill()
        process.wait()
    return said


def test_the_rank_that_does_not_come_is_named_and_all_stacks_are_shown(tmp_path):
    for text in run_ranks(tmp_path, "waits", "works"):
        assert "error: the run hangs: rank 1 on" in text and "step 7, step" in text
    assert "in wait" not in text and "in training_code" in text


def test_a_frozen_rank_is_named_by_the_others(tmp_path):
    (text,) = run_ranks(tmp_path, "waits", "dies")
    assert "rank 1 on" in text and "says nothing" in text and "in wait" in text


def test_under_slurm_the_host_is_left_for_the_jobs_script(tmp_path):
    import os
    import socket

    (tmp_path / "slurm").mkdir()
    run_ranks(tmp_path, "works", "waits", environment={**os.environ, "SLURM_JOB_ID": "1"})
    assert (tmp_path / "slurm" / "suspect").read_text() == f"{socket.gethostname()}\n"


def test_the_one_that_is_furthest_behind_is_it():
    def at(rank, step, phase, waiting):
        return Place(rank, f"node{rank}", step, phase, waiting, "loop.py:1")

    ahead = [at(0, 8, "step", True), at(2, 8, "step", True)]
    assert stuck([*ahead, at(1, 8, "data", False)], []).rank == 1
    assert stuck([*ahead, at(1, 7, "hooks", True)], []).rank == 1
    assert stuck([*ahead, at(1, 8, "step", True)], []) is None
    assert "no rank stands out" in told(None, ahead)


def test_whoever_is_asked_tells_where_it_is_though_it_has_moved_itself(tmp_path):
    """Its model runs, so that its own watchdog sees no hang."""
    waiting, moving = ranks_of(tmp_path, "waits", "moves")
    said = waiting.communicate(timeout=60)[1]
    assert waiting.returncode == HANGING and moving.poll() is None
    moving.kill()
    moving.wait()
    assert "rank 1 on" in said and "<string>" in said and "says nothing" not in said


LONG = """
import sys, time
from pathlib import Path
from flagdit.train import watchdog

watchdog.EXCHANGE = 0.1
native = time.sleep  # one call outside Python, as of a compiler or of a write

with watchdog.Watchdog(Path(sys.argv[1]), 0, 2, 0.6) as dog:
    dog.beat(0, "data")
    dog.beat(0, "step")
    native(1.4)
    dog.beat(1, "data")
    dog.beat(1, "hooks")
    end = time.monotonic() + 1.4
    while time.monotonic() < end:
        MANY_LINES
    dog.beat(1, "save")
    native(1.4)
    dog.beat(1, "data")
    dog.beat(1, "step")
    if sys.argv[2] == "stuck":
        native(60)
""".replace("MANY_LINES", "\n        ".join(["time.sleep(0.01)"] * 50))


def test_what_takes_long_is_not_ended_and_what_is_stuck_is(tmp_path):
    """A first step and a save of one native call each, a hook of many Python lines; then a step that does not end."""
    for mode, code in (("sound", 0), ("stuck", HANGING)):
        done = subprocess.run([sys.executable, "-c", LONG, str(tmp_path), mode], capture_output=True, text=True)
        assert done.returncode == code, done.stderr


def test_the_hook_on_the_model_goes_with_the_watchdog(tmp_path):
    model = nn.Identity()
    with Watchdog(tmp_path, 0, 2, 60.0, model):
        assert len(model._forward_pre_hooks) == 1
    assert not model._forward_pre_hooks


def test_a_run_that_moves_is_left_alone(tmp_path):
    before = threading.active_count()
    with Watchdog(tmp_path, 0, 2, 0.6) as dog:
        for step in range(6):
            dog.beat(step, "step")
            time.sleep(0.2)
    with Watchdog(tmp_path, 0, 2, 0):
        assert threading.active_count() <= before + 1
    time.sleep(1.2)  # its thread has ended: nobody was killed
