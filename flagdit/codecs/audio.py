"""Sound to latents and back: log-mel spectrograms, Griffin-Lim for the way back, and an autoencoder between if given.

Shape legend
    C, F, H, W  channels (1), frames (1), rows and columns of sound in the layout of latents: a waveform is 1×1×1×N
                samples, a spectrogram 1×1×mels×columns, low bands first
    K, T        frequencies of the short-time Fourier transform, columns

A waveform in [−1, 1] becomes mel band energies (Slaney's filters on the magnitudes), and those log10, shifted and
scaled so that silence is about −1.5 and loud sound about 1.5: of order 1, as the noise is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flagdit.codecs.latents import Codec, DiffusersCodec
from flagdit.config.schema import AudioConfig
from flagdit.errors import DataError, RecipeError

FLOOR = 1e-5
MIDDLE, SCALE = -2.0, 2.0
MOMENTUM = 0.99
LINEAR_HZ, LINEAR_MELS, LOG_STEP = 1000.0, 15.0, math.log(6.4) / 27.0


class MelCodec(Codec):
    """Waveforms (1, 1, 1, N) to latents and back.

    Attributes:
        channels: 1, or the autoencoder's.
        factor: mel bands, and columns, per latent: 1, or the autoencoder's.
        step: samples of sound per latent column.
    """

    def __init__(self, cfg: AudioConfig):
        """
        Raises:
            RecipeError: bands, hop and window that do not go together, or a folder that holds no autoencoder.
        """
        if not cfg.hop <= cfg.window // 2:
            raise RecipeError(
                f"audio.hop={cfg.hop} must be at most half of audio.window={cfg.window}",
                fix=f"Try audio.hop={cfg.window // 4}.",
            )
        self.cfg = cfg
        self.inner = DiffusersCodec(cfg.path, "audio.path", 1) if cfg.path else None
        self.channels, self.factor = (self.inner.channels, self.inner.factor) if self.inner else (1, 1)
        self.step = cfg.hop * self.factor
        self.filters_MK = mel_filters(cfg)
        if cfg.mels % self.factor or not (self.filters_MK.sum(1) > 0).all():
            raise RecipeError(
                f"audio.mels={cfg.mels} is not possible: "
                + (
                    f"the autoencoder needs a multiple of {self.factor}"
                    if cfg.mels % self.factor
                    else f"the lowest bands are narrower than audio.window={cfg.window} resolves"
                ),
                fix="Use fewer bands, or a longer window." if not cfg.mels % self.factor else "",
            )
        self.inverse_KM = torch.linalg.pinv(self.filters_MK.double()).float()

    def latent_shape(self, seconds: float, multiple: int) -> tuple[int, int, int, int]:
        """(C, F, H, W) of a latent of about so many seconds, its columns a multiple of `multiple`."""
        columns = max(round(seconds * self.cfg.sample_rate / (self.step * multiple)), 1) * multiple
        return (self.channels, 1, self.cfg.mels // self.factor, columns)

    def encode(self, pixels_CFHW: Tensor) -> Tensor:
        """A waveform (1, 1, 1, N) in [−1, 1] → (channels, 1, mels/factor, N/step) fp32.

        Raises:
            DataError: another shape, or a length that is not a multiple of `step`.
        """
        if tuple(pixels_CFHW.shape[:3]) != (1, 1, 1) or pixels_CFHW.shape[3] < self.step:
            raise DataError(f"a sound of shape {tuple(pixels_CFHW.shape)} is not 1×1×1×samples, at least {self.step}")
        if pixels_CFHW.shape[3] % self.step:
            raise DataError(f"a sound of {pixels_CFHW.shape[3]} samples; this codec takes multiples of {self.step}")
        return self._encode(pixels_CFHW.float())

    def latent_mask(self, mask_FHW: Tensor) -> Tensor:
        """(1, 1, N) bool of samples → (1, 1, 1, N/step) bool of columns, all bands: those with any such sample."""
        return F.max_pool1d(mask_FHW.float(), self.step).bool()[None]

    def _encode(self, pixels_CFHW: Tensor) -> Tensor:
        wave = pixels_CFHW.reshape(-1)
        magnitude_KT = self._stft(wave).abs()[:, : len(wave) // self.cfg.hop]
        mel_MT = self.filters_MK.to(wave.device) @ magnitude_KT
        latent = ((mel_MT.clamp(min=FLOOR).log10() - MIDDLE) / SCALE)[None, None]
        return self.inner.encode(latent) if self.inner else latent

    def _decode(self, latent_CFHW: Tensor) -> Tensor:
        if self.inner:
            latent_CFHW = self.inner.decode(latent_CFHW)
        log_MT = latent_CFHW[0, 0].clamp(-2, 2) * SCALE + MIDDLE
        magnitude_KT = self._magnitudes(10**log_MT - FLOOR)
        return self._griffin_lim(magnitude_KT, log_MT.shape[1] * self.cfg.hop)[None, None, None]

    def _magnitudes(self, mel_MT: Tensor) -> Tensor:
        """Magnitudes ≥ 0 whose mel bands are as given: multiplicative least squares from the pseudo-inverse."""
        filters, wanted = self.filters_MK.to(mel_MT.device), mel_MT.clamp(min=0)
        found = (self.inverse_KM.to(mel_MT.device) @ wanted).clamp(min=1e-8)
        above = filters.T @ wanted
        for _ in range(30):
            found = found * (above / (filters.T @ (filters @ found)).clamp(min=1e-12))
        return found

    def _griffin_lim(self, magnitude_KT: Tensor, samples: int) -> Tensor:
        """A waveform of these magnitudes (Griffin and Lim 1984), with the momentum of Perraudin et al. 2013.

        The first phases are drawn from a fixed seed, so equal latents sound equal.
        """
        magnitude_KT = F.pad(magnitude_KT, (0, 1), mode="replicate")
        phase = torch.rand(magnitude_KT.shape, generator=torch.Generator().manual_seed(0)) * 2 * math.pi
        angles = torch.polar(torch.ones_like(phase), phase).to(magnitude_KT.device)
        before = torch.zeros_like(angles)
        for _ in range(self.cfg.griffin_lim):
            rebuilt = self._stft(self._istft(magnitude_KT * angles, samples))
            angles = rebuilt - before * (MOMENTUM / (1 + MOMENTUM))
            angles = angles / angles.abs().clamp(min=1e-16)
            before = rebuilt
        return self._istft(magnitude_KT * angles, samples)

    def _stft(self, wave: Tensor) -> Tensor:
        half = self.cfg.window // 2
        padded = F.pad(wave, (half, half))  # zeros: a reflection needs more sound than a hop
        window = torch.hann_window(self.cfg.window, device=wave.device)
        scaled = torch.stft(padded, self.cfg.window, self.cfg.hop, window=window, center=False, return_complex=True)
        return scaled * (2 / self.cfg.window)

    def _istft(self, spectrum_KT: Tensor, samples: int) -> Tensor:
        window = torch.hann_window(self.cfg.window, device=spectrum_KT.device)
        scaled = spectrum_KT * (self.cfg.window / 2)
        return torch.istft(scaled, self.cfg.window, self.cfg.hop, window=window, center=True, length=samples)

    def to(self, device: torch.device | str) -> Codec:
        if self.inner:
            self.inner.to(device)
        return self

    def spec(self) -> dict[str, Any]:
        return mel_spec(self.cfg)


def mel_filters(cfg: AudioConfig) -> Tensor:
    """(mels, K) triangular filters, each of area 1 per 1000 Hz, on Slaney's mel scale: linear below 1 kHz, logarithmic
    above."""

    def mel(hz: float) -> float:
        return hz * LINEAR_MELS / LINEAR_HZ if hz < LINEAR_HZ else LINEAR_MELS + math.log(hz / LINEAR_HZ) / LOG_STEP

    edges = torch.linspace(mel(cfg.min_hz), mel(cfg.sample_rate / 2), cfg.mels + 2, dtype=torch.float64)
    linear, logarithmic = edges * LINEAR_HZ / LINEAR_MELS, LINEAR_HZ * torch.exp((edges - LINEAR_MELS) * LOG_STEP)
    hz = torch.where(edges < LINEAR_MELS, linear, logarithmic)
    frequencies_K = torch.linspace(0, cfg.sample_rate / 2, cfg.window // 2 + 1, dtype=torch.float64)
    rising = (frequencies_K - hz[:-2, None]) / (hz[1:-1] - hz[:-2])[:, None]
    falling = (hz[2:, None] - frequencies_K) / (hz[2:] - hz[1:-1])[:, None]
    return (torch.minimum(rising, falling).clamp(min=0) * (2000 / (hz[2:] - hz[:-2]))[:, None]).float()


def mel_spec(cfg: AudioConfig) -> dict[str, Any]:
    """What must agree for latents of sound to be exchangeable."""
    spec: dict[str, Any] = {
        "kind": "mel",
        "channels": 1,
        "factor": 1,
        **{name: getattr(cfg, name) for name in ("sample_rate", "mels", "hop", "window", "min_hz")},
    }
    return (
        spec | {f"autoencoder.{k}": v for k, v in DiffusersCodec.spec_of(cfg.path, "audio.path").items()}
        if cfg.path
        else spec
    )
