"""Checkpoints side by side: the same prompts and noise, figures of that step only, one file."""

import json
import re

import pytest

from flagdit.errors import CheckpointError, RecipeError
from flagdit.generate.comparison import parse_run, write_comparison


def test_checkpoints_are_shown_beside_each_other(recipe, save_run, tmp_path):
    run = save_run(recipe)
    about = {"step": 10, "figures": {"retrieval_top1": 0.75}}
    (run / "evaluation.json").write_text(json.dumps(about))
    page = write_comparison([f"{run}@5", run], tmp_path / "new/page.html", prompts=["a <dog>"]).read_text()
    assert f"{run.name} @ 5" in page and f"{run.name} @ 10" in page and "a &lt;dog&gt;" in page
    pictures = re.findall(r'src="(data:image/png;base64,[^"]+)"', page)
    assert len(pictures) == len(set(pictures)) == 2, "checkpoints differ"
    assert re.findall(r'<td class="number">(.*?)</td>', page) == ["", "0.75"], "figures belong to their step"
    assert not re.search(r'(src|href)="(?!data:)', page), "one file"
    assert write_comparison([run], tmp_path / "b.html").read_text().count("<img") == len(recipe.sample.prompts)


def test_runs_with_steps():
    assert [str(x) for x in parse_run("runs/a@750")] == ["runs/a", "750"]
    assert parse_run("runs/a@b")[1] is None and str(parse_run("runs/a@b")[0]) == "runs/a@b"


def test_what_cannot_be_compared_is_told(recipe, save_run, tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        write_comparison([tmp_path / "nowhere"], tmp_path / "x.html", prompts=["a"])
    run = save_run(recipe)
    with pytest.raises(CheckpointError, match="steps 5, 10"):
        write_comparison([f"{run}@7"], tmp_path / "x.html", prompts=["a"])
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="cannot be written"):
        write_comparison([run], tmp_path / "file/x.html", prompts=["a"])
