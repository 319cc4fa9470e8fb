"""Recipes: read a YAML file with its bases, apply overrides, check everything, write the resolved recipe.

A value's text is read as its key's type says (OmegaConf does the conversion), so `name: 007` stays "007" and `lr: 1e-4`
is a number. All problems that can be found are reported at once, each with its file and line.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from flagdit.config.keys import all_blocks, all_keys, flatten, nearest
from flagdit.config.schema import Recipe
from flagdit.config.validate import Problem, problems_of, raise_problems
from flagdit.errors import RecipeError

SHIPPED = Path(__file__).parents[1] / "recipes"
SUFFIXES = (".yaml", ".yml")
COMMENT_COLUMN = 34
COMMAND_LINE = "command line"


@dataclass(frozen=True)
class _Given:
    """A value as somebody wrote it: texts, lists and mappings of texts, or None for null."""

    value: Any
    where: str


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = (), profiles: Sequence[str] = ()) -> Recipe:
    """A recipe from its bases, its file, profiles and overrides, in this order, later ones winning.

    `base:` in a file names one recipe or a list of them: a path ending in .yaml, relative to the file, or the name of a
    shipped recipe. Lists and mappings are replaced as a whole, not merged.

    Args:
        path_or_name: a file ending in .yaml, or the name of a shipped recipe such as `quickstart`.
        overrides: `model.dim=256`; lists in brackets, `null` for none.
        profiles: more files or names, read after the recipe, such as `clusters/h100_ib`.

    Raises:
        RecipeError: lists all that is wrong: files, syntax, unknown keys, types, ranges, combinations.
    """
    file = find_recipe(str(path_or_name))
    given: dict[str, _Given] = {}
    problems: list[Problem] = []
    for source in (file, *(find_recipe(profile) for profile in profiles)):
        for path, root in _files(source, ()):
            _collect(root, "", path, given, problems)
    for override in overrides:
        _collect_override(override, given, problems)
    recipe, wrong = _convert(given)
    problems += wrong
    # Rules that read a key with a problem would complain about its default instead: they wait.
    unsure = {key for problem in problems for key in problem.keys}
    for problem in problems_of(recipe):
        if not unsure.intersection(problem.keys):
            sources = [given[key].where for key in problem.keys if key in given]
            problems.append(Problem(problem.keys, problem.text, sources[0] if sources else ""))
    raise_problems(problems, str(path_or_name))
    return recipe


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Writes the resolved recipe as YAML, with the meaning of every key; `load_recipe` gives the same recipe back."""
    Path(path).write_text(to_yaml(recipe), encoding="utf-8")


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML, with the meaning of every key."""
    lines: list[str] = []
    values, blocks = flatten(recipe), all_blocks()
    open_block = ""
    for key in all_keys().values():
        block, _, leaf = key.name.rpartition(".")
        if block != open_block:
            lines += ["", f"# {blocks[block]}", f"{block}:"]
            open_block = block
        indent = "  " if block else ""
        value = values[key.name]
        if isinstance(value, list) and value and key.type == list[str]:
            lines += [f"{indent}{leaf}:".ljust(COMMENT_COLUMN) + f"  # {key.doc}"]
            lines += [f"{indent}  - {_text(entry)}" for entry in value]
        else:
            lines += [f"{indent}{leaf}: {_text(value)}".ljust(COMMENT_COLUMN) + f"  # {key.doc}"]
    return "\n".join(lines) + "\n"


def diff(a: Recipe, b: Recipe) -> list[tuple[str, Any, Any]]:
    """Keys in which two recipes differ, with both values."""
    ours, theirs = flatten(a), flatten(b)
    return [(key, ours[key], theirs[key]) for key in ours if ours[key] != theirs[key]]


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(p.relative_to(SHIPPED).with_suffix("").as_posix() for p in SHIPPED.rglob("*.yaml"))


def find_recipe(name: str, beside: Path | None = None) -> Path:
    """The file of a recipe: a path ending in .yaml (relative to the folder `beside`), or a shipped recipe's name.

    Raises:
        RecipeError: there is no such file or name.
    """
    if name.endswith(SUFFIXES):
        path = Path(name).expanduser()
        path = beside / path if beside else path
        if path.is_file():
            return path
        alike = nearest(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else None
        fix = f"Did you mean {path.with_name(alike)}?" if alike else "Give the path of a recipe file."
        raise RecipeError(f"there is no recipe file {path}", fix=fix)
    shipped = SHIPPED / f"{name}.yaml"
    if name and shipped.is_file() and shipped.resolve().is_relative_to(SHIPPED.resolve()):
        return shipped
    alike = nearest(name, shipped_recipes())
    fix = f"Did you mean {alike}? " if alike else f"Shipped recipes: {', '.join(shipped_recipes())}. "
    raise RecipeError(f"there is no shipped recipe {name!r}", fix=fix + "A file of yours is given with its .yaml.")


def _files(path: Path, below: tuple[Path, ...]) -> Iterator[tuple[str, yaml.MappingNode]]:
    """(name, content) of a recipe's bases and of itself, bases first; contents are without `base`."""
    if path.resolve() in below:
        chain = " → ".join(p.name for p in (*below[below.index(path.resolve()) :], path))
        raise RecipeError(f"recipes are each other's base: {chain}", where=str(path), fix="Remove one base: line.")
    root = _compose(_read(path), str(path))
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise RecipeError("a recipe is a mapping of keys to values", where=str(path))
    for key, value in root.value:
        if key.value == "base":
            names = _plain(value)
            for name in names if isinstance(names, list) else [names]:
                if not isinstance(name, str):
                    raise RecipeError("base must be the name of a recipe or a list of names", where=_place(path, key))
                try:
                    base = find_recipe(name, path.parent)
                except RecipeError as error:
                    raise RecipeError(f"base: {error.what}", where=_place(path, value), fix=error.fix) from None
                yield from _files(base, (*below, path.resolve()))
    root.value = [(key, value) for key, value in root.value if key.value != "base"]
    yield str(path), root


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(f"the recipe cannot be read: {why}", where=str(path)) from error


