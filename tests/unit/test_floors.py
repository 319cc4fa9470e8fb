"""The house rules that a reviewer would otherwise have to watch: floors, cycles, doors and file sizes."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
AREAS = ["kernels", "launch", "recipes", "data_pipelines"]

FLOORS = {
    "errors": 0,
    "batch": 0,
    "kernels": 0,
    "config": 1,
    "model": 2,
    "flow": 2,
    "codecs": 2,
    "parallel": 2,
    "data_pipelines": 3,
    "checkpoint": 3,
    "plan": 3,
    "generate": 4,
    "train": 5,
    "launch": 6,
    "cli": 7,
}
LAUNCH_MAY_USE = {"launch", "config", "errors"}
DATA_MAY_USE = {"flagdit.model.tokens", "flagdit.model.modality"}
PARALLEL_DOORS = {"megatron": {"parallel"}, "deepspeed": {"parallel"}}


def sources() -> dict[str, Path]:
    """Module name → file, for the package and the four areas that are linked into it."""
    files = [p for p in (ROOT / "flagdit").rglob("*.py") if not any(parent.is_symlink() for parent in p.parents)]
    found = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in files}
    for area in AREAS:
        for path in (ROOT / area).rglob("*.py"):
            found["flagdit." + ".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
    return {name.removesuffix(".__init__"): path for name, path in found.items()}


SOURCES = sources()


def imports_of(path: Path) -> set[str]:
    """Absolute names that a file imports, at the top or inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write it in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


def modules_of(path: Path) -> set[str]:
    """The project's modules that a file imports."""
    return {name for name in imports_of(path) if name in SOURCES and name != "flagdit"}


def area_of(module: str) -> str:
    return module.split(".")[1]


def test_four_areas_are_linked_into_the_package():
    for area in AREAS:
        assert (ROOT / area).is_dir() and not (ROOT / area).is_symlink()
        assert (ROOT / "flagdit" / area).resolve() == ROOT / area
        assert not list((ROOT / area).rglob("__init__.py")), f"{area}/ is a namespace package: no __init__.py"


@pytest.mark.parametrize("module", sorted(set(SOURCES) - {"flagdit"}))
def test_imports_run_downward(module: str):
    area = area_of(module)
    assert area in FLOORS, f"{module}: give its area a floor here and in ARCHITECTURE.md"
    for used in modules_of(SOURCES[module]):
        other = area_of(used)
        if other == area:
            continue
        assert FLOORS[other] < FLOORS[area], f"{module} (floor {FLOORS[area]}) imports {used} (floor {FLOORS[other]})"
        if area == "launch":
            assert other in LAUNCH_MAY_USE, f"{module} imports {used}: launch sees config and errors only"
        if area == "data_pipelines" and other in ("model", "flow"):
            assert used in DATA_MAY_USE, f"{module} imports {used}: of the model, data may use {sorted(DATA_MAY_USE)}"


@pytest.mark.parametrize("module", sorted(set(SOURCES) - {"flagdit"}))
def test_only_the_doors_import_parallel_libraries(module: str):
    for name in imports_of(SOURCES[module]):
        doors = PARALLEL_DOORS.get(name.split(".")[0])
        assert doors is None or area_of(module) in doors, f"{module} imports {name}; only {sorted(doors)} may"


def test_no_import_cycles():
    graph = {module: modules_of(path) - {module} for module, path in SOURCES.items()}  # a package names its parts
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, "import cycle: " + " → ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for used in graph[module]:
                visit(used, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_files_stay_readable(module: str):
    lines = SOURCES[module].read_text().count("\n")
    assert lines <= 400, f"{SOURCES[module].relative_to(ROOT)} has {lines} lines; split it by subject"


def test_project_names_no_registry_or_machine():
    # Spelled in pieces, so that this file does not find itself.
    forbidden = ["pypi" + ".org", "files.python" + "hosted", "/work/" + "main", "/work/" + "shared", "/tmp/" + "w/"]
    for path in ROOT.rglob("*"):
        parts = set(path.relative_to(ROOT).parts)
        if parts & {
            ".git",
            ".venv",
            "runs",
            "data",
            "build",
            ".mypy_cache",
            ".pytest_cache",
            ".ruff_cache",
            ".hypothesis",
        }:
            continue
        if path.suffix in {".py", ".md", ".toml", ".txt", ".yaml", ".sh", ".json", ".j2", ""} and path.is_file():
            text = path.read_text(errors="ignore")
            assert not [word for word in forbidden if word in text], path
