"""Pictures that a table names or holds: jsonl, json and parquet, and the META lists of Lumina.

A row has a picture, as a path beside the table or (parquet) as bytes, and a caption. Lumina's configuration is a YAML
file, `META: [{path: one.json}, …]`, whose tables are lists of such rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from flagdit.config.schema import LimitsConfig
from flagdit.data_pipelines.pictures import check_size, fitted
from flagdit.data_pipelines.records import Raw, Rejected, Source, safe_key, stable_hash
from flagdit.data_pipelines.user_files import captions_of, check_bytes, check_holdout, drawn_split, time_limit
from flagdit.errors import DataError, RecipeError

ENDINGS = (".jsonl", ".json", ".parquet", ".yaml", ".yml")
PICTURE_KEYS = ("file", "path", "image", "image_path", "image_url", "jpg", "png")
CAPTION_KEYS = ("caption", "prompt", "text", "gt_caption", "title")


def source(
    *,
    src: str | Path,
    root: str = "",
    size: int = 256,
    multiple: int = 0,
    keep_jpeg: bool = False,
    holdout: float = 0.0,
    seed: int = 0,
    limits: LimitsConfig = LimitsConfig(),
) -> Source:
    """Pictures and captions of a table (jsonl, json, parquet) or a Lumina META list (yaml), resized.

    Args:
        src: the file.
        root: folder that the rows' paths are relative to; none may lead out of it. Empty: the folder of each table.
        size: side in pixels of the square whose area no picture exceeds; aspect ratios are kept, none is enlarged.
        multiple: rows and columns are multiples of this many pixels; 0: by the size.
        keep_jpeg: JPEG files go into the shards as they are, and are decoded when they are encoded or trained on.
        holdout: share of pictures in the split "heldout".
        seed: draws the held-out pictures.
        limits: what a picture may be.

    Raises:
        RecipeError: an option that cannot be met.
        DataError: no such file, or not such a table.
    """
    step = check_size(size, multiple)
    check_holdout(holdout)
    file = Path(src).expanduser()
    if not file.is_file() or file.suffix.lower() not in ENDINGS:
        raise RecipeError(f"--from {src} is not a file ending in {', '.join(ENDINGS)}")
    tables = _meta(file) if file.suffix.lower() in (".yaml", ".yml") else [file]
    rows = [(table, number, row) for table in tables for number, row in enumerate(_rows(table), start=1)]

    def items() -> Iterator[Raw | Rejected]:
        seen: dict[str, str] = {}
        for table, number, row in rows:
            place = f"{table.name}:{number}"
            try:
                if isinstance(row, DataError):
                    raise row
                with time_limit(limits.sample_seconds):
                    name, data = _picture(row, Path(root) if root else table.parent, place, limits)
                    if name in seen:
                        raise DataError(f"names the picture of {seen[name]} again")
                    seen[name] = place
                    captions, label = captions_of(_entry(row), limits)
                    media, width, height, before = fitted(data, size, step, limits.max_pixels, keep_jpeg)
            except DataError as error:
                yield Rejected(place, error.what)
                continue
            meta = {"file": name, "pixels": before}
            split = drawn_split(seed, name, holdout)
            key = safe_key(name.rpartition(".")[0] or name)
            yield Raw(key, media, (3, 1, height, width), captions[0], split, label, meta, captions[1:])

    stats = [[t.name, t.stat().st_size, t.stat().st_mtime_ns] for t in tables]
    settings = {
        "kind": "table", "files": f"{stable_hash(*stats):016x}", "root": root, "size": size, "multiple": step,
        "keep_jpeg": keep_jpeg, "holdout": holdout, "seed": seed, "limits": vars(limits),
    }  # fmt: skip
    return Source("image", len(rows), settings, "the user's own table", items())


def _meta(file: Path) -> list[Path]:
    """The tables of a Lumina META list; relative paths start at the list's folder."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        names = [entry["path"] for entry in content["META"]]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"is not a META list ({type(error).__name__})", where=str(file), fix="Write META: [{path: FILE.json}, …]."
        ) from error
    tables = [file.parent / str(name) for name in names]
    missing = [str(t) for t in tables if not t.is_file() or t.suffix.lower() not in ENDINGS[:3]]
    if missing or not tables:
        raise DataError(f"names no table at {missing[0]}" if missing else "names no table", where=str(file))
    return tables


def _rows(table: Path) -> Iterator[dict[str, Any] | DataError]:
    if table.suffix.lower() == ".parquet":
        yield from _parquet(table)
        return
    try:
        data = table.read_bytes()
        lines = json.loads(data.decode()) if table.suffix.lower() == ".json" else data.split(b"\n")
        if not isinstance(lines, list):
            raise ValueError("not a list")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot be read as a table ({error})", where=str(table)) from error
    for line in lines:
        if isinstance(line, bytes):
            if not line.strip():
                continue
            try:
                line = json.loads(line.decode())
            except (ValueError, RecursionError) as error:
                yield DataError(f"is not JSON ({error})")
                continue
        yield line if isinstance(line, dict) else DataError("is not a row with picture and caption")


def _parquet(table: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(table) as file:
            for batch in file.iter_batches(256):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"cannot be read as parquet ({error})", where=str(table)) from error


def _picture(row: dict[str, Any], root: Path, place: str, limits: LimitsConfig) -> tuple[str, bytes]:
    found = next((row[k] for k in PICTURE_KEYS if row.get(k) is not None), None)
    if isinstance(found, dict):  # as the `datasets` library stores pictures
        found = found["bytes"] if found.get("bytes") is not None else found.get("path")
    if isinstance(found, bytes):
        check_bytes(len(found), limits)
        return str(row.get("key") or place), found
    if not isinstance(found, str):
        raise DataError(f"has no picture: none of {', '.join(PICTURE_KEYS)}")
    if "://" in found or found.startswith("pipe:"):
        raise DataError(f"{found.partition(':')[0]}: addresses are not fetched; give a file")
    try:
        base, path = root.resolve(), (root / found).resolve()
        if base not in path.parents:
            raise DataError("leads out of the folder")
        check_bytes(path.stat().st_size, limits)
        return found, path.read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(f"its picture cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _entry(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its caption under "caption"; of a conversation, the last thing said."""
    given = dict(row)
    caption = next((row[k] for k in CAPTION_KEYS if row.get(k) is not None), None)
    talk = row.get("conversations")
    if caption is None and isinstance(talk, list) and talk and isinstance(talk[-1], dict):
        caption = talk[-1].get("value")
    return {"caption": caption, **{k: given[k] for k in ("captions", "label") if given.get(k) is not None}}
