"""Runs from beginning to end, on real files."""

import json
from pathlib import Path

from flagdit.train.loop import train


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_leaves_everything_in_its_folder(tiny, capsys):
    recipe = tiny(validation__every=3, sample__every=3, sample__prompts="[one,two,three]")
    folder = train(recipe)
    out = capsys.readouterr().out
    print(out)
    print(sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()))
    print(*lines(folder / "metrics.jsonl"), sep="\n")
