"""Redraws the pictures of docs/generation.md: what each way to draw makes of the small models.

    python benchmarks/sheets.py [--pictures runs/quickstart] [--motion runs/motion] [--out docs/images]

Either run may be left out by an empty name. The last line is one JSON object: each file and its bytes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from flagdit.config.schema import SampleConfig
from flagdit.generate.compose import Region
from flagdit.generate.draw import Way, draw
from flagdit.generate.edit import edit
from flagdit.generate.images import grid, to_image
from flagdit.generate.inputs import between
from flagdit.generate.pipeline import Pipeline, load_pipeline
from flagdit.generate.sample import settings_of

COLOURS = 128
TROPHY, DOG = (f"a Twemoji emoji of {name}" for name in ("trophy", "dog face"))
OPEN_DOG = "an OpenMoji emoji of dog face"


@dataclass
class Sheet:
    """Captioned pictures that stand side by side in one file."""

    name: str
    columns: int
    zoom: int

    def __post_init__(self) -> None:
        self.pictures: list[Tensor] = []
        self.captions: list[str] = []

    def add(self, pictures: Sequence[Tensor], *captions: str) -> None:
        self.pictures += pictures
        self.captions += captions
        assert len(self.pictures) == len(self.captions)

    def save(self, folder: Path) -> int:
        """Writes a PNG of few colours; its bytes."""
        images = [to_image(p) for p in self.pictures]
        sheet = grid(images, columns=self.columns, zoom=self.zoom, gap=8, captions=self.captions)
        file = folder / f"{self.name}.png"
        sheet.quantize(COLOURS).save(file, optimize=True)
        return file.stat().st_size


def sizes(p: Pipeline, cfg: SampleConfig) -> Sheet:
    sheet = Sheet("resolution", columns=4, zoom=3)
    for width, height in ((24, 24), (36, 36), (48, 48), (48, 24)):
        size, name = [(width, height)], f"{width}×{height}"
        sheet.add(p.generate([TROPHY], cfg, sizes=size), f"{name}, no scaling")
        for scaling in ("linear", "time_aware"):
            scaled = replace(cfg, train_size="24x24", scaling=scaling)
            sheet.add(p.generate([TROPHY], scaled, sizes=size), f"{name}, {scaling}")
        linear = replace(cfg, train_size="24x24", scaling="linear")
        sheet.add(draw(p, [TROPHY], linear, Way(upscale=0.5), sizes=size), f"{name}, stages")
    return sheet


def editing(p: Pipeline, cfg: SampleConfig) -> Sheet:
    sheet = Sheet("editing", columns=4, zoom=6)
    dog, trophy = p.generate([DOG, TROPHY], cfg)
    sheet.add([dog], "drawn: Twemoji dog face")
    for strength in (0.2, 0.4, 0.7):
        sheet.add(edit(p, [dog], [OPEN_DOG], cfg, strength=strength), f"OpenMoji, strength {strength}")
    upper = torch.arange(24)[None, :, None].expand(1, 24, 24) < 12
    sheet.add(edit(p, [dog], [TROPHY], cfg, strength=1.0, masks=[upper]), "upper half masked: trophy")
    for strength in (0.05, 0.3):
        styled = edit(p, [dog], [DOG], cfg, strength=strength, style=trophy)
        sheet.add(styled, f"statistics of trophy, {strength}")
    sheet.add([trophy], "the trophy")
    return sheet


def canvases(p: Pipeline, cfg: SampleConfig) -> Sheet:
    sheet = Sheet("canvas", columns=2, zoom=4)
    side_by_side = (Region(TROPHY, 0, 0, 24, 24), Region(DOG, 24, 0, 24, 24))
    apart = (Region(TROPHY, 0, 0, 24, 24), Region(DOG, 36, 12, 24, 24))
    sheet.add(draw(p, [], cfg, Way(regions=side_by_side), sizes=[(48, 24)]), "two regions")
    sheet.add(draw(p, [""], cfg, Way(regions=apart), sizes=[(60, 36)]), "two regions, an empty prompt for the rest")
    sheet.add(draw(p, [TROPHY, DOG], cfg, Way(window=(24, 24)), sizes=[(72, 24)]), "panorama of two prompts")
    sheet.add(draw(p, [DOG], cfg, Way(window=(24, 24), wrap=True), sizes=[(72, 24)]), "panorama that wraps")
    return sheet


def speed(p: Pipeline, cfg: SampleConfig) -> Sheet:
    """Presets, and one set drawn with shared attention for ever longer."""
    sheet = Sheet("speed_and_sets", columns=4, zoom=5)
    for name in ("draft", "fast", "standard", "fine"):
        sheet.add(p.generate([DOG], settings_of(p.recipe, name, {})), f"{name}")
    asked = [OPEN_DOG, TROPHY]
    for until in (0.0, 0.3, 0.6, 1.0):
        drawn = draw(p, asked, cfg, Way(share=until), sizes=[(24, 24)] * 2)
        sheet.add([torch.cat(drawn, dim=1)], f"a set that shares until {until:g}")
    return sheet


def clips(p: Pipeline, cfg: SampleConfig, frames: int) -> Sheet:
    """Every second frame of clips, from left to right."""
    sheet = Sheet("clips", columns=1, zoom=2)
    size = [p.default_size(cfg)]
    one, two = "a red apple moves left to right", "a dog face grows from small to large"

    def add(prompts: Sequence[str], count: int, way: Way, caption: str) -> Tensor:
        (video,) = draw(p, prompts, replace(cfg, frames=count), way, sizes=size)
        sheet.add([video[:, ::2]], caption)
        return video

    plain = add([one], frames, Way(), f"{frames} frames, as in training")
    windows = Way(scenes=True, window_frames=frames)
    add([one], 3 * frames, windows, f"{3 * frames} frames in windows of {frames}")
    add([one, two], 3 * frames, windows, "two scenes")
    add([one], 2 * frames, replace(windows, loop=True), "a loop")
    add([two], frames, replace(windows, first_frame=plain[:, :1]), "from a given first frame, another prompt")
    middle = between(plain, "video", p.recipe.audio.sample_rate, 0.25, 0.75)
    edited = edit(p, [plain], [two], replace(cfg, frames=frames), strength=1.0, masks=[middle])
    sheet.add([edited[0][:, ::2]], "frames 3 to 6 drawn anew, another prompt")
    return sheet


def views(p: Pipeline, cfg: SampleConfig, frames: int) -> Sheet:
    sheet = Sheet("views", columns=1, zoom=3)
    prompt = "a cube with a picture of dog face, seen from 4 sides"
    for count in (frames, 2 * frames):
        sheet.add(p.generate([prompt], replace(cfg, frames=count)), f"{count} views")
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", default="runs/quickstart", help="a run of the quickstart")
    parser.add_argument("--motion", default="runs/motion", help="a run on clips and views")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="default: docs/images")
    args = parser.parse_args()
    sheets: list[Sheet] = []
    if args.pictures:
        pipeline = load_pipeline(args.pictures)
        fast = settings_of(pipeline.recipe, "fast", {})
        sheets += [make(pipeline, fast) for make in (sizes, editing, canvases, speed)]
    if args.motion:
        pipeline = load_pipeline(args.motion)
        for make, modality, frames in ((clips, "video", 8), (views, "multiview", 4)):
            sheets.append(make(pipeline, settings_of(pipeline.recipe, None, {"modality": modality}), frames))
    print(json.dumps({sheet.name: sheet.save(args.out) for sheet in sheets}))


if __name__ == "__main__":
    main()
