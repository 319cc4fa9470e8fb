"""The user's own meshes: files that trimesh reads, with captions beside them, as views from around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from flagdit.config.schema import LimitsConfig
from flagdit.data_pipelines.clips import strip
from flagdit.data_pipelines.pictures import check_size
from flagdit.data_pipelines.records import Source
from flagdit.data_pipelines.render import surface_of_mesh, views
from flagdit.data_pipelines.sources.objects import azimuths
from flagdit.data_pipelines.user_files import Media, captioned_files, check_bytes
from flagdit.errors import RecipeError

READ = {".obj", ".glb", ".stl", ".ply", ".off"}
NOT_READ = {".gltf", ".fbx", ".blend", ".usd", ".usdz", ".3ds", ".dae"}


def source(
    *,
    src: str | Path,
    size: int = 128,
    multiple: int = 0,
    count: int = 4,
    elevation: float = 20.0,
    holdout: float = 0.0,
    seed: int = 0,
    limits: LimitsConfig = LimitsConfig(),
) -> Source:
    """Views of the meshes of a folder and its sub-folders, with captions beside them.

    Args:
        src: the folder.
        size: side of every view in pixels.
        multiple: the side is a multiple of this many pixels; 0: by the size.
        count: views, evenly around the object.
        elevation: of the camera, in degrees.
        holdout: share of files in the split "heldout".
        seed: draws the held-out files.
        limits: what a file may be.

    Raises:
        RecipeError: an option that cannot be met.
        DataError: no such folder, or no meshes in it.
    """
    check_size(size, multiple)
    if count < 1 or not -90 <= elevation <= 90:
        raise RecipeError(f"--count {count} must be positive, --elevation {elevation:g} from -90 to 90")
    angles = azimuths(count)

    def load(path: Path) -> Iterator[Media]:
        surface = surface_of_mesh(path.read_bytes(), path.suffix.lower()[1:], beside(path, limits))
        meta = {"azimuths": angles, "elevation": elevation}
        yield Media({"png": strip(views(surface, angles, size, elevation))}, (3, count, size, size), meta)

    settings = {"kind": "meshes", "size": size, "count": count, "elevation": elevation}
    return captioned_files(
        src, load, modality="multiview", settings=settings, read=READ, not_read=NOT_READ, what="meshes",
        holdout=holdout, seed=seed, limits=limits,
    )  # fmt: skip


def beside(path: Path, limits: LimitsConfig) -> Callable[[str], bytes]:
    """Reads materials and textures that lie in the mesh's own folder or below, and nothing else."""
    folder = path.parent.resolve()

    def read(name: str) -> bytes:
        wanted = (folder / name).resolve()
        if folder not in wanted.parents or not wanted.is_file():
            raise KeyError(name)
        check_bytes(wanted.stat().st_size, limits)
        return wanted.read_bytes()

    return read
