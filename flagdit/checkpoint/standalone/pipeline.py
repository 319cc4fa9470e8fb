"""From prompts or classes to pictures with a FlagDiTTransformer; needs torch, numpy and diffusers only, and
transformers for prompts.

    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    pipe("a red fox").images[0].save("fox.png")

Shape legend: B samples, C channels of a latent, F frames or views, L text tokens, Y width of the text features.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

# Explicit Runge–Kutta methods: stage times, weights of earlier slopes in each stage, weights of the slopes in the step.
SOLVERS = {
    "euler": ((0,), ((),), (1,)),
    "midpoint": ((0, 1 / 2), ((), (1 / 2,)), (0, 1)),
    "heun": ((0, 1), ((), (1,)), (1 / 2, 1 / 2)),
    "rk4": ((0, 1 / 2, 1 / 2, 1), ((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}


@dataclass
class FlagDiTOutput(BaseOutput):
    """`images`: one per sample, or one list of frames per sample; a tensor for output_type "pt" and "latent"."""

    images: object


class FlagDiTPipeline(DiffusionPipeline):
    """Flow-matching sampler. What is not given in a call is as the model was trained to be sampled."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ("vae", "text_encoder", "tokenizer")

    def __init__(
        self,
        transformer,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        codec: str = "diffusers",
        codec_factor: int = 8,
        prompt_template: str = "{}",
        max_text_tokens: int = 256,
        text_layer: int = -1,
        modality: str = "image",
        width: int = 256,
        height: int = 256,
        num_frames: int = 1,
        solver: str = "euler",
        num_steps: int = 60,
        shift: float = 1.0,
        guidance_scale: float = 4.0,
        guidance_channels: int = 0,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_to_config(
            codec=codec,
            codec_factor=codec_factor,
            prompt_template=prompt_template,
            max_text_tokens=max_text_tokens,
            text_layer=text_layer,
            modality=modality,
            width=width,
            height=height,
            num_frames=num_frames,
            solver=solver,
            num_steps=num_steps,
            shift=shift,
            guidance_scale=guidance_scale,
            guidance_channels=guidance_channels,
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=codec_factor)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        class_labels: int | list[int] | None = None,
        width: int | None = None,
        height: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        solver: str | None = None,
        shift: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: list[Tensor] | None = None,
        negative_prompt_embeds: Tensor | None = None,
        proportional_base: int | None = None,
        rope_linear: float = 1.0,
        rope_ntk: float = 1.0,
        output_type: str = "pil",
        return_dict: bool = True,
    ):
        """
        Args:
            prompt: what to draw; needs the text encoder.
            class_labels: instead, for class-conditional models.
            width, height: in pixels; multiples of codec_factor times the patch size.
            num_frames: frames or views, of modalities that have them.
            num_inference_steps: intervals of the time grid.
            guidance_scale: 1 is none.
            solver: euler, midpoint, heun or rk4.
            shift: of the time grid, towards noise when above 1.
            generator: of the noise.
            latents: the noise itself, (B, C, rows, columns) or (B, C, frames, rows, columns).
            prompt_embeds: text features instead of prompts, one (L, Y) tensor per sample.
            negative_prompt_embeds: (L, Y) features that guidance leads away from; None: of the empty prompt.
            proportional_base, rope_linear, rope_ntk: see FlagDiTTransformer.
            output_type: "pil", "pt" ([0, 1]) or "latent".
            return_dict: wrap the result.
        """
        c = self.settings
        scale = c.guidance_scale if guidance_scale is None else guidance_scale
        conditional, null, count = self.conditions(prompt, class_labels, prompt_embeds, negative_prompt_embeds)
        count = count or (1 if latents is None else len(latents))
        device, dtype = self._execution_device, self.transformer.dtype
        if latents is None:
            channels = self.transformer.config.modalities[c.modality]
            rows, columns = ((size // c.codec_factor) for size in (height or c.height, width or c.width))
            shape = (count, channels, num_frames or c.num_frames, rows, columns)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        x = latents.to(device, torch.float32)
        extra = {"rope_linear": rope_linear, "rope_ntk": rope_ntk, "proportional_base": proportional_base}
        extra["modality"] = c.modality
        guided = scale != 1 and null is not None
        given = self.batch([*conditional, *(null * count)] if guided else conditional, device, dtype)

        def velocity(x: Tensor, t: float) -> Tensor:
            x = torch.cat([x, x]) if guided else x
            times = torch.full((len(x),), t, device=device)
            v = self.transformer(x.to(dtype), times, **given, **extra, return_dict=False)[0].float()
            if not guided:
                return v
            v_given, v_null = v.chunk(2)
            strength = torch.full((v.shape[1],), float(scale), device=device)
            if c.guidance_channels:
                strength[c.guidance_channels :] = 1
            return v_null + strength.view(-1, *[1] * (v.ndim - 2)) * (v_given - v_null)

        grid = self.time_grid(num_inference_steps or c.num_steps, shift or c.shift)
        with self.progress_bar(total=len(grid) - 1) as bar:
            for start, end in pairwise(grid):
                x = self.step(velocity, x, start, end - start, solver or c.solver)
                bar.update()
        images = x if output_type == "latent" else self.finish(x, output_type)
        self.maybe_free_model_hooks()
        return FlagDiTOutput(images=images) if return_dict else (images,)

    def conditions(self, prompt, class_labels, prompt_embeds, negative_prompt_embeds):
        """(one condition per sample, the null condition alone in a list or None, number of samples or 0)."""
        model = self.transformer.config
        if model.num_classes:
            labels = [class_labels] if isinstance(class_labels, int) else list(class_labels or [])
            if not labels:
                raise ValueError("this model follows classes: give class_labels")
            return labels, [model.num_classes], len(labels)
        if not model.text_dim:
            return [], None, 0
        if prompt_embeds is None:
            if prompt is None:
                raise ValueError("this model follows text: give prompt or prompt_embeds")
            prompt_embeds = [self.encode(p) for p in ([prompt] if isinstance(prompt, str) else prompt)]
        if negative_prompt_embeds is None and self.text_encoder is not None:
            negative_prompt_embeds = self.encode("")
        null = None if negative_prompt_embeds is None else [negative_prompt_embeds]
        return list(prompt_embeds), null, len(prompt_embeds)

    def encode(self, prompt: str) -> Tensor:
        """(L, Y) text features of one prompt."""
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                "this folder holds no text encoder: pass text_encoder= and tokenizer= to from_pretrained, or "
                "prompt_embeds to the call"
            )
        c = self.settings
        text = c.prompt_template.replace("{}", prompt) if prompt else ""
        ids = self.tokenizer(text, truncation=True, max_length=c.max_text_tokens)["input_ids"]
        if not ids:
            t = self.tokenizer
            ids = [next(i for i in (t.bos_token_id, t.eos_token_id, t.pad_token_id, 0) if i is not None)]
        ids = torch.tensor([ids], device=self.text_encoder.device)
        layer = c.text_layer
        out = self.text_encoder(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=layer != -1)
        return (out.last_hidden_state if layer == -1 else out.hidden_states[layer])[0].float()

    def batch(self, conditions: list, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Conditions as arguments of the transformer."""
        if not conditions:
            return {}
        if isinstance(conditions[0], int):
            return {"class_labels": torch.tensor(conditions, device=device)}
        features = torch.nn.utils.rnn.pad_sequence([f.to(device, dtype) for f in conditions], batch_first=True)
        lengths = torch.tensor([len(f) for f in conditions], device=device)
        mask = torch.arange(features.shape[1], device=device) < lengths[:, None]
        return {"encoder_hidden_states": features, "encoder_attention_mask": mask}

    @property
    def settings(self) -> Any:
        """The arguments of __init__, as attributes."""
        return self.config

    @staticmethod
    def time_grid(steps: int, shift: float) -> list[float]:
        grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        return (grid / (grid + shift - shift * grid)).tolist()

    @staticmethod
    def step(velocity, x: Tensor, t: float, h: float, solver: str) -> Tensor:
        if solver not in SOLVERS:
            raise ValueError(f"unknown solver {solver!r}; use one of {', '.join(SOLVERS)}")
        times, stages, final = SOLVERS[solver]
        slopes: list[Tensor] = []

        def advance(weights: tuple[float, ...]) -> Tensor:
            there = x
            for slope, weight in zip(slopes, weights, strict=True):
                there = there + (h * weight) * slope if weight else there
            return there

        for c, weights in zip(times, stages, strict=True):
            slopes.append(velocity(advance(weights), t + c * h))
        return advance(final)

    def finish(self, x: Tensor, output_type: str):
        """Latents → pictures, or lists of frames."""
        with_frames = x if x.ndim == 5 else x[:, :, None]
        pixels = torch.stack([self.decode(frame) for frame in with_frames.unbind(2)], dim=2).clamp(-1, 1)
        if output_type == "pt":
            pixels = pixels / 2 + 0.5
            return pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
        frames = [self.image_processor.postprocess(sample.transpose(0, 1), "pil") for sample in pixels]
        return [sample[0] for sample in frames] if pixels.shape[2] == 1 else frames

    def decode(self, x: Tensor) -> Tensor:
        """(B, C, rows, columns) latents → (B, 3, height, width) pixels in [−1, 1]."""
        c = self.settings
        if c.codec == "pixels":
            return x
        if c.codec in ("haar", "dct"):
            return decode_blocks(x, c.codec, c.codec_factor)
        if self.vae is None:
            raise ValueError(
                "this folder holds no autoencoder: pass vae= to from_pretrained, or use output_type='latent'"
            )
        v = self.vae.config
        mean, std = getattr(v, "latents_mean", None), getattr(v, "latents_std", None)
        scale = getattr(v, "scaling_factor", None)
        x = x / (1.0 if scale is None else scale)
        if mean is not None and std is not None:
            x = x * x.new_tensor(std).view(1, -1, 1, 1) + x.new_tensor(mean).view(1, -1, 1, 1)
        else:
            x = x + (getattr(v, "shift_factor", None) or 0.0)
        return self.vae.decode(x.to(self.vae.dtype)).sample.float()


def decode_blocks(x: Tensor, kind: str, n: int) -> Tensor:
    """The inverse of an orthonormal Haar or DCT-II transform of each n×n block of pixels, whose coefficients were
    divided by powers of two."""
    basis = torch.zeros(n, n, dtype=torch.float64)
    if kind == "dct":
        u, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
        basis = torch.cos(math.pi * u * (2 * i + 1) / (2 * n)) * math.sqrt(2 / n)
        basis[0] /= math.sqrt(2)
    else:
        basis[0] = 1 / math.sqrt(n)
        row, width = 1, n
        while width > 1:
            for start in range(0, n, width):
                basis[row, start : start + width // 2] = 1 / math.sqrt(width)
                basis[row, start + width // 2 : start + width] = -1 / math.sqrt(width)
                row += 1
            width //= 2
    r = [0.0] + [float(u if kind == "dct" else 1 << (u.bit_length() - 1)) for u in range(1, n)]
    sigma = [[0.5 * n / (1 + 3 * math.hypot(r_u, r_v)) for r_v in r] for r_u in r]
    divisor = torch.tensor([[2.0 ** round(math.log2(s)) for s in row] for row in sigma], dtype=torch.float64)
    b, _, h, w = x.shape
    bands = x.double().reshape(b, n, n, 3, h, w) * divisor.to(x.device)[:, :, None, None, None]
    basis = basis.to(x.device)
    return torch.einsum("ua,vb,kuvchw->kchawb", basis, basis, bands).reshape(b, 3, h * n, w * n).float()