def _compose(text: str, where: str) -> yaml.Node | None:
    """YAML to its tree of nodes, which knows lines and the text of every value."""
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        why = f"{error.problem or error.context}" + (f", {error.context}" if error.problem and error.context else "")
        raise RecipeError(
            f"this is not YAML: {why}", where=_shown(where) + line if where != COMMAND_LINE else where
        ) from error
    except yaml.YAMLError as error:
        raise RecipeError(f"this is not YAML: {error}", where=where) from error


def _collect(node: yaml.Node, prefix: str, file: str, given: dict[str, _Given], problems: list[Problem]) -> None:
    """Takes the values of one group of keys into `given`."""
    if _is_null(node):
        return
    where = _place(file, node)
    if not isinstance(node, yaml.MappingNode):
        name = prefix.rstrip(".")
        problems.append(Problem((name,), f"{name} is a group of keys, not {_plain(node)!r}", where))
        return
    seen: set[str] = set()
    for key_node, value_node in node.value:
        key = prefix + str(key_node.value)
        where = _place(file, key_node)
        if key in seen:
            problems.append(Problem((key,), f"{key} is given twice", where))
        seen.add(key)
        if key in all_keys():
            given[key] = _Given(_plain(value_node), where)
        elif key in all_blocks():
            _collect(value_node, f"{key}.", file, given, problems)
        else:
            problems.append(_unknown(key, where))


def _collect_override(override: str, given: dict[str, _Given], problems: list[Problem]) -> None:
    """Takes one `key=value` into `given`."""
    name, equals, text = override.partition("=")
    name = name.strip()
    if not equals or not name:
        problems.append(Problem((name,), f"{override!r} is not an override; write key=value, as model.dim=256"))
        return
    if name not in all_keys() and name not in all_blocks():
        problems.append(_unknown(name, COMMAND_LINE))
        return
    try:
        if name in all_keys():
            given[name] = _Given(_override_value(name, text.strip()), COMMAND_LINE)
        elif (node := _compose(text, COMMAND_LINE)) is not None:
            _collect(node, f"{name}.", COMMAND_LINE, given, problems)
    except RecipeError as error:
        problems.append(Problem((name,), f"{override}: {error.what}", COMMAND_LINE))


