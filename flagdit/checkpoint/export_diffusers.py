"""Folders that `DiffusionPipeline.from_pretrained` opens.

A network that diffusers has (Next-DiT as the official code builds it) becomes a folder of its stock LuminaPipeline.
Every other one comes with its modelling file and pipeline, which are copies of `standalone/`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flagdit.checkpoint import next_dit_diffusers
from flagdit.checkpoint.card import Card
from flagdit.checkpoint.lumina_config import obstacles
from flagdit.checkpoint.safetensors_files import Advance, write_sharded
from flagdit.checkpoint.tensors import TensorSource
from flagdit.codecs.folders import model_folder, read_config
from flagdit.codecs.text import text_folder
from flagdit.config.schema import Recipe
from flagdit.config.validate import parse_size
from flagdit.errors import RecipeError

STANDALONE = Path(__file__).parent / "standalone"
MODELLING, PIPELINE = "modeling_flag_dit", "pipeline"
OWN_CLASS, OWN_PIPELINE, STOCK_PIPELINE = "FlagDiTTransformer", "FlagDiTPipeline", "LuminaPipeline"
VERSION = "0.33.0"
"""The oldest diffusers that reads these folders; a fixed text, so that exports do not depend on what is installed."""
CONFIG_KEYS = {"nextline": "has_nextline", "nextframe": "has_nextframe"}
"""Keys of the network that the modelling file calls otherwise: diffusers lets no parameter have the name of a key."""
LATENT_FACTOR = 8
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json")


def write(
    folder: Path,
    recipe: Recipe,
    tensors: TensorSource,
    network: Mapping[str, Any],
    most_bytes: int,
    encoders: bool,
    advance: Advance,
) -> tuple[Card, dict[str, dict[str, Any]]]:
    """Writes all but card and manifest.

    Args:
        folder: to fill.
        recipe: of the run.
        tensors: of the plain model.
        network: its configuration.
        most_bytes: largest file of weights.
        encoders: copy the autoencoder and the text encoder.
        advance: told about progress.

    Returns:
        What the card has to say, and size and hash of the files of weights.

    Raises:
        RecipeError: encoders to copy that are not on this machine.
    """
    why = not_stock(recipe)
    (folder / "transformer").mkdir()
    if why:
        config: dict[str, Any] = {"_class_name": OWN_CLASS, **renamed(network, CONFIG_KEYS)}
        shutil.copyfile(STANDALONE / f"{MODELLING}.py", folder / "transformer" / f"{MODELLING}.py")
        shutil.copyfile(STANDALONE / f"{PIPELINE}.py", folder / f"{PIPELINE}.py")
    else:
        tensors = next_dit_diffusers.as_diffusers(tensors, recipe.model)
        config = next_dit_diffusers.diffusers_config(recipe.model, _side(recipe) // LATENT_FACTOR)
    config["_diffusers_version"] = VERSION
    _write_json(folder / "transformer" / "config.json", config)
    records = write_sharded(folder / "transformer", next_dit_diffusers.STEM, tensors, most_bytes, advance)
    index = _own_index(recipe) if why else _stock_index(folder, recipe)
    index |= _vae(folder, recipe, encoders) | _text(folder, recipe, encoders)
    _write_json(folder / "model_index.json", index)
    return _card(why, index), {f"transformer/{name}": entry for name, entry in records.items()}


def renamed(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The same values with some keys called otherwise."""
    return {names.get(key, key): value for key, value in config.items()}


def not_stock(recipe: Recipe) -> list[str]:
    """Why diffusers' own LuminaPipeline cannot run this model as it was trained; none: it can."""
    model, text = recipe.model, recipe.text
    if model.block != "next" or not model.text_dim:
        return ["diffusers has no Flag-DiT and no Next-DiT without text"]
    reasons = obstacles(model)
    if recipe.codec.kind != "diffusers":
        reasons.append(f"codec.kind is {recipe.codec.kind}, LuminaPipeline wants an AutoencoderKL")
    if (text.kind, text.layer, text.prompt_template) != ("transformers", -2, "{}"):
        reasons.append("LuminaPipeline reads layer -2 of a text encoder, without a template around the prompt")
    return reasons


def _stock_index(folder: Path, recipe: Recipe) -> dict[str, Any]:
    (folder / "scheduler").mkdir()
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": VERSION}
    _write_json(
        folder / "scheduler" / "scheduler_config.json",
        scheduler | {"num_train_timesteps": 1000, "shift": recipe.sample.shift},
    )
    return {
        "_class_name": STOCK_PIPELINE,
        "_diffusers_version": VERSION,
        "_trained_size": list(parse_size(recipe.sample.size)),
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "transformer": ["diffusers", next_dit_diffusers.CLASS],
    }


