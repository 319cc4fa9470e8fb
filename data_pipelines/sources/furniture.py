"""Views of furniture, where the Debian package sweethome3d-furniture is installed: 820 models with names."""

from __future__ import annotations

import posixpath
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from flagdit.config.schema import LimitsConfig
from flagdit.data_pipelines.clips import strip
from flagdit.data_pipelines.pictures import check_size
from flagdit.data_pipelines.records import Raw, Rejected, Source, safe_key
from flagdit.data_pipelines.render import surface_of_mesh, views
from flagdit.data_pipelines.sources.objects import azimuths
from flagdit.data_pipelines.user_files import check_bytes, check_holdout, drawn_split, time_limit
from flagdit.errors import DataError, RecipeError

CATALOGUES = Path("/usr/share/sweethome3d/furniture")
CATALOGUE = "PluginFurnitureCatalog.properties"
LICENCE = "Sweet Home 3D furniture: licences by catalogue, see /usr/share/doc/sweethome3d-furniture."


def source(
    *,
    size: int = 128,
    multiple: int = 0,
    count: int = 4,
    limit: int = 0,
    holdout: float = 0.0,
    seed: int = 0,
    catalogues: str = str(CATALOGUES),
    limits: LimitsConfig = LimitsConfig(),
) -> Source:
    """Views of furniture models, captioned with their names.

    Args:
        size: side of every view in pixels.
        multiple: the side is a multiple of this many pixels; 0: by the size.
        count: views, evenly around the object.
        limit: models, in the order of the catalogues; 0: all.
        holdout: share of models in the split "heldout".
        seed: draws the held-out models.
        catalogues: folder of the .sh3f files.
        limits: what a model may be.

    Raises:
        RecipeError: an option that cannot be met.
        DataError: the package is not installed.
    """
    check_size(size, multiple)
    check_holdout(holdout)
    if count < 1:
        raise RecipeError(f"--count {count} must be positive")
    files = sorted(Path(catalogues).glob("*.sh3f"))
    if not files:
        raise DataError(
            f"there is no furniture in {catalogues}",
            fix="On Debian: `apt-get install sweethome3d-furniture`. Or build `objects`, which needs no such package.",
        )
    models = [(file, number, entry) for file in files for number, entry in _entries(file).items()][: limit or None]
    angles = azimuths(count)

    def items() -> Iterator[Raw | Rejected]:
        for file, number, entry in models:
            key = safe_key(f"{file.stem}/{number:04d}")
            try:
                with time_limit(limits.sample_seconds):
                    frames = views(_surface(file, entry["model"], limits), angles, size)
            except DataError as error:
                yield Rejected(key, error.what)
                continue
            name = entry["name"].lower()
            tags = [t.strip().lower() for t in entry.get("tags", "").split(",") if t.strip()]
            yield Raw(
                key=key,
                media={"png": strip(frames)},
                shape=(3, count, size, size),
                caption=f"a 3D model of {name}, seen from {count} sides",
                split=drawn_split(seed, key, holdout),
                meta={"name": name, "tags": tags, "category": entry.get("category", ""), "azimuths": angles},
                more_captions=(f"{name} ({', '.join(tags)})",) if tags else (),
            )

    settings = {
        "kind": "furniture", "size": size, "count": count, "limit": limit, "holdout": holdout, "seed": seed,
        "files": [[f.name, f.stat().st_size] for f in files], "limits": vars(limits),
    }  # fmt: skip
    return Source("multiview", len(models), settings, LICENCE, items())


def _entries(file: Path) -> dict[int, dict[str, str]]:
    """Number → properties of each model of a catalogue that has a name and an OBJ file."""
    try:
        with zipfile.ZipFile(file) as archive:
            text = archive.read(CATALOGUE).decode("latin-1")
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"is no catalogue of furniture ({error})", where=str(file)) from error
    found: dict[int, dict[str, str]] = {}
    for name, number, value in re.findall(r"^(\w+)#(\d+)=(.*)$", text, flags=re.MULTILINE):
        found.setdefault(int(number), {})[name] = value.strip().encode().decode("unicode_escape")
    return {n: e for n, e in sorted(found.items()) if e.get("name") and e.get("model", "").lower().endswith(".obj")}


def _surface(file: Path, model: str, limits: LimitsConfig):
    with zipfile.ZipFile(file) as archive:
        folder = posixpath.dirname(model.lstrip("/"))

        def read(name: str) -> bytes:
            check_bytes(archive.getinfo(name).file_size, limits)
            return archive.read(name)

        try:
            data = read(model.lstrip("/"))
        except KeyError:
            raise DataError(f"{model} is not in the catalogue") from None
        return surface_of_mesh(data, "obj", lambda name: read(posixpath.normpath(posixpath.join(folder, name))))
