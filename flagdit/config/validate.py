"""What a recipe must satisfy beyond types: ranges and choices of single keys, and rules across keys.

Each rule is a small function that yields the problems it sees; the table RULES at the end lists them all. Rules that
need to know a model size, a data set, a folder or the machine live where those are known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator

from flagdit.config.keys import all_keys, flatten, nearest
from flagdit.config.problems import Problem, divisors, either, nearest_values, raise_problems
from flagdit.config.schema import Recipe
from flagdit.config.validate_checkpoint import checkpoint_problems
from flagdit.config.validate_parallel import parallel_problems
from flagdit.config.validate_sample import guidance_problems
from flagdit.config.validate_start import start_problems
from flagdit.errors import RecipeError

COLOURS = 3
FACTORS = (2, 4, 8)


def validate(recipe: Recipe) -> None:
    """Checks a recipe as a whole.

    Raises:
        RecipeError: lists every problem, one a line.
    """
    raise_problems(problems_of(recipe), recipe.name)


def problems_of(recipe: Recipe) -> list[Problem]:
    """All problems of a recipe whose types are right."""
    single = list(_single_keys(recipe))
    # A rule across keys has nothing to say about a value that is already wrong by itself.
    wrong = {key for problem in single for key in problem.keys}
    crossed = [problem for rule in RULES for problem in rule(recipe) if not wrong.intersection(problem.keys)]
    return single + crossed


def parse_size(size: str) -> tuple[int, int]:
    """'WIDTHxHEIGHT' → (width, height) in pixels.

    Raises:
        RecipeError: another format.
    """
    match = re.fullmatch(r"([1-9]\d{0,5})[x×]([1-9]\d{0,5})", size.strip())
    if not match:
        raise RecipeError(f"{size!r} is not a size", fix="Write WIDTHxHEIGHT in pixels, for example 48x32.")
    return int(match[1]), int(match[2])


def sizes_near(width: int, height: int, unit: int) -> str:
    """The sizes below and above whose sides are multiples of `unit`, for messages: "48x32 or 56x32"."""
    below = f"{max(width // unit, 1) * unit}x{max(height // unit, 1) * unit}"
    above = f"{-(-width // unit) * unit}x{-(-height // unit) * unit}"
    return " or ".join(dict.fromkeys([below, above]))


def _single_keys(recipe: Recipe) -> Iterator[Problem]:
    values = flatten(recipe)
    for key in all_keys().values():
        value = values[key.name]
        if value is None:
            continue
        if key.choices and value not in key.choices:
            meant = nearest(value, key.choices)
            fix = f"did you mean {meant}" if meant else f"use {either(key.choices)}"
            yield Problem((key.name,), f"{key.name}={value} is not one of {', '.join(key.choices)}; {fix}")
        numbers = value if key.type == list[float] else [value] if key.type in (int, float) else []
        for number in numbers:
            if not math.isfinite(number):
                yield Problem((key.name,), f"{key.name}={number} must be finite")
            elif key.at_least is not None and number < key.at_least:
                yield Problem((key.name,), f"{key.name}={number} must be at least {key.at_least:g}")


def _heads(recipe: Recipe) -> Iterator[Problem]:
    m = recipe.model
    if m.size is not None:
        return  # the size's own shape counts
    if m.dim % m.num_heads:
        good = [h for h in divisors(m.dim) if not (m.dim // h) % 2]
        yield Problem(
            ("model.num_heads", "model.dim"),
            f"model.num_heads={m.num_heads} must divide model.dim={m.dim}; {nearest_values(m.num_heads, good)}",
        )
        return
    heads = m.num_kv_heads or m.num_heads
    if m.num_heads % heads:
        yield Problem(
            ("model.num_kv_heads", "model.num_heads"),
            f"model.num_kv_heads={heads} must divide model.num_heads={m.num_heads}; "
            f"{nearest_values(heads, divisors(m.num_heads))}",
        )
    # RoPE turns pairs of channels, and each axis needs a pair of its own.
    axes = m.rope_axes if m.rope == "axial" else 1
    width = m.dim // m.num_heads
    if width % 2 or width < 2 * axes:
        good = [h for h in divisors(m.dim) if not (m.dim // h) % 2 and m.dim // h >= 2 * axes]
        yield Problem(
            ("model.num_heads", "model.dim", "model.rope", "model.rope_axes"),
            f"model.dim={m.dim} with model.num_heads={m.num_heads} gives heads of {width} channels, but model.rope="
            f"{m.rope} turns pairs of channels, at least {axes}; "
            + (nearest_values(m.num_heads, good) + " heads" if good else f"make model.dim a multiple of {2 * axes}"),
        )


def _rope_axes(recipe: Recipe) -> Iterator[Problem]:
    m = recipe.model
    if m.rope == "axial" and m.rope_axes not in (2, 3):
        yield Problem(
            ("model.rope_axes",), f"model.rope_axes={m.rope_axes} must be 2 (row, column) or 3 (frame, row, column)"
        )
    if m.rope == "raster" and m.rope_axes != 2:
        yield Problem(
            ("model.rope_axes", "model.rope"),
            f"model.rope_axes={m.rope_axes} has no effect with model.rope=raster; remove it or set model.rope=axial",
        )


def _conditions(recipe: Recipe) -> Iterator[Problem]:
    m = recipe.model
    if m.text_dim and m.num_classes:
        yield Problem(
            ("model.num_classes", "model.text_dim"),
            f"model.num_classes={m.num_classes} and model.text_dim={m.text_dim} exclude each other; "
            "set model.text_dim=0 for a class-conditional model or model.num_classes=0 for a text-conditioned one",
        )
    elif m.num_classes:
        for prompt in recipe.sample.prompts:
            if not (prompt.isdecimal() and int(prompt) < m.num_classes):
                yield Problem(
                    ("sample.prompts", "model.num_classes"),
                    f"sample.prompts holds {prompt!r}, but the prompts of a class-conditional model are class ids from "
                    f"0 to {m.num_classes - 1}",
                )
    drop = recipe.flow.caption_dropout
    if not 0 <= drop < 1:
        yield Problem(("flow.caption_dropout",), f"flow.caption_dropout={drop:g} must be a share from 0 to below 1")


def _modalities(recipe: Recipe) -> Iterator[Problem]:
    modalities = recipe.model.modalities
    if not modalities:
        yield Problem(("model.modalities",), "model.modalities is empty; name at least one, as {image: 4}")
        return
    for name, channels in modalities.items():
        if channels < 1:
            yield Problem(("model.modalities",), f"model.modalities.{name}={channels} must be at least 1 channel")
    asked = recipe.sample.modality
    if asked not in modalities:
        meant = nearest(asked, modalities) or next(iter(modalities))
        yield Problem(
            ("sample.modality", "model.modalities"),
            f"sample.modality={asked} is not in model.modalities ({', '.join(modalities)}); use {meant}",
        )
    elif recipe.sample.guidance_channels > modalities[asked]:
        yield Problem(
            ("sample.guidance_channels", "model.modalities"),
            f"sample.guidance_channels={recipe.sample.guidance_channels} is more than the {modalities[asked]} channels "
            f"of {asked}; use 0 for all",
        )


def _codec(recipe: Recipe) -> Iterator[Problem]:
    c = recipe.codec
    if c.kind == "diffusers" and not c.path:
        yield Problem(
            ("codec.path", "codec.kind"), "codec.kind=diffusers needs codec.path, the local folder of an autoencoder"
        )
    if c.kind != "diffusers" and c.path:
        yield Problem(
            ("codec.path", "codec.kind"),
            f"codec.path={c.path} has no effect with codec.kind={c.kind}; set codec.kind=diffusers or remove it",
        )
    if c.kind in ("haar", "dct") and c.factor not in FACTORS:
        yield Problem(("codec.factor",), f"codec.factor={c.factor} must be 2, 4 or 8")
    factor = _codec_factor(recipe)
    pictures = [m for m in recipe.model.modalities if m != "audio"]
    for name in pictures if factor else []:
        channels, given = COLOURS * factor * factor, recipe.model.modalities[name]
        if channels != given and given > 0:
            shape = f"codec.kind={c.kind}" + (f" with codec.factor={factor}" if factor > 1 else "")
            yield Problem(
                ("model.modalities", "codec.kind", "codec.factor"),
                f"model.modalities.{name}={given}, but {shape} makes latents of {channels} channels; "
                f"set model.modalities={{{name}: {channels}}}",
            )


def _audio(recipe: Recipe) -> Iterator[Problem]:
    a, channels = recipe.audio, recipe.model.modalities.get("audio")
    if a.hop > a.window // 2:
        yield Problem(
            ("audio.hop", "audio.window"),
            f"audio.hop={a.hop} must be at most half of audio.window={a.window}; try {max(a.window // 4, 1)}",
        )
    if channels is None or a.path:
        return
    if channels != 1:
        yield Problem(
            ("model.modalities", "audio.path"),
            f"model.modalities.audio={channels}, but mel spectrograms have 1 channel; set it to 1, or audio.path",
        )
    if a.mels % recipe.model.patch_size:
        patch = recipe.model.patch_size
        near = [n for n in (a.mels // patch * patch, (a.mels // patch + 1) * patch) if n]
        yield Problem(
            ("audio.mels", "model.patch_size"),
            f"audio.mels={a.mels} must be a multiple of model.patch_size={patch}; try {' or '.join(map(str, near))}",
        )


def _sets(recipe: Recipe) -> Iterator[Problem]:
    for folder, weight in recipe.data.sets.items():
        if not (math.isfinite(weight) and weight > 0):
            yield Problem(
                ("data.sets",),
                f"data.sets gives {folder} the weight {weight:g}; weights are more than 0: leave it out instead",
            )


def _text(recipe: Recipe) -> Iterator[Problem]:
    t = recipe.text
    if t.kind == "transformers" and not t.path:
        yield Problem(
            ("text.path", "text.kind"), "text.kind=transformers needs text.path, the local folder of a text encoder"
        )
    if t.kind != "transformers" and t.path:
        yield Problem(
            ("text.path", "text.kind"),
            f"text.path={t.path} has no effect with text.kind={t.kind}; set text.kind=transformers or remove it",
        )
    if t.prompt_template.count("{}") != 1:
        yield Problem(
            ("text.prompt_template",),
            f"text.prompt_template={t.prompt_template!r} must hold {{}} once, in the caption's place",
        )


def _batch(recipe: Recipe) -> Iterator[Problem]:
    n, parts = recipe.data.batch_size, recipe.train.accumulation
    if n % parts:
        yield Problem(
            ("train.accumulation", "data.batch_size"),
            f"train.accumulation={parts} must divide data.batch_size={n}; {nearest_values(parts, divisors(n))}",
        )
    if recipe.data.max_bad_samples > 1:
        yield Problem(
            ("data.max_bad_samples",), f"data.max_bad_samples={recipe.data.max_bad_samples:g} must be a share up to 1"
        )


def _schedule(recipe: Recipe) -> Iterator[Problem]:
    o, steps = recipe.optimizer, recipe.train.steps
    if o.warmup_steps > steps:
        yield Problem(
            ("optimizer.warmup_steps", "train.steps"),
            f"optimizer.warmup_steps={o.warmup_steps} is more than train.steps={steps}; try {max(steps // 10, 1)}",
        )
    elif o.schedule == "wsd" and o.decay_steps < 1:
        yield Problem(
            ("optimizer.decay_steps", "optimizer.schedule"),
            f"optimizer.schedule=wsd needs optimizer.decay_steps, at least 1; try {max(steps // 5, 1)}",
        )
    elif o.schedule == "wsd" and o.warmup_steps + o.decay_steps > steps:
        most = steps - o.warmup_steps
        yield Problem(
            ("optimizer.decay_steps", "optimizer.warmup_steps", "train.steps"),
            f"optimizer.warmup_steps={o.warmup_steps} and optimizer.decay_steps={o.decay_steps} do not fit into "
            f"train.steps={steps}; " + (f"make decay_steps at most {most}" if most else "shorten the warm-up"),
        )
    if o.final_lr > 1:
        yield Problem(("optimizer.final_lr",), f"optimizer.final_lr={o.final_lr:g} must be a share of the peak up to 1")


def _rates(recipe: Recipe) -> Iterator[Problem]:
    betas, decays = recipe.optimizer.betas, recipe.train.ema_decays
    if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        yield Problem(("optimizer.betas",), f"optimizer.betas={betas} must be two rates from 0 to below 1")
    if not all(0 <= d < 1 for d in decays):
        yield Problem(("train.ema_decays",), f"train.ema_decays={decays} must be decays from 0 to below 1")
    elif len(set(decays)) < len(decays):
        yield Problem(("train.ema_decays",), f"train.ema_decays={decays} names a decay twice")
    elif recipe.sample.ema >= max(len(decays), 1):
        last = len(decays) - 1
        valid = "-1 for the raw weights" if last < 0 else f"0 to {last}, or -1 for the raw weights"
        yield Problem(
            ("sample.ema", "train.ema_decays"),
            f"sample.ema={recipe.sample.ema} is not among the {len(decays)} train.ema_decays; use {valid}",
        )


def _validation(recipe: Recipe) -> Iterator[Problem]:
    times = recipe.validation.timesteps
    if not times or not all(0 <= t < 1 for t in times):
        yield Problem(("validation.timesteps",), f"validation.timesteps={times} must be times from 0 to below 1")


def _grids(recipe: Recipe) -> Iterator[Problem]:
    if recipe.sample.every and not recipe.sample.prompts:
        yield Problem(
            ("sample.prompts", "sample.every"),
            f"sample.every={recipe.sample.every} asks for picture grids, and sample.prompts is empty; name some "
            "prompts or set sample.every=0",
        )


def _positive(recipe: Recipe) -> Iterator[Problem]:
    values = flatten(recipe)
    names = ["flow.shift", "sample.shift"]
    if recipe.sample.solver == "dopri5":
        names += ["sample.rtol", "sample.atol"]
    for name in names:
        if not values[name] > 0:
            yield Problem((name,), f"{name}={values[name]:g} must be more than 0")


def _sample_size(recipe: Recipe) -> Iterator[Problem]:
    for name, size in (("train_size", recipe.sample.train_size), ("size", recipe.sample.size)):
        try:
            width, height = parse_size(size) if size is not None else (0, 0)
        except RecipeError as error:
            yield Problem((f"sample.{name}",), f"sample.{name}={error}".rstrip("."))
            return
    factor = _codec_factor(recipe)
    if not factor or recipe.sample.modality == "audio":
        return
    unit = factor * recipe.model.patch_size
    if width % unit or height % unit:
        because = f"model.patch_size={recipe.model.patch_size}" + (f" · codec.factor={factor}" if factor > 1 else "")
        yield Problem(
            ("sample.size", "model.patch_size", "codec.factor", "codec.kind"),
            f"sample.size={recipe.sample.size} must be a multiple of {unit} pixels ({because}); "
            f"try {sizes_near(width, height, unit)}",
        )


def _name(recipe: Recipe) -> Iterator[Problem]:
    if recipe.name in ("", ".", "..") or "/" in recipe.name or "\0" in recipe.name:
        yield Problem(
            ("name",), f"name={recipe.name!r} must be the name of one folder; run_dir says where that folder is"
        )


def _codec_factor(recipe: Recipe) -> int:
    """Pixels per latent of the built-in codecs; 0 where only the autoencoder's folder can tell."""
    c = recipe.codec
    if c.kind == "pixels":
        return 1
    return c.factor if c.kind in ("haar", "dct") and c.factor in FACTORS else 0


RULES: tuple[Callable[[Recipe], Iterator[Problem]], ...] = (
    _name,
    _heads,
    _rope_axes,
    _conditions,
    _modalities,
    _codec,
    _audio,
    _sets,
    _text,
    _batch,
    parallel_problems,
    _schedule,
    _rates,
    _validation,
    _grids,
    _positive,
    _sample_size,
    guidance_problems,
    start_problems,
    checkpoint_problems,
)
