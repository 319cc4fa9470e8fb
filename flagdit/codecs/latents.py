"""Pixels to latents and back: built-in invertible codecs, and diffusers autoencoders from a local folder.

Shape legend
    C, F, H, W  channels, frames or views (coded one by one), rows, columns
    u, v        vertical and horizontal frequency of a block transform, 0 to factor−1

Pixels are RGB in [−1, 1]. Latents are scaled so that each channel is of order 1, as the noise is.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flagdit.codecs.folders import fingerprint, model_folder, quiet, read_config
from flagdit.config.schema import CodecConfig
from flagdit.errors import DataError, RecipeError

COLOURS = 3
FACTORS = (2, 4, 8)


class Codec(ABC):
    """Turns pixels into latents and back.

    Attributes:
        channels: channels of a latent.
        factor: pixels per latent, along rows and along columns.
        colours: channels of the pixels: 3 for RGB.
    """

    channels: int
    factor: int
    colours: int = COLOURS

    def encode(self, pixels_CFHW: Tensor) -> Tensor:
        """(colours, F, H, W) pixels in [−1, 1] → (channels, F, H/factor, W/factor) fp32 latents, on the pixels' device.

        Raises:
            DataError: other channels, or rows or columns that `factor` does not divide.
        """
        colours, frames, rows, columns = pixels_CFHW.shape
        if colours != self.colours or frames < 1:
            raise DataError(f"a picture of shape {tuple(pixels_CFHW.shape)} is not {self.colours}×frames×rows×columns")
        if rows % self.factor or columns % self.factor or not rows or not columns:
            width, height = (max(n // self.factor, 1) * self.factor for n in (columns, rows))
            raise DataError(
                f"a picture of {columns}×{rows} px cannot be encoded: this codec takes multiples of {self.factor} px",
                fix=f"Make it {width}×{height}, or build the data set with a `--multiple` that {self.factor} divides.",
            )
        return self._encode(pixels_CFHW.float())

    def decode(self, latent_CFHW: Tensor) -> Tensor:
        """The inverse of `encode`: fp32 pixels, not clamped to [−1, 1].

        Raises:
            DataError: another number of channels.
        """
        if latent_CFHW.shape[0] != self.channels:
            raise DataError(f"a latent of {latent_CFHW.shape[0]} channels for a codec of {self.channels}")
        return self._decode(latent_CFHW.float())

    def latent_mask(self, mask_FHW: Tensor) -> Tensor:
        """(F, H, W) bool of pixels → (1, F, H/factor, W/factor) bool of latents: those with any such pixel."""
        return F.max_pool2d(mask_FHW.float()[:, None], self.factor)[:, 0].bool()[None]

    def to(self, device: torch.device | str) -> Codec:
        """Moves weights, if there are any; inputs may stand on any device."""
        return self

    @abstractmethod
    def _encode(self, pixels_CFHW: Tensor) -> Tensor: ...

    @abstractmethod
    def _decode(self, latent_CFHW: Tensor) -> Tensor: ...

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """What must agree for latents to be exchangeable: equal to `codec_spec` of the recipe that built it."""


class PixelCodec(Codec):
    """Latents are the pixels."""

    channels, factor = COLOURS, 1

    def _encode(self, pixels_CFHW: Tensor) -> Tensor:
        return pixels_CFHW.clone()

    def _decode(self, latent_CFHW: Tensor) -> Tensor:
        return latent_CFHW.clone()

    def spec(self) -> dict[str, Any]:
        return {"kind": "pixels", "channels": COLOURS, "factor": 1}


class BlockCodec(Codec):
    """Orthonormal transform of each factor×factor block of pixels: two-dimensional Haar wavelet or DCT-II.

    Channel (u·factor + v)·3 + colour holds frequency (u, v), so the first three channels are a small copy of the
    picture. Natural pictures have far more low than high frequencies, so every coefficient is divided by the standard
    deviation that σ(u, v) = ½·factor / (1 + 3·√(r_u² + r_v²)) predicts, rounded to a power of two so that the
    scaling itself is exact; decoding multiplies by it. ½ is about the standard deviation of pixels, and r is the
    frequency in periods per two blocks: r_u = u for the DCT, and 0, 1, 2, 2, 4, 4, 4, 4 for Haar. The low band is
    divided by ½·factor, the others by ½ to ⅛. At factor 2 the divisors are [[1, ¼], [¼, ¼]].

    Computed in float64: the round trip is exact to fp32 rounding on every device.
    """

    def __init__(self, kind: str, factor: int):
        """
        Args:
            kind: haar or dct.
            factor: 2, 4 or 8 pixels.

        Raises:
            RecipeError: another factor.
        """
        if factor not in FACTORS:
            raise RecipeError(f"codec.factor={factor} is not one of {', '.join(map(str, FACTORS))}")
        self.kind, self.factor, self.channels = kind, factor, COLOURS * factor * factor
        self.basis = haar_matrix(factor) if kind == "haar" else dct_matrix(factor)
        r = [0.0] + [float(u if kind == "dct" else 1 << (u.bit_length() - 1)) for u in range(1, factor)]
        sigma = [[0.5 * factor / (1 + 3 * math.hypot(r_u, r_v)) for r_v in r] for r_u in r]
        self.divisor = torch.tensor([[2.0 ** round(math.log2(s)) for s in row] for row in sigma], dtype=torch.float64)

    def _encode(self, pixels_CFHW: Tensor) -> Tensor:
        c, f, rows, columns = pixels_CFHW.shape
        n = self.factor
        blocks = pixels_CFHW.double().reshape(c, f, rows // n, n, columns // n, n)
        basis, divisor = self.basis.to(blocks.device), self.divisor.to(blocks.device)
        bands = torch.einsum("ua,vb,cfhawb->uvcfhw", basis, basis, blocks) / divisor[:, :, None, None, None, None]
        return bands.reshape(self.channels, f, rows // n, columns // n).float()

    def _decode(self, latent_CFHW: Tensor) -> Tensor:
        _, f, h, w = latent_CFHW.shape
        n = self.factor
        bands = latent_CFHW.double().reshape(n, n, COLOURS, f, h, w)
        basis, divisor = self.basis.to(bands.device), self.divisor.to(bands.device)
        bands = bands * divisor[:, :, None, None, None, None]
        return torch.einsum("ua,vb,uvcfhw->cfhawb", basis, basis, bands).reshape(COLOURS, f, h * n, w * n).float()

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "channels": self.channels, "factor": self.factor}


def haar_matrix(n: int) -> Tensor:
    """(n, n) orthonormal Haar basis, coarsest first; n is a power of two. (Haar 1910.)"""
    rows = [[1 / math.sqrt(n)] * n]
    width = n
    while width > 1:
        for start in range(0, n, width):
            height = 1 / math.sqrt(width)
            rows.append(
                [height * (0 if not 0 <= i - start < width else 1 if i - start < width // 2 else -1) for i in range(n)]
            )
        width //= 2
    return torch.tensor(rows, dtype=torch.float64)


def dct_matrix(n: int) -> Tensor:
    """(n, n) orthonormal DCT-II basis, lowest frequency first. (Ahmed, Natarajan, Rao 1974.)"""
    u, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    basis = torch.cos(math.pi * u * (2 * i + 1) / (2 * n)) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    return basis


class DiffusersCodec(Codec):
    """A diffusers picture autoencoder from a local folder: AutoencoderKL, AutoencoderDC, and others of their interface.

    Encoding is deterministic: the mean of the posterior. Latents are (z − shift_factor)·scaling_factor, or, where the
    configuration has per-channel statistics, (z − latents_mean)·scaling_factor/latents_std; decoding inverts that.
    """

    def __init__(self, path: str | None, key: str = "codec.path", colours: int = COLOURS):
        """
        Args:
            path: value of the key.
            key: the recipe key that names the folder, for errors.
            colours: channels of the pictures it takes.

        Raises:
            RecipeError: not a folder of a picture autoencoder that diffusers can load.
        """
        folder = model_folder(path, key, "a diffusers autoencoder")
        self.colours = colours
        self._spec = _diffusers_spec(folder, key)
        self.model = _load_autoencoder(folder, self._spec["class"], key)
        config = self.model.config
        scale = config.get("scaling_factor")
        self.scale = 1.0 if scale is None else float(scale)
        self.shift: float | Tensor = float(config.get("shift_factor") or 0.0)
        self.std: float | Tensor = 1.0
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            self.shift, self.std = (
                torch.tensor(config[k]).float().view(1, -1, 1, 1) for k in ("latents_mean", "latents_std")
            )
        try:
            probe = self._mean(torch.zeros(1, colours, 128, 128))
        except (RuntimeError, AttributeError, TypeError) as error:
            raise RecipeError(
                f"{folder}: a {self._spec['class']} does not encode pictures of {colours} channels as "
                f"AutoencoderKL does ({error})",
                where=key,
            ) from error
        self.channels, self.factor = probe.shape[1], 128 // probe.shape[2]

    def to(self, device: torch.device | str) -> Codec:
        self.model.to(device)
        return self

    @torch.no_grad()
    def _mean(self, pixels_FCHW: Tensor) -> Tensor:
        encoded = self.model.encode(pixels_FCHW.to(self.model.device))
        if hasattr(encoded, "latent_dist"):
            return encoded.latent_dist.mode()
        return encoded.latent if hasattr(encoded, "latent") else encoded.latents

    def _encode(self, pixels_CFHW: Tensor) -> Tensor:
        # Frame by frame, so that a latent does not depend on its neighbours, not even by rounding.
        frames = [self._mean(frame[None]) for frame in pixels_CFHW.transpose(0, 1)]
        z_FCHW = torch.cat(frames).to(pixels_CFHW.device)
        return ((z_FCHW - _on(z_FCHW, self.shift)) * self.scale / _on(z_FCHW, self.std)).transpose(0, 1).contiguous()

    @torch.no_grad()
    def _decode(self, latent_CFHW: Tensor) -> Tensor:
        x_FCHW = latent_CFHW.transpose(0, 1)
        z_FCHW = x_FCHW * _on(x_FCHW, self.std) / self.scale + _on(x_FCHW, self.shift)
        frames = [self.model.decode(z[None].to(self.model.device)).sample for z in z_FCHW]
        return torch.cat(frames).to(latent_CFHW.device).transpose(0, 1).contiguous()

    def spec(self) -> dict[str, Any]:
        return dict(self._spec)

    @staticmethod
    def spec_of(path: str | None, key: str = "codec.path") -> dict[str, Any]:
        """`DiffusersCodec(path, key).spec()` without loading weights."""
        return _diffusers_spec(model_folder(path, key, "a diffusers autoencoder"), key)


def _on(x: Tensor, value: float | Tensor) -> float | Tensor:
    return value.to(x.device) if isinstance(value, Tensor) else value


def _diffusers_spec(folder: Path, key: str) -> dict[str, Any]:
    config = read_config(folder, key)
    name = config.get("_class_name")
    if not isinstance(name, str):
        raise RecipeError(f"{folder}/config.json names no diffusers class (_class_name)", where=key)
    return {"kind": "diffusers", "class": name, "channels": config.get("latent_channels"), "model": fingerprint(folder)}


def _load_autoencoder(folder: Path, name: str, key: str) -> Any:
    import diffusers

    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin) and hasattr(cls, "encode")):
        raise RecipeError(f"{folder} holds a {name}, not an autoencoder that diffusers knows", where=key)
    try:
        with quiet(diffusers.utils.logging):
            model = cls.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False).float().eval()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise RecipeError(f"{folder} cannot be loaded as {name}: {error}", where=key) from error
    if any(p.ndim == 5 for p in model.parameters()):
        raise RecipeError(
            f"{name} is a video autoencoder; frames are coded one by one here",
            where=key,
            fix="Give a picture autoencoder (AutoencoderKL, AutoencoderDC).",
        )
    return model.requires_grad_(False)


def build_codec(cfg: CodecConfig) -> Codec:
    """The codec of a recipe, on the CPU.

    Raises:
        RecipeError: unknown kind, bad factor, or a folder that holds no autoencoder.
    """
    if cfg.kind == "pixels":
        return PixelCodec()
    if cfg.kind in ("haar", "dct"):
        return BlockCodec(cfg.kind, cfg.factor)
    if cfg.kind == "diffusers":
        return DiffusersCodec(cfg.path)
    raise RecipeError(f"codec.kind={cfg.kind} is not one of pixels, haar, dct, diffusers")


def codec_spec(cfg: CodecConfig) -> dict[str, Any]:
    """`build_codec(cfg).spec()` without loading weights.

    Raises:
        RecipeError: as `build_codec`, but weights are not looked at.
    """
    if cfg.kind == "diffusers":
        return DiffusersCodec.spec_of(cfg.path)
    return build_codec(cfg).spec()