def _own_index(recipe: Recipe) -> dict[str, Any]:
    s, c, t = recipe.sample, recipe.codec, recipe.text
    width, height = parse_size(s.size)
    factor = {"pixels": 1, "haar": c.factor, "dct": c.factor}.get(c.kind)
    return {
        "_class_name": [PIPELINE, OWN_PIPELINE],
        "_diffusers_version": VERSION,
        "transformer": [MODELLING, OWN_CLASS],
        "codec": c.kind,
        "codec_factor": factor or _vae_factor(recipe),
        "prompt_template": t.prompt_template,
        "max_text_tokens": t.max_length,
        "text_layer": t.layer,
        "modality": s.modality,
        "width": width,
        "height": height,
        "num_frames": s.frames,
        # The pipeline has no adaptive solver; midpoint is the one of the same order of quality at few steps.
        "solver": "midpoint" if s.solver == "dopri5" else s.solver,
        "num_steps": s.steps,
        "shift": s.shift,
        "guidance_scale": s.guidance,
        "guidance_channels": s.guidance_channels,
    }


def _vae_factor(recipe: Recipe) -> int:
    """Pixels per latent of the autoencoder, as its configuration says; 8 where it is not on this machine."""
    try:
        config = read_config(model_folder(recipe.codec.path, "codec.path", "a diffusers autoencoder"), "codec.path")
    except RecipeError:
        return LATENT_FACTOR
    blocks = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    return 2 ** (len(blocks) - 1) if blocks else LATENT_FACTOR


def _vae(folder: Path, recipe: Recipe, copy: bool) -> dict[str, Any]:
    """The autoencoder's line of the index; a copy of it, if wanted."""
    if recipe.codec.kind != "diffusers" or not copy:
        return {"vae": [None, None]}
    source = model_folder(recipe.codec.path, "codec.path", "a diffusers autoencoder")
    _copy(source, folder / "vae", ("config.json", *WEIGHTS))
    return {"vae": ["diffusers", read_config(source, "codec.path")["_class_name"]]}


def _text(folder: Path, recipe: Recipe, copy: bool) -> dict[str, Any]:
    """The text encoder's and the tokenizer's lines of the index; copies of them, if wanted."""
    if not recipe.model.text_dim or not copy:
        return {"text_encoder": [None, None], "tokenizer": [None, None]}
    import transformers

    source = text_folder(recipe.text)
    config: Any = transformers.AutoConfig.from_pretrained(source, local_files_only=True)
    classes: Any = transformers.MODEL_FOR_TEXT_ENCODING_MAPPING
    if type(config) not in classes:
        classes = transformers.MODEL_MAPPING
    name = "CLIPTextModel" if config.model_type == "clip" else classes[type(config)].__name__
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
    _copy(source, folder / "text_encoder", ("config.json", *WEIGHTS))
    _copy(source, folder / "tokenizer", TOKENIZER)
    return {"text_encoder": ["transformers", name], "tokenizer": ["transformers", type(tokenizer).__name__]}


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    target.mkdir()
    files = {p for pattern in patterns for p in source.glob(pattern) if p.is_file()}
    if not any(p.suffix == ".safetensors" for p in files) and WEIGHTS[0] in patterns:
        raise RecipeError(
            f"{source} has no safetensors weights, and pickled ones are not passed on",
            fix="Convert them (save_pretrained does), or export with --no-encoders.",
        )
    for path in sorted(files):
        shutil.copyfile(path, target / path.name)


def _side(recipe: Recipe) -> int:
    width, height = parse_size(recipe.sample.size)
    return round((width * height) ** 0.5)


def _card(why: list[str], index: Mapping[str, Any]) -> Card:
    arguments = ", custom_pipeline=FOLDER, trust_remote_code=True" if why else ""
    load = f"pipe = DiffusionPipeline.from_pretrained(FOLDER{arguments})"
    use = f"```python\nfrom diffusers import DiffusionPipeline\n\n{load}\n```"
    absent = [name for name in ("vae", "text_encoder", "tokenizer") if index[name] == [None, None]]
    if index.get("codec") in ("pixels", "haar", "dct"):
        absent.remove("vae")
    if absent:
        use += (
            f"\n\nNot in the folder: {', '.join(absent)}; pass them to from_pretrained (None for what you do without)."
        )
    notes = []
    if why:
        notes.append(f"The folder has its own code because {'; '.join(why)}.")
    else:
        notes.append(
            "LuminaPipeline guides the first three latent channels only, as the official code does, and scales "
            "positions where width × height is not the square of its default side."
        )
    title = f"diffusers folder of {OWN_PIPELINE if why else STOCK_PIPELINE}"
    return Card("diffusers", title, "example_diffusers.py", use, tuple(notes))


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
