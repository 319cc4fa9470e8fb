"""The wheel: one top-level package, with everything that the areas linked into it hold."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_wheel_installs_flagdit_and_nothing_else(tmp_path):
    source = tmp_path / "source"
    leave_out = shutil.ignore_patterns(
        ".*", "runs", "data", "build", "*.egg-info", "__pycache__", "tests", "benchmarks"
    )
    shutil.copytree(ROOT, source, symlinks=True, ignore=leave_out)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        tmp_path,
        source,
    ]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    top = {name.split("/")[0] for name in names}
    assert top == {"flagdit", next(t for t in top if t.endswith(".dist-info"))}
    for area in ("kernels", "data_pipelines", "recipes"):
        ours = [p for p in (ROOT / area).rglob("*") if p.suffix in (".py", ".yaml")]
        assert ours
        for path in ours:
            assert f"flagdit/{path.relative_to(ROOT).as_posix()}" in names
    # From another folder, so that the wheel's files are used and not the checkout's.
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from flagdit.cli import main; sys.argv[1:] = sys.argv[2:]; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "site", "recipe", "show", "quickstart"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "name: quickstart" in done.stdout
