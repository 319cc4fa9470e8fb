"""Sound for sources: any file that PyAV reads to a mono waveform within limits, and waveforms to WAV.

Shape legend: N samples of a mono waveform, fp32 in [−1, 1].
"""

from __future__ import annotations

import io
import wave
from pathlib import Path

import numpy as np

from flagdit.config.schema import LimitsConfig
from flagdit.errors import DataError

READ = {".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".g722"}
NOT_READ = {".aac", ".wma", ".aiff", ".mid", ".gsm"}
SILENT = 1e-4


def decode_sound(path: Path, rate: int, limits: LimitsConfig) -> np.ndarray:
    """(N,) mono waveform of a file, resampled.

    Raises:
        DataError: not a sound file, cut off, longer than allowed, or not finite.
    """
    import av

    blocks, count = [], 0
    try:
        with av.open(str(path), format="g722" if path.suffix.lower() == ".g722" else None) as container:
            if not container.streams.audio:
                raise DataError("has no sound")
            resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
            for frame in container.decode(container.streams.audio[0]):
                for part in resampler.resample(frame):
                    blocks.append(part.to_ndarray().reshape(-1).copy())
                    count += part.samples
                if count > limits.max_seconds * rate:
                    raise DataError(f"is longer than limits.max_seconds={limits.max_seconds:g}")
            blocks += [part.to_ndarray().reshape(-1).copy() for part in resampler.resample(None)]
    except DataError:
        raise
    except (av.FFmpegError, ValueError, OSError, MemoryError, StopIteration) as error:
        raise DataError(f"cannot be decoded as sound ({type(error).__name__}: {error})") from error
    samples = np.concatenate(blocks) if blocks else np.empty(0, np.float32)
    if not len(samples):
        raise DataError("holds no sound")
    if not np.isfinite(samples).all():
        raise DataError("holds NaN or infinity")
    return samples.clip(-1, 1)


def cut(samples_N: np.ndarray, rate: int, seconds: float, multiple: int) -> np.ndarray:
    """At most the first so many seconds, ended by silence to a multiple of so many samples.

    Raises:
        DataError: nothing but silence.
    """
    most = max(round(seconds * rate / multiple), 1) * multiple
    kept = samples_N[:most]
    if np.abs(kept).max(initial=0) < SILENT:
        raise DataError("is silent")
    return np.pad(kept, (0, -len(kept) % multiple))


def wav(samples_N: np.ndarray, rate: int) -> bytes:
    """A 16-bit mono WAV file."""
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples_N.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
    return stream.getvalue()


def read_wav(data: bytes) -> tuple[np.ndarray, int]:
    """(N,) fp32 waveform and sample rate of a file that `wav` made.

    Raises:
        DataError: not such a file.
    """
    try:
        with wave.open(io.BytesIO(data)) as file:
            if file.getnchannels() != 1 or file.getsampwidth() != 2:
                raise DataError("is not 16-bit mono")
            if file.getnframes() * 2 > len(data):
                raise DataError("is shorter than its header says")
            rate, frames = file.getframerate(), file.readframes(file.getnframes())
    except (wave.Error, EOFError, ValueError) as error:
        raise DataError(f"is not a WAV file ({error})") from error
    return np.frombuffer(frames, "<i2").astype(np.float32) / 32767, rate
