"""From YAML to a `Recipe`: base recipes, the recipe, then overrides; strict about every key.

Problems are collected and reported together, each with the file or override it stands in.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flagdit.config.schema import Recipe
from flagdit.config.validate import problems_of
from flagdit.errors import RecipeError

SHIPPED = Path(__file__).parents[1] / "recipes"


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads, merges and checks a recipe.

    Args:
        path_or_name: a YAML file, or the name of a shipped recipe such as `quickstart`.
        overrides: dotted assignments such as `model.dim=256` or `sample.prompts=[a cat, a dog]`; the value is YAML.

    Raises:
        RecipeError: no such file, YAML that cannot be read, unknown keys, values of the wrong type, values that are not
            allowed together. All problems are listed at once.
    """
    problems: list[str] = []
    layers = [(str(file), tree) for file, tree in _chain(_find(path_or_name, relative_to=None), ())]
    layers += [(f"override {text!r}", tree) for text, tree in map(_override, overrides)]
    merged = _writable_defaults()
    for source, tree in layers:
        _merge(merged, tree, source, problems)
    if problems:
        raise RecipeError(_listed(problems), where=str(path_or_name))
    recipe = OmegaConf.to_object(merged)
    assert isinstance(recipe, Recipe)
    problems = problems_of(recipe)
    if problems:
        raise RecipeError(_listed(problems), where=str(path_or_name))
    return recipe


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Writes every key of a recipe as YAML, each with its meaning as a comment."""
    path.write_text(describe(recipe))


def describe(recipe: Recipe) -> str:
    """A recipe as YAML with the meaning of every key."""
    out = io.StringIO()
    for name, value, doc in _fields(recipe):
        if dataclasses.is_dataclass(value):
            out.write(f"\n{name}:  # {doc}\n")
            for inner, inner_value, inner_doc in _fields(value):
                out.write(f"  {inner}: {_flow_yaml(inner_value)}  # {inner_doc}\n")
        else:
            out.write(f"{name}: {_flow_yaml(value)}  # {doc}\n")
    return out.getvalue()


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """A recipe as nested plain dicts, lists and scalars."""
    return dataclasses.asdict(recipe)


def flatten(recipe: Recipe) -> dict[str, Any]:
    """A recipe as dotted key → value."""
    flat: dict[str, Any] = {}
    for name, value, _ in _fields(recipe):
        if dataclasses.is_dataclass(value):
            flat |= {f"{name}.{inner}": inner_value for inner, inner_value, _ in _fields(value)}
        else:
            flat[name] = value
    return flat


def _fields(config: Any) -> Iterator[tuple[str, Any, str]]:
    for f in dataclasses.fields(config):
        yield f.name, getattr(config, f.name), f.metadata["doc"]


def _flow_yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _find(path_or_name: str | Path, relative_to: Path | None) -> Path:
    """The file that a recipe or `base:` names: beside the recipe, as given, or among the shipped ones."""
    given = Path(path_or_name)
    candidates = [given] if relative_to is None else [relative_to.parent / given, given]
    candidates += [SHIPPED / given, *(p.with_name(p.name + ".yaml") for p in (*candidates, SHIPPED / given))]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    shipped = sorted(p.relative_to(SHIPPED).with_suffix("").as_posix() for p in SHIPPED.rglob("*.yaml"))
    close = difflib.get_close_matches(given.with_suffix("").as_posix(), shipped, n=1)
    raise RecipeError(
        f"there is no recipe {str(path_or_name)!r}" + (f" (base of {relative_to})" if relative_to else ""),
        fix=(f"Did you mean {close[0]}? " if close else "")
        + f"Give a YAML file or a shipped recipe: {', '.join(shipped)}.",
    )


def _chain(path: Path, above: tuple[Path, ...]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The recipe's own keys, after those of its bases."""
    path = path.resolve()
    if path in above:
        names = " → ".join(p.name for p in (*above[above.index(path) :], path))
        raise RecipeError(
            f"the recipe is its own base: {names}", where=str(path), fix="Remove one of the `base:` lines."
        )
    try:
        tree = yaml.load(path.read_text(), Loader=_Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"this is not valid YAML: {error}", where=str(path)) from None
    if not isinstance(tree, dict):
        raise RecipeError("a recipe is a mapping of keys to values", where=str(path))
    bases = tree.pop("base", [])
    for base in [bases] if isinstance(bases, str) else bases:
        yield from _chain(_find(base, relative_to=path), (*above, path))
    yield path, tree


class _Loader(yaml.SafeLoader):
    """YAML that refuses to forget the first of two equal keys, and reads 1e-4 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _override(text: str) -> tuple[str, dict[str, Any]]:
    """`model.dim=256` → its text and the tree {model: {dim: 256}}."""
    dotted, equals, value = text.partition("=")
    if not equals or not dotted or not all(dotted.split(".")):
        raise RecipeError(f"{text!r} is not an override", fix="Write key=value, such as model.dim=256.")
    try:
        tree: Any = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"the value of {text!r} is not valid YAML: {error}") from None
    for part in reversed(dotted.split(".")):
        tree = {part: tree}
    return text, tree


def _writable_defaults() -> DictConfig:
    # The dataclasses are frozen, which OmegaConf takes over for every block.
    config: DictConfig = OmegaConf.structured(Recipe)
    for node in (config, *(config._get_node(name) for name in config)):
        if isinstance(node, DictConfig):
            OmegaConf.set_readonly(node, False)
    return config


def _merge(config: DictConfig, tree: Mapping[str, Any], source: str, problems: list[str]) -> None:
    """Sets key by key, so that one bad key does not hide the next."""
    known = flatten(Recipe())
    for dotted, value in _leaves(tree, Recipe, ""):
        if dotted not in known:
            problems.append(f"{_unknown(dotted, known)} ({source})")
            continue
        try:
            # Dicts are values too: `modalities: {audio: 8}` means audio alone, not audio beside the default.
            OmegaConf.update(config, dotted, value, merge=False)
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            problems.append(f"{dotted}={value!r}: {reason[0].lower()}{reason[1:]} ({source})")


def _leaves(tree: Mapping[str, Any], schema: type, prefix: str) -> Iterator[tuple[str, Any]]:
    """Dotted key → value, down to the schema's values; `prefix` ends in a dot where it is not empty."""
    hints = get_type_hints(schema)
    for name, value in tree.items():
        inner = hints.get(str(name))
        if dataclasses.is_dataclass(inner) and isinstance(value, Mapping):
            yield from _leaves(value, inner, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif inner is None and isinstance(value, Mapping) and not prefix:
            yield from ((f"{name}.{key}", v) for key, v in value.items())
        else:
            yield f"{prefix}{name}", value


def _unknown(dotted: str, known: Mapping[str, Any]) -> str:
    inside = [k for k in known if k.startswith(f"{dotted}.")]
    if inside:
        return f"{dotted} is a block of keys, such as {inside[0]}"
    leaf = dotted.rpartition(".")[2]
    same_leaf = [k for k in known if k.rpartition(".")[2] == leaf]  # train.lr: optimizer.lr is meant
    close = same_leaf or difflib.get_close_matches(dotted, known, n=1)
    return f"unknown key {dotted}" + (f"; did you mean {close[0]}?" if close else "")


def _listed(problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems:\n" + "\n".join(f"  - {p}" for p in problems)
