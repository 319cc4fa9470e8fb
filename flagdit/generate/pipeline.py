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
from typing import Protocol, cast

import torch
from torch import Tensor

from flagdit.batch import PackedBatch, PackedText, Segment
from flagdit.checkpoint.weights import open_weights
from flagdit.codecs.audio import MelCodec
from flagdit.codecs.latents import Codec
from flagdit.codecs.modality import codec_for
from flagdit.codecs.text import TextEncoder, build_text_encoder
from flagdit.config.schema import Recipe, SampleConfig
from flagdit.config.validate import parse_size, sizes_near
from flagdit.errors import CheckpointError, RecipeError
from flagdit.flow.guidance import guided_velocity
from flagdit.flow.solver import Velocity
from flagdit.generate.inference import InferenceAt, inference_for
from flagdit.generate.mesh import place
from flagdit.generate.solve import Start, solve
from flagdit.model.attention_backends import choose_backend, set_sizes
from flagdit.model.flag_dit import FlagDiT, Inference
from flagdit.model.tokens import TokenSpec, modality_of, num_tokens, pack, unpack
from flagdit.parallel.mesh import ParallelContext

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
        step: of the checkpoint; None where there is none.
    """

    model: FlagDiT
    recipe: Recipe
    codec: Codec
    text_encoder: TextEncoder | None
    null_text_LY: Tensor | None
    step: int | None = None

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
        self._check_modality(modality)
        if (modality == "audio") == isinstance(self.codec, MelCodec):
            return self
        device = next(self.model.parameters()).device
        return replace(self, codec=codec_for(self.recipe, modality).to(device))

    def generate(
        self,
        conditions: Sequence[Condition],
        cfg: SampleConfig,
        *,
        sizes: Sequence[tuple[int, int]] | None = None,
        first_id: int = 0,
        ids: Sequence[int] | None = None,
        inference: Inference | InferenceAt | None = None,
        start: Start | None = None,
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
            ids: of all samples, where they do not follow each other.
            inference: settings of the model's forward, or a function that gives those of a time; None: as cfg's
                train_size and scaling say.
            start: what to start from, one latent per condition; None: noise.
            pack_tokens: most tokens of one pack, both halves of guidance counted; sets that share attention stay whole.
            on_step: told about the solver's progress.

        Returns:
            Pixels (3, F, H, W) or sound (1, 1, 1, N) in [−1, 1], fp32 on the CPU, one per condition.

        Raises:
            RecipeError: a size, a number of frames or a condition that the model cannot make.
        """
        sizes = sizes or [self.default_size(cfg)] * len(conditions)
        shapes = [self.latent_shape(size, cfg.frames, cfg.modality) for size in sizes]
        ids = range(first_id, first_id + len(shapes)) if ids is None else ids
        segments = [Segment(i, cfg.modality, shape) for i, shape in zip(ids, shapes, strict=True)]
        inference = self.inference(cfg) if inference is None else inference
        features, labels = self.features(conditions), self.labels(conditions)
        pixels: list[Tensor] = []
        for part in self._parts(segments, cfg, pack_tokens, inference):
            batch = self.batch(segments[part], features and features[part], labels and labels[part])
            latents = self.solve(
                self.velocity(batch, cfg, inference),
                batch,
                cfg,
                start and start[part],
                None if on_step is None else partial(on_step, finished=len(pixels)),
            )
            pixels += [self.decode(latent) for latent in latents]
        return pixels

    def inference(self, cfg: SampleConfig) -> Inference:
        """The settings for sizes beyond `cfg.train_size`.

        Raises:
            RecipeError: a train_size that the model cannot make.
        """
        if cfg.train_size is None:
            return Inference()
        trained = self.latent_shape(parse_size(cfg.train_size), cfg.train_frames, cfg.modality)
        return inference_for(self.model.cfg, cfg, trained)

    def batch(
        self, segments: Sequence[Segment], features: Sequence[Tensor] | None, labels: Sequence[int] | None
    ) -> PackedBatch:
        """A pack without data, on the model's device."""
        text = None if features is None else PackedText.pack(features)
        return pack(segments, None, self.spec, text=text, labels=labels).to(next(self.model.parameters()).device)

    def velocity(self, batch: PackedBatch, cfg: SampleConfig, inference: Inference | InferenceAt) -> Velocity:
        """The guided velocity of a pack."""
        return guided_velocity(
            self.model,
            batch,
            scale=cfg.guidance,
            channels=cfg.guidance_channels,
            interval=cfg.guidance_interval,
            rescale=cfg.guidance_rescale,
            reuse=cfg.guidance_reuse,
            null_text_LY=self.null_text_LY,
            null_label=self.model.cfg.num_classes,
            inference=inference,
        )

    # Not inference mode: what it makes may live on in caches that training shares.
    @torch.no_grad()
    def solve(
        self,
        velocity: Velocity,
        batch: PackedBatch,
        cfg: SampleConfig,
        start: Start | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> list[Tensor]:
        """Latents (C, F, H, W) of a pack's samples, at the end of the flow."""
        return unpack(solve(velocity, batch, self.spec, cfg, start, on_step).x, batch.segments, self.spec)

    def decode(self, latent_CFHW: Tensor) -> Tensor:
        """Pixels (3, F, H, W) or sound (1, 1, 1, N) in [−1, 1], fp32 on the CPU."""
        return self.codec.decode(latent_CFHW.float()).clamp(-1, 1).cpu()

    @property
    def spec(self) -> TokenSpec:
        return TokenSpec.from_model(self.model.cfg)

    def _parts(
        self, segments: Sequence[Segment], cfg: SampleConfig, pack_tokens: int, inference: Inference | InferenceAt
    ) -> list[slice]:
        """Samples that run in one pack: all where they share attention; of one length where that sets the shift."""
        sets = (inference(0.0) if callable(inference) else inference).sets
        if sets:
            set_sizes(sets, len(segments))  # tells of a pattern that would join the halves of guidance
            return [slice(0, len(segments))]
        lengths = [num_tokens(s.shape, s.modality, self.spec) for s in segments]
        halves = 1 if cfg.guidance == 1 else 2
        return split([halves * n for n in lengths], pack_tokens, lengths if cfg.shift_tokens else None)

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
        self._check_modality(modality)
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

    def _check_modality(self, modality: str) -> None:
        if modality not in self.model.cfg.modalities:
            raise RecipeError(
                f"sample.modality={modality} is not one of this model's ({', '.join(self.model.cfg.modalities)})",
                fix="Sample one of those.",
            )

    def features(self, conditions: Sequence[Condition]) -> list[Tensor] | None:
        """(L, Y) text features of every prompt; None for models without text."""
        if self.text_encoder is None:
            return None
        prompts = [c for c in conditions if isinstance(c, str)]
        if len(prompts) < len(conditions):
            raise RecipeError("this model follows prompts, not class ids", fix="Give --prompt instead of --label.")
        return self.text_encoder.encode(prompts)

    def labels(self, conditions: Sequence[Condition]) -> list[int] | None:
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


def load_pipeline(
    run_dir: str | Path,
    *,
    step: int | None = None,
    ema: int | None = None,
    device: torch.device | str | None = None,
    mesh: ParallelContext | None = None,
) -> Pipeline:
    """The model of a run, ready to sample.

    Args:
        run_dir: the run folder.
        step: of the checkpoint; None: the newest.
        ema: which of train.ema_decays; −1: the raw weights; None: as the recipe's sample.ema says.
        device: None: as the recipe's train.device says, the CPU where there is no GPU.
        mesh: ranks that draw together; None: this process alone.

    Raises:
        CheckpointError: no run, no checkpoint, or a damaged one.
        RecipeError: no such average, or a codec or text encoder that cannot be loaded.
    """
    found = open_weights(run_dir, step=step, ema=ema)
    # The training run may have forced kernels that this machine cannot run.
    kernels = "auto" if found.recipe.model.kernels == "triton" else found.recipe.model.kernels
    recipe = replace(found.recipe, model=replace(found.recipe.model, kernels=kernels))
    if device is None:
        device = "cuda" if torch.cuda.is_available() and recipe.train.device != "cpu" else "cpu"
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    with torch.device("meta"):
        model = FlagDiT(recipe.model)
        empty = {name: torch.empty(entry.shape) for name, entry in found.tensors.entries.items()}
    try:
        model.load_state_dict(empty, assign=True)  # before anything is read
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights do not fit the recipe beside them: {error}",
            where=str(run_dir),
            fix="Restore the recipe.yaml that the run was trained with.",
        ) from None
    if mesh is not None and mesh.world > 1:
        model = cast(FlagDiT, place(recipe, found.tensors, mesh, dtype))
    else:
        model.load_state_dict(dict(found.tensors.items()), assign=True)
        model = model.to(device, dtype).eval().requires_grad_(False)
        # The backend of the training run, if this machine has it.
        head_dim = model.cfg.dim // model.cfg.num_heads
        model.attention_backend = choose_backend(torch.device(device), dtype, head_dim, first=recipe.model.attention)
    pipeline = Pipeline.build(model, found.recipe)
    pipeline.step = found.step
    return pipeline


def split(costs: Sequence[int], budget: int, kinds: Sequence[int] | None = None) -> list[slice]:
    """Neighbours together as long as they fit the budget and are of one kind; at least one each."""
    if not costs:
        return []
    parts, start, total = [], 0, 0
    for i, cost in enumerate(costs):
        if i > start and (total + cost > budget or (kinds is not None and kinds[i] != kinds[start])):
            parts.append(slice(start, i))
            start, total = i, 0
        total += cost
    return [*parts, slice(start, len(costs))]
