"""From a run folder and prompts to pixels.

Shape legend
    C, F, H, W  channels, frames or views, rows, columns
    L, Y        tokens and width of text features
    S           samples of one pack
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from flagdit.batch import PackedText, Segment
from flagdit.checkpoint.weights import open_weights
from flagdit.codecs.audio import MelCodec
from flagdit.codecs.latents import Codec
from flagdit.codecs.modality import codec_for
from flagdit.codecs.text import TextEncoder, build_text_encoder
from flagdit.config.schema import Recipe, SampleConfig
from flagdit.config.validate import parse_size, sizes_near
from flagdit.errors import CheckpointError, RecipeError
from flagdit.flow.guidance import guided_velocity
from flagdit.flow.noise import draw_noise
from flagdit.flow.solver import integrate
from flagdit.model.attention_backends import choose_backend
from flagdit.model.flag_dit import FlagDiT, Inference
from flagdit.model.tokens import TokenSpec, modality_of, num_tokens, pack, unpack

Condition = str | int
"""What to make: a prompt, or a class id for class-conditioned models (its digits as text will do)."""


class Progress(Protocol):
    """Told after every solver step how many steps of the present pack are done and how many samples are finished."""

    def __call__(self, step: int, *, finished: int) -> None: ...


@dataclass
class Pipeline:
    """A model with all that it takes to sample from it.

    Attributes:
        model: on its device, in its compute dtype.
        recipe: of the run.
        codec: latents to pixels.
        text_encoder: None for models without text.
        null_text_LY: features of the empty prompt.
    """

    model: FlagDiT
    recipe: Recipe
    codec: Codec
    text_encoder: TextEncoder | None
    null_text_LY: Tensor | None

    @classmethod
    def build(cls, model: FlagDiT, recipe: Recipe) -> Pipeline:
        """Adds the recipe's codec and text encoder to a model.

        Raises:
            RecipeError: a folder of theirs is missing or of another kind, or what is in it does not suit the model.
        """
        device = next(model.parameters()).device
        codec = codec_for(recipe, recipe.sample.modality).to(device)
        channels = model.cfg.modalities.get(recipe.sample.modality, codec.channels)
        if channels != codec.channels:
            raise RecipeError(
                f"the codec makes latents of {codec.channels} channels, but model.modalities."
                f"{recipe.sample.modality}={channels}",
                fix="Use the codec that the model was trained with.",
            )
        if not model.cfg.text_dim:
            return cls(model, recipe, codec, None, None)
        encoder = build_text_encoder(recipe.text).to(device)
        if encoder.dim != model.cfg.text_dim:
            raise RecipeError(
                f"the text encoder's features are {encoder.dim} wide, but model.text_dim={model.cfg.text_dim}",
                fix="Use the text encoder that the model was trained with, or set model.text_dim.",
            )
        return cls(model, recipe, codec, encoder, encoder.encode([""])[0])

    def of(self, modality: str) -> Pipeline:
        """The same model with the codec of another modality.

        Raises:
            RecipeError: the model has no such modality, or its codec cannot be built.
        """
        if modality not in self.model.cfg.modalities:
            raise RecipeError(
                f"sample.modality={modality} is not one of this model's ({', '.join(self.model.cfg.modalities)})",
                fix="Sample one of those.",
            )
        device = next(self.model.parameters()).device
        return replace(self, codec=codec_for(self.recipe, modality).to(device))

    def generate(
        self,
        conditions: Sequence[Condition],
        cfg: SampleConfig,
        *,
        sizes: Sequence[tuple[int, int]] | None = None,
        first_id: int = 0,
        inference: Inference | None = None,
        pack_tokens: int = 16384,
        on_step: Progress | None = None,
    ) -> list[Tensor]:
        """Samples one picture, video or set of views per condition.

        A sample is a function of (cfg.seed, its id) and its condition, whatever is sampled beside it, up to rounding.

        Args:
            conditions: prompts, or class ids; models without conditions ignore them.
            cfg: size, solver, guidance and seed.
            sizes: (width, height) in pixels for each condition; None: cfg.size, or cfg.seconds of sound, for all.
            first_id: id of the first sample, the others follow; ids decide the noise.
            inference: settings of the model's forward.
            pack_tokens: most tokens of one pack, both halves of guidance counted.
            on_step: told about the solver's progress.

        Returns:
            Pixels (3, F, H, W) or sound (1, 1, 1, N) in [−1, 1], fp32 on the CPU, one per condition.

        Raises:
            RecipeError: a size, a number of frames or a condition that the model cannot make.
        """
        spec = TokenSpec.from_model(self.model.cfg)
        sizes = sizes or [self.default_size(cfg)] * len(conditions)
        shapes = [self.latent_shape(size, cfg.frames, cfg.modality) for size in sizes]
        segments = [Segment(first_id + i, cfg.modality, shape) for i, shape in enumerate(shapes)]
        halves = 1 if cfg.guidance == 1 else 2
        costs = [halves * num_tokens(s.shape, s.modality, spec) for s in segments]
        features, labels = self._features(conditions), self._labels(conditions)
        pixels: list[Tensor] = []
        for part in split(costs, pack_tokens):
            latents = self._sample(
                segments[part],
                None if features is None else PackedText.pack(features[part]),
                None if labels is None else labels[part],
                cfg,
                inference,
                None if on_step is None else partial(on_step, finished=len(pixels)),
            )
            pixels += [self.codec.decode(latent.float()).clamp(-1, 1).cpu() for latent in latents]
        return pixels

    def default_size(self, cfg: SampleConfig) -> tuple[int, int]:
        """(width, height) in pixels, or (samples, 1) of sound, as the configuration says."""
        if cfg.modality == "audio":
            return (round(cfg.seconds * self.recipe.audio.sample_rate), 1)
        return parse_size(cfg.size)

    def latent_shape(self, size: tuple[int, int], frames: int, modality: str) -> tuple[int, int, int, int]:
        """(C, F, H, W) of the latent for a size in pixels.

        Args:
            size: (width, height); for sound (samples, 1), which is rounded to what the model can make.

        Raises:
            RecipeError: the model has no such modality, it has no frames, or the size is not a multiple of codec factor
                × patch.
        """
        cfg = self.model.cfg
        if modality not in cfg.modalities:
            raise RecipeError(
                f"sample.modality={modality} is not one of this model's ({', '.join(cfg.modalities)})",
                fix="Sample one of those.",
            )
        if frames != 1 and not modality_of(modality).has_frames:
            raise RecipeError(f"sample.frames={frames} for {modality}, which has no frames", fix="Set it to 1.")
        step = self.codec.factor * cfg.patch_size
        width, height = size
        if isinstance(self.codec, MelCodec):
            return self.codec.latent_shape(width / self.recipe.audio.sample_rate, cfg.patch_size)
        if width % step or height % step:
            raise RecipeError(
                f"a size of {width}x{height} cannot be sampled: width and height must be multiples of {step} pixels "
                f"(codec factor {self.codec.factor} × model.patch_size {cfg.patch_size})",
                where="sample.size",
                fix=f"Try {sizes_near(width, height, step)}.",
            )
        return (cfg.modalities[modality], frames, height // self.codec.factor, width // self.codec.factor)

    def _features(self, conditions: Sequence[Condition]) -> list[Tensor] | None:
        """(L, Y) text features of every prompt; None for models without text."""
        if self.text_encoder is None:
            return None
        prompts = [c for c in conditions if isinstance(c, str)]
        if len(prompts) < len(conditions):
            raise RecipeError("this model follows prompts, not class ids", fix="Give --prompt instead of --label.")
        return self.text_encoder.encode(prompts)

    def _labels(self, conditions: Sequence[Condition]) -> list[int] | None:
        """Class ids; None for models without classes."""
        classes = self.model.cfg.num_classes
        if not classes:
            return None
        for c in conditions:
            if not str(c).isdecimal() or int(c) >= classes:
                raise RecipeError(
                    f"{c!r} is not a class id: this model follows class ids from 0 to {classes - 1}",
                    fix="Give --label with such an id.",
                )
        return [int(c) for c in conditions]

    # Not inference mode: what it makes may live on in caches that training shares.
    @torch.no_grad()
    def _sample(
        self,
        segments: Sequence[Segment],
        text: PackedText | None,
        labels: Sequence[int] | None,
        cfg: SampleConfig,
        inference: Inference | None,
        on_step: Callable[[int], None] | None,
    ) -> list[Tensor]:
        """Latents of one pack."""
        spec = TokenSpec.from_model(self.model.cfg)
        batch = pack(segments, None, spec, text=text, labels=labels).to(next(self.model.parameters()).device)
        velocity = guided_velocity(
            self.model,
            batch,
            scale=cfg.guidance,
            channels=cfg.guidance_channels,
            null_text_LY=self.null_text_LY,
            null_label=self.model.cfg.num_classes,
            inference=inference,
        )
        solution = integrate(
            velocity,
            draw_noise(batch, cfg.seed),
            solver=cfg.solver,
            steps=cfg.steps,
            shift=cfg.shift,
            rtol=cfg.rtol,
            atol=cfg.atol,
            on_step=on_step,
        )
        return unpack(solution.x, segments, spec)


def load_pipeline(
    run_dir: str | Path, *, step: int | None = None, ema: int | None = None, device: torch.device | str | None = None
) -> Pipeline:
    """The model of a run, ready to sample.

    Args:
        run_dir: the run folder.
        step: of the checkpoint; None: the newest.
        ema: which of train.ema_decays; −1: the raw weights; None: as the recipe's sample.ema says.
        device: None: as the recipe's train.device says, the CPU where there is no GPU.

    Raises:
        CheckpointError: no run, no checkpoint, or a damaged one.
        RecipeError: no such average, or a codec or text encoder that cannot be loaded.
    """
    found = open_weights(run_dir, step=step, ema=ema)
    recipe = found.recipe
    if device is None:
        device = "cuda" if torch.cuda.is_available() and recipe.train.device != "cpu" else "cpu"
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    # The training run may have forced kernels that this machine cannot run.
    kernels = "auto" if recipe.model.kernels == "triton" else recipe.model.kernels
    with torch.device("meta"):
        model = FlagDiT(replace(recipe.model, kernels=kernels))
    try:
        model.load_state_dict(dict(found.tensors.items()), assign=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights do not fit the recipe beside them: {error}",
            where=str(run_dir),
            fix="Restore the recipe.yaml that the run was trained with.",
        ) from None
    model = model.to(device, dtype).eval().requires_grad_(False)
    # The backend of the training run, if this machine has it.
    head_dim = model.cfg.dim // model.cfg.num_heads
    model.attention_backend = choose_backend(torch.device(device), dtype, head_dim, first=recipe.model.attention)
    return Pipeline.build(model, recipe)


def split(costs: Sequence[int], budget: int) -> list[slice]:
    """Neighbours together as long as they fit the budget; at least one each."""
    if not costs:
        return []
    parts, start, total = [], 0, 0
    for i, cost in enumerate(costs):
        if i > start and total + cost > budget:
            parts.append(slice(start, i))
            start, total = i, 0
        total += cost
    return [*parts, slice(start, len(costs))]
