"""`flagdit launch local` with real training behind it."""

import subprocess
import sys

from flagdit.config.load import save_recipe


def test_one_rank_trains_and_its_mistakes_are_told_once(tiny, tmp_path):
    save_recipe(tiny(), tmp_path / "tiny.yaml")
    launch = [sys.executable, "-m", "flagdit.cli", "launch", "local", str(tmp_path / "tiny.yaml"), "--ranks", "1"]
    done = subprocess.run(launch, capture_output=True, text=True)
    assert done.returncode == 0 and "step 6/6" in done.stdout and done.stderr == "", done.stderr
    assert (tmp_path / "runs/tiny/logs/rank_0.log").exists()
    refused = subprocess.run([*launch, "optimizer.lr=1"], capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.count("another run is in this folder") == 1
    assert "Traceback" not in refused.stderr
