"""Which codec a recipe uses for which modality."""

from __future__ import annotations

from typing import Any

from flagdit.codecs.audio import MelCodec, mel_spec
from flagdit.codecs.latents import Codec, build_codec, codec_spec
from flagdit.config.schema import Recipe


def codec_for(recipe: Recipe, modality: str) -> Codec:
    """The codec of a modality, on the CPU: `audio` for sound, `codec` for all that is pictures.

    Raises:
        RecipeError: it cannot be built; see `build_codec` and `MelCodec`.
    """
    return MelCodec(recipe.audio) if modality == "audio" else build_codec(recipe.codec)


def codec_spec_for(recipe: Recipe, modality: str) -> dict[str, Any]:
    """`codec_for(recipe, modality).spec()` without loading weights.

    Raises:
        RecipeError: as `codec_for`, but weights are not looked at.
    """
    return mel_spec(recipe.audio) if modality == "audio" else codec_spec(recipe.codec)