def _override_value(name: str, text: str) -> Any:
    key = all_keys()[name]
    quoted = text[:1] in ("'", '"')
    # A text is taken as it stands, so that nobody has to quote twice: text.prompt_template={} in blue.
    if key.type is str and not quoted and not (key.optional and text in ("null", "~", "")):
        return text
    node = _compose(text, COMMAND_LINE)
    return None if node is None else _plain(node)


def _unknown(key: str, where: str) -> Problem:
    block = key.split(".")[0]
    parents = [name for name in all_keys() if key.startswith(f"{name}.")]
    if parents:
        return Problem((parents[0],), f"unknown key {key}; {parents[0]} is set as a whole: {parents[0]}={{…}}", where)
    meant = nearest(key, [*all_keys(), *([] if "." in key else all_blocks())])
    if meant:
        return Problem((key, meant), f"unknown key {key}; did you mean {meant}?", where)
    group = block if block in all_blocks() else ""
    known = [name.rpartition(".")[2] for name in all_keys() if name.rpartition(".")[0] == group]
    inside = f"{group} has {', '.join(known)}" if group else f"recipes have {', '.join([*known, *all_blocks()])}"
    return Problem((key,), f"unknown key {key}; {inside}", where)


def _convert(given: dict[str, _Given]) -> tuple[Recipe, list[Problem]]:
    """Written values to a recipe; keys with a problem keep their default."""
    cfg = OmegaConf.structured(Recipe)
    assert isinstance(cfg, DictConfig)
    # Frozen dataclasses make read-only configurations; this one is being built.
    OmegaConf.set_readonly(cfg, False)
    for block in all_blocks():
        OmegaConf.set_readonly(cfg[block], False)
    problems = []
    for name, entry in given.items():
        try:
            OmegaConf.update(cfg, name, entry.value, merge=False)
        except (OmegaConfBaseException, ValueError):
            problems.append(_wrong_type(name, entry))
    defaults = flatten(Recipe())
    for name, entry in given.items():
        try:
            value = OmegaConf.select(cfg, name, throw_on_missing=True, throw_on_resolution_failure=True)
            if OmegaConf.is_config(value):
                OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
        except MissingMandatoryValue:
            problems.append(
                Problem((name,), f"{name} is not set: ??? stands for a value you have to give", entry.where)
            )
        except InterpolationResolutionError as error:
            why = str(error).splitlines()[0]
            problems.append(Problem((name,), f"{name}={entry.value} cannot be resolved: {why}", entry.where))
        else:
            continue
        OmegaConf.update(cfg, name, defaults[name], merge=False)
    recipe = OmegaConf.to_object(cfg)
    assert isinstance(recipe, Recipe)
    return recipe, problems


def _wrong_type(name: str, entry: _Given) -> Problem:
    shown = "null" if entry.value is None else repr(entry.value) if isinstance(entry.value, str) else str(entry.value)
    return Problem((name,), f"{name} must be {all_keys()[name].expects}, not {shown}", entry.where)


def _plain(node: yaml.Node) -> Any:
    """A value as written: scalars as text, null as None."""
    if _is_null(node):
        return None
    if isinstance(node, yaml.MappingNode):
        return {str(key.value): _plain(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_plain(entry) for entry in node.value]
    return node.value


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def _place(file: str | Path, node: yaml.Node) -> str:
    return str(file) if file == COMMAND_LINE else f"{_shown(file)}:{node.start_mark.line + 1}"


def _shown(path: str | Path) -> str:
    """A path as short as it can be told."""
    return os.path.relpath(path) if Path(path).resolve().is_relative_to(Path.cwd()) else str(path)


def _text(value: Any) -> str:
    """A value on one line of YAML, from which the same value is read back."""
    if isinstance(value, str):
        # "${" would be taken as a reference to another key.
        value = value.replace("${", "\\${")
    # Inside a list, YAML quotes what a flow style needs.
    # The order of data.sets is part of the run.
    text = yaml.safe_dump([value], default_flow_style=True, width=10**9, allow_unicode=True, sort_keys=False)
    return text.strip()[1:-1]
