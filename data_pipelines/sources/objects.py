"""Views around simple solids with emoji on their sides: exact captions, from installed packages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flagdit.data_pipelines.clips import strip
from flagdit.data_pipelines.pictures import check_size
from flagdit.data_pipelines.records import Raw, Rejected, Source, stable_hash
from flagdit.data_pipelines.render import PRIMITIVES, primitive, views
from flagdit.data_pipelines.sources.emoji import LICENCE, drawings
from flagdit.data_pipelines.user_files import check_holdout, drawn_split
from flagdit.errors import RecipeError


def azimuths(count: int) -> list[float]:
    """Degrees of so many views, evenly around, from a little to the right of the front."""
    return [round(20 + 360 * i / count, 3) for i in range(count)]


def source(
    *,
    size: int = 64,
    multiple: int = 0,
    count: int = 4,
    shapes: Sequence[str] = PRIMITIVES,
    limit: int = 20,
    holdout: float = 0.0,
    seed: int = 0,
) -> Source:
    """Solids with an emoji on their sides, seen from several directions.

    Args:
        size: side of every view in pixels.
        multiple: the side is a multiple of this many pixels; 0: by the size.
        count: views, evenly around the object.
        shapes: cube, ball, can, card, pyramid.
        limit: emoji, well known ones first; 0: all.
        holdout: share of (shape, emoji) pairs in the split "heldout".
        seed: draws the held-out pairs.

    Raises:
        RecipeError: an option that cannot be met.
        DataError: the emoji packages are not installed.
    """
    unknown = sorted(set(shapes) - set(PRIMITIVES))
    if unknown or count < 1:
        raise RecipeError(f"--shapes {','.join(shapes)} must be of {', '.join(PRIMITIVES)}, and --count positive")
    check_size(size, multiple)
    check_holdout(holdout)
    angles = azimuths(count)
    names = drawings("twemoji", 128, limit, seed)

    def items() -> Iterator[Raw | Rejected]:
        for name, code, texture in names:
            for shape in shapes:
                frames = views(primitive(shape, texture, size), angles, size)
                key = f"{shape}/{code}"
                yield Raw(
                    key=key,
                    media={"png": strip(frames)},
                    shape=(3, count, size, size),
                    caption=f"a {shape} with a picture of {name}, seen from {count} sides",
                    split=drawn_split(seed, key, holdout),
                    label=PRIMITIVES.index(shape),
                    meta={"shape": shape, "subject": name, "azimuths": angles},
                )

    settings = {
        "kind": "objects", "size": size, "count": count, "shapes": list(shapes), "limit": limit, "holdout": holdout,
        "seed": seed, "emoji": f"{stable_hash(*(code for _, code, _ in names)):016x}",
    }  # fmt: skip
    return Source("multiview", len(names) * len(shapes), settings, LICENCE, items())
