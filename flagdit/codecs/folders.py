"""Local folders of pretrained models: found, checked and told apart, without any network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flagdit.errors import RecipeError

MIB = 1 << 20
IDENTIFYING = (
    "config.json",
    "*.safetensors",
    "*.bin",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "special_tokens_map.json",
)


def model_folder(path: str | None, key: str, what: str) -> Path:
    """The folder that a recipe key names.

    Args:
        path: value of the key.
        key: the recipe key, for the error.
        what: what should be in the folder, e.g. "a diffusers autoencoder".

    Raises:
        RecipeError: no value, no such folder (a hub name, perhaps), or a folder without config.json.
    """
    if not path:
        raise RecipeError(f"{key} is not set", fix=f"Give the local folder of {what}.")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        looks_like_hub_name = path.count("/") == 1 and not path.startswith((".", "/", "~"))
        advice = (
            "It looks like a hub name, and nothing is downloaded at run time: fetch the model where there is a "
            "network, for example with `hf download`, and give its local folder."
            if looks_like_hub_name
            else f"Give the local folder of {what}."
        )
        raise RecipeError(f"{path!r} is not a folder on this machine", where=key, fix=advice)
    if not (folder / "config.json").is_file():
        inner = sorted(p.parent.name for p in folder.glob("*/config.json"))
        advice = (
            f"Did you mean {folder}/{inner[0]}?" if inner else f"Give the folder of {what}, the one with config.json."
        )
        raise RecipeError(f"{path!r} has no config.json", where=key, fix=advice)
    return folder


def read_config(folder: Path, key: str) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        RecipeError: it is not a JSON object.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{folder}/config.json cannot be read: {error}", where=key) from error
    if not isinstance(config, dict):
        raise RecipeError(f"{folder}/config.json is not a JSON object", where=key)
    return config


def fingerprint(folder: Path) -> str:
    """Tells two models apart, whatever their folders are called: 16 hex digits.

    Hashes name, size, and first and last MiB of the configuration, weights and tokenizer files; a whole encoder can
    have tens of gigabytes, and training one changes every part of it.
    """
    digest = hashlib.sha256()
    files = {p for pattern in IDENTIFYING for p in folder.glob(pattern) if p.is_file()}
    for path in sorted(files, key=lambda p: p.name):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(MIB))
            if size > MIB:
                file.seek(max(MIB, size - MIB))
                digest.update(file.read(MIB))
    return digest.hexdigest()[:16]


@contextmanager
def quiet(logging: Any) -> Iterator[None]:
    """Keeps the notices and progress bars of transformers or diffusers (their `utils.logging`) off the screen."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
