"""Bad numbers on one rank of four: no rank applies the step, and the ledger names the samples."""

import json
import os
import subprocess
import sys
from pathlib import Path

import guard_on_ranks
import pytest

ROOT = Path(__file__).parents[2]
RANKS = 4


@pytest.fixture(scope="module")
def found(emoji, tmp_path_factory) -> tuple[list[dict], Path]:
    """What every rank saw of all meshes and cases."""
    out = tmp_path_factory.mktemp("guarded")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    done = subprocess.run(
        [*command, str(ROOT / "tests/helpers/guard_on_ranks.py"), str(emoji), str(out)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(RANKS)], out


@pytest.mark.slow
@pytest.mark.parametrize("mesh", guard_on_ranks.MESHES)
def test_no_rank_applies_a_step_that_is_bad_on_one(found, mesh):
    ranks, out = found
    for case in ("sample", "gradient", "judgement"):
        assert [rank[mesh][case][0] for rank in ranks] == [True] * RANKS, case
        (entry,) = [json.loads(line) for line in (out / f"{mesh}_{case}" / "ledger.jsonl").read_text().splitlines()]
        assert entry["step"] == 2 and entry["decision"] == "skipped" and entry["cause"] == "data or weights"
        assert len({sample["id"] for sample in entry["samples"]}) == 16 and all(s["key"] for s in entry["samples"])
        if case == "sample":
            assert entry["reason"] == "loss is nan" and len(entry["suspects"]) == 1 and len(entry["ranks"]) == 1
        else:
            reason = {"gradient": "gradient norm is inf", "judgement": "seen here only"}[case]
            assert entry["reason"] == reason and entry["ranks"] == []


@pytest.mark.slow
@pytest.mark.parametrize("mesh", guard_on_ranks.MESHES)
def test_an_accident_on_one_rank_changes_no_number_on_any(found, mesh):
    ranks, out = found
    assert [rank[mesh]["accident"] for rank in ranks] == [[False, True]] * RANKS
    (entry,) = [json.loads(line) for line in (out / f"{mesh}_accident" / "ledger.jsonl").read_text().splitlines()]
    assert entry["cause"] == "machine" and len(entry["suspects"]) == 1
