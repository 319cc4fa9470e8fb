"""Any folder of weights, opened as the tensors of the plain model: runs, official checkpoints, diffusers, exports."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from flagdit.checkpoint import next_dit_diffusers
from flagdit.checkpoint.export import CLASS, CONFIG, MANIFEST, STEM, record
from flagdit.checkpoint.export_diffusers import CONFIG_KEYS, OWN_CLASS, renamed
from flagdit.checkpoint.lumina import compare, expected_shapes, from_official
from flagdit.checkpoint.lumina_config import VAES, infer_config
from flagdit.checkpoint.lumina_files import ARGUMENTS, FILE, open_official
from flagdit.checkpoint.pth import read_namespace
from flagdit.checkpoint.safetensors_files import open_sharded
from flagdit.checkpoint.tensors import TensorSource
from flagdit.checkpoint.weights import open_weights
from flagdit.config.load import load_recipe
from flagdit.config.schema import CodecConfig, ModelConfig, Recipe, SampleConfig, TextConfig
from flagdit.errors import CheckpointError

RUN, LUMINA, PLAIN = "run", "lumina", "safetensors"
LUMINA_NEXT, OWN = "diffusers LuminaNextDiT2DModel", "diffusers FlagDiT"
GEMMA, LLAMA = "google/gemma-2b", "meta-llama/Llama-2-7b-hf"


@dataclass(frozen=True)
class Opened:
    """Weights of any format.

    Attributes:
        kind: RUN, LUMINA, LUMINA_NEXT, OWN or PLAIN.
        recipe: of the run; for others the one beside the weights, or what is known of how they were trained.
        tensors: parameters of the plain model.
        step: optimizer steps, 0 where nobody knows.
        group: which weights: `model`, an average, or what the format calls them.
    """

    kind: str
    recipe: Recipe
    tensors: TensorSource
    step: int
    group: str


def open_any(path: Path, *, weights: str | None = None, step: int | None = None, heads: int | None = None) -> Opened:
    """Opens a folder of weights, whatever its format.

    Args:
        path: the folder.
        weights: ema or raw, where there are both; None: the average if there is one.
        step: of a run's checkpoint; None: the newest.
        heads: query heads of an official network without text; None: 32.

    Raises:
        CheckpointError: nothing known is in the folder, or it is damaged, or it does not fit its own configuration.
    """
    if not path.is_dir():
        raise CheckpointError(f"there is no folder {path}", fix="Give a run folder, or a folder of weights.")
    if (path / "checkpoints").is_dir():
        found = open_weights(path, step=step, ema=-1 if weights == "raw" else None)
        return Opened(RUN, found.recipe, found.tensors, found.step, found.group)
    step = _verify(path)
    if any(FILE.fullmatch(p.name) for p in path.iterdir()):
        return _official(path, weights, heads, step)
    inner = path / "transformer" if (path / "transformer" / CONFIG).is_file() else path
    config = _read_json(inner / CONFIG)
    openers: dict[Any, Callable[[Path, Path, Mapping[str, Any], int], Opened]] = {
        next_dit_diffusers.CLASS: _lumina_next,
        OWN_CLASS: _own_diffusers,
        CLASS: _plain,
    }
    name = config.get("_class_name")
    if name not in openers:
        known = ", ".join(openers)
        raise CheckpointError(
            f"its {CONFIG} names the class {name!r}; only {known} and official checkpoints (consolidated.*) are known",
            where=str(path),
        )
    opened = openers[name](path, inner, config, step)
    compare(opened.tensors.entries, expected_shapes(opened.recipe.model))
    return opened


def _official(path: Path, weights: str | None, heads: int | None, step: int) -> Opened:
    arguments = read_namespace(path / ARGUMENTS) if (path / ARGUMENTS).is_file() else {}
    whole = open_official(path, weights)
    cfg = infer_config(whole.entries, arguments, heads)
    beside = path / "recipe.yaml"
    recipe = _trained(load_recipe(beside), cfg) if beside.is_file() else _official_recipe(cfg, arguments)
    steps = path / "resume_step.txt"
    if steps.is_file() and (text := steps.read_text().strip()).isdecimal():
        step = int(text)
    return Opened(LUMINA, recipe, from_official(whole, cfg), step, "model")


def _lumina_next(path: Path, inner: Path, config: Mapping[str, Any], step: int) -> Opened:
    source = open_sharded(inner, next_dit_diffusers.STEM)
    cfg = next_dit_diffusers.model_config(config, source)
    beside = path / "recipe.yaml"
    recipe = _trained(load_recipe(beside), cfg) if beside.is_file() else _official_recipe(cfg, {})
    if not beside.is_file() and (path / "vae" / CONFIG).is_file():
        recipe = replace(recipe, codec=replace(recipe.codec, path=str(path / "vae")))
    return Opened(LUMINA_NEXT, recipe, next_dit_diffusers.from_diffusers(source, cfg), step, "model")


def _own_diffusers(path: Path, inner: Path, config: Mapping[str, Any], step: int) -> Opened:
    config = renamed(config, {theirs: ours for ours, theirs in CONFIG_KEYS.items()})
    return Opened(OWN, _recipe_beside(path, config), open_sharded(inner, next_dit_diffusers.STEM), step, "model")


def _plain(path: Path, inner: Path, config: Mapping[str, Any], step: int) -> Opened:
    return Opened(PLAIN, _recipe_beside(path, config), open_sharded(inner, STEM), step, "model")


def _recipe_beside(path: Path, config: Mapping[str, Any]) -> Recipe:
    """The recipe of an export, with the network that its config.json describes."""
    names = {f.name for f in fields(ModelConfig)}
    try:
        cfg = ModelConfig(**{key: value for key, value in config.items() if key in names})
        expected_shapes(cfg)
    except (TypeError, AssertionError, ValueError) as error:
        raise CheckpointError(f"its {CONFIG} describes no network: {error}", where=str(path)) from error
    beside = path / "recipe.yaml"
    return _trained(load_recipe(beside), cfg) if beside.is_file() else replace(Recipe(), model=cfg)


def _trained(recipe: Recipe, cfg: ModelConfig) -> Recipe:
    """A recipe for these weights and this network: what an export holds is one set of weights, without averages."""
    train = replace(recipe.train, ema_decays=[])
    return replace(recipe, model=cfg, train=train, sample=replace(recipe.sample, ema=0))


def _official_recipe(cfg: ModelConfig, arguments: Mapping[str, Any]) -> Recipe:
    """How the official code trains and samples such a network. Encoders are hub names until somebody gives folders."""
    is_next = cfg.block == "next"
    side = arguments.get("image_size")
    side = side if isinstance(side, int) else 1024 if cfg.text_dim else 256
    text = TextConfig()
    if cfg.text_dim:
        encoder = arguments.get("lm") or (GEMMA if is_next else LLAMA)
        text = TextConfig("transformers", str(encoder), max_length=256, layer=-2 if is_next else -1)
    sample = SampleConfig(
        size=f"{side}x{side}",
        solver="midpoint" if is_next else "euler",
        steps=30,
        shift=4.0 if is_next and cfg.text_dim else 1.0,
        guidance_channels=min(3, next(iter(cfg.modalities.values()))),
    )
    recipe = Recipe()
    return replace(
        recipe,
        name="imported",
        model=cfg,
        codec=CodecConfig("diffusers", VAES.get(str(arguments.get("vae")), VAES["sdxl" if is_next else "ema"])),
        text=text,
        flow=replace(recipe.flow, timesteps="uniform" if arguments.get("snr_type") == "uniform" else "logit_normal"),
        train=replace(recipe.train, ema_decays=[]),
        sample=sample,
    )


def _verify(path: Path) -> int:
    """Compares an export's weights and configuration with its manifest, where there is one.

    Returns:
        Optimizer steps of the weights; 0 without a manifest.

    Raises:
        CheckpointError: lists the files that are missing or changed.
    """
    if not (path / MANIFEST).is_file():
        return 0
    manifest = _read_json(path / MANIFEST)
    files, step = manifest.get("files"), manifest.get("step")
    if not isinstance(files, dict) or not isinstance(step, int):
        raise CheckpointError("it is not a manifest of an export", where=str(path / MANIFEST))
    faults: list[str] = []
    for name, entry in files.items():
        if Path(name).suffix not in (".safetensors", ".json", ".pth", ".yaml"):
            continue
        file = path / name
        if not file.is_file():
            faults.append(f"{name} is missing")
        elif record(file) != entry:
            faults.append(f"{name} has changed")
    if faults:
        raise CheckpointError(
            f"the folder is not as it was exported: {'; '.join(faults)}",
            where=str(path),
            fix=f"Copy it again; if a change was meant, remove {MANIFEST}.",
        )
    return step


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"there is neither a run, nor {CONFIG}, nor consolidated.00-of-NN in it", where=str(file.parent)
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"it cannot be read: {error}", where=str(file)) from error
    if not isinstance(content, dict):
        raise CheckpointError("it is not a JSON object", where=str(file))
    return content
