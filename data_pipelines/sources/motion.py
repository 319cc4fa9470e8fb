"""Clips with exact captions, animated from emoji: pictures that move, turn or grow, and a camera around a solid.

"a red apple moves left to right", "the camera turns around a cube with a picture of red apple".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from PIL import Image

from flagdit.data_pipelines.clips import strip
from flagdit.data_pipelines.pictures import check_size
from flagdit.data_pipelines.records import Raw, Rejected, Source, stable_hash
from flagdit.data_pipelines.render import primitive, views
from flagdit.data_pipelines.sources.emoji import LICENCE, drawings
from flagdit.data_pipelines.user_files import check_holdout, drawn_split
from flagdit.errors import RecipeError

MOVES = {
    "right": "{} moves left to right",
    "left": "{} moves right to left",
    "up": "{} moves from the bottom to the top",
    "down": "{} falls from the top to the bottom",
    "turn": "{} turns around clockwise",
    "grow": "{} grows from small to large",
    "shrink": "{} shrinks from large to small",
    "orbit": "the camera turns around a cube with a picture of {}",
}
INSIDE = 0.55  # of the canvas: side of a picture that moves
DRAWN_SIDE = 128


def source(
    *,
    size: int = 64,
    multiple: int = 0,
    frames: int = 8,
    moves: Sequence[str] = tuple(MOVES),
    limit: int = 20,
    holdout: float = 0.0,
    seed: int = 0,
) -> Source:
    """Emoji in motion on white, and cameras around solids that show them.

    Args:
        size: side of every frame in pixels.
        multiple: the side is a multiple of this many pixels; 0: by the size.
        frames: of every clip.
        moves: right, left, up, down, turn, grow, shrink, orbit.
        limit: emoji, well known ones first; 0: all.
        holdout: share of (emoji, move) pairs in the split "heldout".
        seed: draws the held-out pairs.

    Raises:
        RecipeError: an option that cannot be met.
        DataError: the emoji packages are not installed.
    """
    unknown = sorted(set(moves) - set(MOVES))
    if unknown or frames < 2:
        raise RecipeError(f"--moves {','.join(moves)} must be of {', '.join(MOVES)}, and --frames 2 or more")
    check_size(size, multiple)
    check_holdout(holdout)
    subjects = drawings("twemoji", DRAWN_SIDE, limit, seed)

    def items() -> Iterator[Raw | Rejected]:
        for name, code, drawing in subjects:
            for number, move in enumerate(moves):
                key = f"{move}/{code}"
                yield Raw(
                    key=key,
                    media={"png": strip(animate(drawing, move, frames, size))},
                    shape=(3, frames, size, size),
                    caption=MOVES[move].format(name if move == "orbit" else f"{_article(name)} {name}"),
                    split=drawn_split(seed, key, holdout),
                    label=number,
                    meta={"subject": name, "move": move},
                )

    settings = {
        "kind": "motion", "size": size, "frames": frames, "moves": list(moves), "limit": limit, "holdout": holdout,
        "seed": seed, "emoji": f"{stable_hash(*(code for _, code, _ in subjects)):016x}",
    }  # fmt: skip
    return Source("video", len(subjects) * len(moves), settings, LICENCE, items())


def animate(drawing: Image.Image, move: str, frames: int, size: int) -> list[Image.Image]:
    """The frames of one move, on white."""
    if move == "orbit":
        return views(primitive("cube", drawing, size), [360 * i / frames for i in range(frames)], size)
    clip = []
    for i in range(frames):
        done = i / (frames - 1)
        side, x, y, angle = INSIDE, 0.5, 0.5, 0.0
        if move in ("right", "left"):
            x = 0.1 + 0.8 * (done if move == "right" else 1 - done)
        elif move in ("down", "up"):
            y = 0.1 + 0.8 * (done if move == "down" else 1 - done)
        elif move == "turn":
            angle = -360 * i / frames
        else:
            side = 0.2 + 0.75 * (done if move == "grow" else 1 - done)
        clip.append(_placed(drawing, size, side, x, y, angle))
    return clip


def _placed(drawing: Image.Image, size: int, side: float, x: float, y: float, angle: float) -> Image.Image:
    """A drawing with its middle at (x, y) of a white canvas."""
    # Drawn at four times the size, so that it moves by less than a pixel where it should.
    large = 4 * size
    pixels = max(1, math.ceil(side * large))
    picture = drawing.convert("RGB").resize((pixels, pixels), Image.Resampling.LANCZOS)
    picture = picture.rotate(angle, Image.Resampling.BICUBIC, fillcolor="white")
    canvas = Image.new("RGB", (large, large), "white")
    canvas.paste(picture, (round(x * large - pixels / 2), round(y * large - pixels / 2)))
    return canvas.resize((size, size), Image.Resampling.BOX)


def _article(name: str) -> str:
    return "an" if name[0].lower() in "aeiou" else "a"
