"""A run's weights as a folder that other programs read without this framework.

The files are a function of the run's logical tensors, its recipe and the options alone: not of how the run was
distributed, nor of the machine or the day. A folder is written aside and put in place when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flagdit.checkpoint import export_diffusers, lumina_files
from flagdit.checkpoint.card import Card, write_card
from flagdit.checkpoint.durable import CHUNK
from flagdit.checkpoint.folders import STAGING
from flagdit.checkpoint.lumina import as_official, compare, expected_shapes
from flagdit.checkpoint.lumina_config import arguments_of, require_official
from flagdit.checkpoint.progress import progress
from flagdit.checkpoint.safetensors_files import write_sharded
from flagdit.checkpoint.tensors import DTYPES, TensorSource, cast
from flagdit.checkpoint.weights import Weights, open_weights
from flagdit.config.load import save_recipe
from flagdit.config.schema import LoraConfig, ModelConfig, ParallelConfig, Recipe
from flagdit.config.validate import parse_size
from flagdit.errors import CheckpointError, RecipeError
from flagdit.model.sizes import resolve

FORMATS = ("diffusers", "lumina", "safetensors")
MANIFEST, CONFIG, CLASS = "manifest.json", "config.json", "FlagDiT"
STEM = "model"
GB = 10**9
TRAINING_ONLY = ("size", "attention", "kernels", "checkpointing", "checkpoint_every")
"""Keys of the network that say nothing about its weights or what it computes."""


@dataclass(frozen=True)
class Options:
    """How to export.

    Attributes:
        dtype: fp32, bf16 or fp16; None: as stored.
        step, ema: which weights, as `open_weights` takes them.
        parts: model-parallel files of the lumina format.
        shard_gb: largest file, in GB.
        encoders: copy autoencoder and text encoder into a diffusers folder.
        licence: for the model card; "": none given.
    """

    dtype: str | None = "bf16"
    step: int | None = None
    ema: int | None = None
    parts: int = 1
    shard_gb: float = 5.0
    encoders: bool = True
    licence: str = ""


def export_run(run_dir: Path, out: Path, kind: str, options: Options) -> str:
    """Writes a run's weights as a folder of another format.

    Args:
        run_dir: the run.
        out: the folder; must not exist.
        kind: one of FORMATS.
        options: see there.

    Returns:
        What was written, for people.

    Raises:
        CheckpointError: no run, a format that has no such network, or a folder that exists or cannot be written.
        RecipeError: an unknown format or dtype, or encoders that are not there.
    """
    if kind not in FORMATS:
        raise RecipeError(f"--format {kind} is not known", fix=f"Use one of {', '.join(FORMATS)}.")
    if options.dtype not in (None, *DTYPES):
        raise RecipeError(f"--dtype {options.dtype} is not known", fix=f"Use one of {', '.join(DTYPES)}.")
    if out.exists():
        raise CheckpointError("the folder exists", where=str(out), fix="Choose another one, or remove it.")
    weights = open_weights(run_dir, step=options.step, ema=options.ema)
    compare(weights.tensors.entries, expected_shapes(weights.recipe.model))
    tensors = cast(weights.tensors, DTYPES[options.dtype] if options.dtype else None)
    write = {"diffusers": _diffusers, "lumina": _lumina, "safetensors": _safetensors}[kind]
    staging = out.with_name(f"{STAGING}{out.name}-{uuid.uuid4().hex[:8]}")
    try:
        staging.mkdir(parents=True)
        card, records = write(staging, weights, tensors, options)
        save_recipe(portable(weights.recipe), staging / "recipe.yaml")
        write_card(staging, card, weights, tensors, run_dir, options.licence)
        _write_manifest(staging, weights, records)
        os.rename(staging, out)
    except OSError as error:
        raise CheckpointError(f"the export cannot be written: {error.strerror or error}", where=str(out)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return f"{out}: {card.title}, {len(tensors.entries)} tensors, {tensors.nbytes / GB:.2f} GB"


def portable(recipe: Recipe) -> Recipe:
    """The recipe without what belongs to the machines that trained it, and with adapters merged."""
    return replace(
        recipe,
        run_dir=Recipe().run_dir,
        model=replace(recipe.model, attention="auto", kernels="auto", checkpointing="none", checkpoint_every=1),
        data=replace(recipe.data, workers=0, prefetch=2),
        train=replace(
            recipe.train,
            accumulation=1,
            device="auto",
            compile=False,
            deterministic=False,
            init_from=None,
            init_ema=None,
        ),
        lora=LoraConfig(),
        parallel=ParallelConfig(),
    )


def network(cfg: ModelConfig) -> dict[str, Any]:
    """The keys that say what a network is, with nothing left to fill in."""
    return {key: value for key, value in asdict(resolve(cfg)).items() if key not in TRAINING_ONLY}


Written = tuple[Card, dict[str, dict[str, Any]]]


def _safetensors(folder: Path, weights: Weights, tensors: TensorSource, options: Options) -> Written:
    with progress("exporting", tensors.nbytes) as advance:
        records = write_sharded(folder, STEM, tensors, int(options.shard_gb * GB), advance)
    config = {"_class_name": CLASS, **network(weights.recipe.model)}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    use = "The parameters of the network under this framework's names, as `config.json` describes it."
    return Card("safetensors", "safetensors", "example_tensors.py", use), records


def _lumina(folder: Path, weights: Weights, tensors: TensorSource, options: Options) -> Written:
    recipe = weights.recipe
    require_official(recipe.model, fix="Use --format diffusers or safetensors, which take every network.")
    official = as_official(tensors, recipe.model)
    stem = lumina_files.RAW if weights.group == "model" else lumina_files.EMA
    with progress("exporting", official.nbytes) as advance:
        records = lumina_files.write_official(folder, official, options.parts, stem, advance)
    width, height = parse_size(recipe.sample.size)
    side = round((width * height) ** 0.5)
    arguments = arguments_of(recipe.model, side, recipe.codec.path or "", recipe.text.path or "", options.parts)
    lumina_files.write_arguments(folder / lumina_files.ARGUMENTS, arguments)
    (folder / "resume_step.txt").write_text(f"{weights.step}\n")
    flag = "" if stem == lumina_files.RAW else " --ema"
    use = f"For the official Lumina-T2X code: `--ckpt` this folder{flag}, `--num_gpus {options.parts}`."
    return Card("lumina", f"official names in {options.parts} part(s)", "example_tensors.py", use), records


def _diffusers(folder: Path, weights: Weights, tensors: TensorSource, options: Options) -> Written:
    with progress("exporting", tensors.nbytes) as advance:
        return export_diffusers.write(
            folder, weights.recipe, tensors, network(weights.recipe.model), int(options.shard_gb * GB),
            options.encoders, advance,
        )  # fmt: skip


def _write_manifest(folder: Path, weights: Weights, known: Mapping[str, dict[str, Any]]) -> None:
    """Size and SHA-256 of every file; those of tensor files are known from writing them."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        files[name] = known[name] if name in known else record(path)
    manifest = {"format": 1, "step": weights.step, "weights": weights.group, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def record(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(CHUNK):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
