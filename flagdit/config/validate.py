"""Rules that a recipe must keep, beyond types: allowed values, and keys that must fit each other.

Each rule is a small function that yields problems, so that a recipe's problems are reported all at once. Rules that
need to know a model size or a data set stand with those (`model/sizes.py`, `data_pipelines/`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from flagdit.config.schema import Recipe
from flagdit.errors import RecipeError


def validate(recipe: Recipe) -> None:
    """Checks a whole recipe.

    Raises:
        RecipeError: lists every problem.
    """
    problems = problems_of(recipe)
    if problems:
        raise RecipeError("\n".join(problems), where="recipe")


def problems_of(recipe: Recipe) -> list[str]:
    """Every broken rule, each with the key, its value and what to do."""
    problems = list(_values(recipe, ""))
    for rule in RULES:
        problems += rule(recipe)
    return problems


def nearest(value: int, allowed: list[int]) -> str:
    """The closest allowed values below and above, for messages: "4 or 8"."""
    below, above = [a for a in allowed if a < value], [a for a in allowed if a > value]
    return " or ".join(str(a) for a in (below[-1:] + above[:1])) or "another value"


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def parse_size(text: str) -> tuple[int, int]:
    """ "48x32" → (48, 32): width and height in pixels.

    Raises:
        RecipeError: not of that form.
    """
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise RecipeError(f"{text!r} is not a size", fix="Write WIDTHxHEIGHT in pixels, such as 48x32.")
    return int(width), int(height)


def _values(config: Any, prefix: str) -> Iterator[str]:
    """The rules that one value can be held to, from the schema's own metadata."""
    for f in dataclasses.fields(config):
        name, value = f"{prefix}{f.name}", getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from _values(value, f"{name}.")
            continue
        choices, at_least = f.metadata["choices"], f.metadata["at_least"]
        if choices and value not in choices:
            yield f"{name}={value} is not one of {', '.join(choices)}"
        if at_least is not None and value is not None and not value >= at_least:
            yield f"{name}={value} must be at least {at_least:g}"


def _model(recipe: Recipe) -> Iterator[str]:
    m = recipe.model
    if m.dim < 1 or m.num_heads < 1:
        return
    if m.dim % m.num_heads:
        near = nearest(m.num_heads, divisors(m.dim))
        yield f"model.num_heads={m.num_heads} must divide model.dim={m.dim}; try {near}"
    elif m.dim // m.num_heads % 2:
        yield (
            f"model.dim/num_heads = {m.dim // m.num_heads} must be even, for RoPE turns pairs; "
            f"try model.num_heads={nearest(m.num_heads, [d for d in divisors(m.dim) if m.dim // d % 2 == 0])}"
        )
    if m.num_kv_heads and m.num_heads % m.num_kv_heads:
        yield (
            f"model.num_kv_heads={m.num_kv_heads} must divide model.num_heads={m.num_heads}; "
            f"try {nearest(m.num_kv_heads, divisors(m.num_heads))}"
        )
    if m.text_dim and m.num_classes:
        yield (
            f"model.text_dim={m.text_dim} and model.num_classes={m.num_classes}: a model follows text or classes; "
            "set one of them to 0"
        )
    if not m.modalities:
        yield "model.modalities is empty; give at least one, such as {image: 4}"
    for name, channels in m.modalities.items():
        if channels < 1:
            yield f"model.modalities.{name}={channels} must be at least 1 (latent channels)"
    if m.rope == "axial" and m.rope_axes not in (2, 3):
        yield f"model.rope_axes={m.rope_axes} must be 2 (row, column) or 3 (frame, row, column)"
    if m.rope == "raster" and m.rope_axes != 1 and m.rope_axes != 2:
        yield f"model.rope_axes={m.rope_axes} has no meaning with model.rope=raster; leave it out"


def _flow(recipe: Recipe) -> Iterator[str]:
    f = recipe.flow
    if f.caption_dropout > 1:
        yield f"flow.caption_dropout={f.caption_dropout} is a share; it must be at most 1"
    if f.shift <= 0:
        yield f"flow.shift={f.shift} must be more than 0; 1 is no shift"


def _codec_and_text(recipe: Recipe) -> Iterator[str]:
    c, t = recipe.codec, recipe.text
    if c.kind == "diffusers" and not c.path:
        yield "codec.kind=diffusers needs codec.path, the local folder of the autoencoder"
    if c.kind in ("haar", "dct") and c.factor not in (2, 4, 8):
        yield f"codec.factor={c.factor} must be 2, 4 or 8"
    if c.kind != "diffusers" and c.path:
        yield f"codec.path={c.path} is only read with codec.kind=diffusers"
    if t.kind == "transformers" and not t.path:
        yield "text.kind=transformers needs text.path, the local folder of the model and its tokenizer"
    if t.kind != "transformers" and t.path:
        yield f"text.path={t.path} is only read with text.kind=transformers"
    if "{}" not in t.prompt_template:
        yield f"text.prompt_template={t.prompt_template!r} must contain {{}}, where the caption goes"


def _training(recipe: Recipe) -> Iterator[str]:
    t, o, d = recipe.train, recipe.optimizer, recipe.data
    if t.accumulation >= 1 and d.batch_size % t.accumulation:
        yield (
            f"train.accumulation={t.accumulation} must divide data.batch_size={d.batch_size}; "
            f"try {nearest(t.accumulation, divisors(d.batch_size))}"
        )
    if len(o.betas) != 2 or not all(0 <= b < 1 for b in o.betas):
        yield f"optimizer.betas={o.betas} must be two numbers from 0 to below 1"
    if o.warmup_steps > t.steps:
        yield f"optimizer.warmup_steps={o.warmup_steps} must be at most train.steps={t.steps}"
    if o.schedule == "wsd" and o.warmup_steps + o.decay_steps > t.steps:
        yield (
            f"optimizer.warmup_steps={o.warmup_steps} and decay_steps={o.decay_steps} do not fit in "
            f"train.steps={t.steps}; try optimizer.decay_steps={max(0, t.steps - o.warmup_steps)}"
        )
    if o.schedule != "wsd" and o.decay_steps:
        yield f"optimizer.decay_steps={o.decay_steps} is only read with optimizer.schedule=wsd"
    for decay in t.ema_decays:
        if not 0 <= decay < 1:
            yield f"train.ema_decays: {decay} must be from 0 to below 1"
    if len(set(t.ema_decays)) != len(t.ema_decays):
        yield f"train.ema_decays={t.ema_decays} names a decay twice"
    if d.max_bad_samples > 1:
        yield f"data.max_bad_samples={d.max_bad_samples} is a share; it must be at most 1"


def _validation(recipe: Recipe) -> Iterator[str]:
    v = recipe.validation
    if v.every and not v.timesteps:
        yield "validation.timesteps is empty; give at least one, such as [0.5]"
    for t in v.timesteps:
        if not 0 <= t < 1:
            yield f"validation.timesteps: {t} must be from 0 (noise) to below 1 (data)"


def _sample(recipe: Recipe) -> Iterator[str]:
    s, m, c = recipe.sample, recipe.model, recipe.codec
    if s.every and s.modality not in m.modalities:
        yield f"sample.modality={s.modality} is not among model.modalities ({', '.join(m.modalities)})"
    if s.every and not s.prompts and m.text_dim:
        yield f"sample.every={s.every} needs sample.prompts"
    if s.ema >= len(recipe.train.ema_decays):
        yield f"sample.ema={s.ema} counts train.ema_decays={recipe.train.ema_decays} from 0; -1 is the raw weights"
    if s.shift <= 0:
        yield f"sample.shift={s.shift} must be more than 0; 1 is no shift"
    channels = m.modalities.get(s.modality)
    if channels and s.guidance_channels > channels:
        yield f"sample.guidance_channels={s.guidance_channels} is more than model.modalities.{s.modality}={channels}"
    try:
        size = parse_size(s.size)
    except RecipeError as error:
        yield f"sample.size: {error}"
        return
    # An autoencoder's factor is not known before its folder is opened; sampling checks it then.
    step = {"pixels": 1, "haar": c.factor, "dct": c.factor}.get(c.kind, 1) * m.patch_size
    for axis, pixels in zip(("width", "height"), size, strict=True):
        if step >= 1 and pixels % step:
            near = " or ".join(str(n) for n in (pixels // step * step, (pixels // step + 1) * step) if n)
            yield f"sample.size={s.size}: the {axis} must be a multiple of {step} pixels (codec × patch); try {near}"


RULES = (_model, _flow, _codec_and_text, _training, _validation, _sample)
