"""What the model knows about each kind of sample. A new modality is a row here and a source in `data_pipelines/`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Modality:
    """One kind of sample.

    Attributes:
        name: key of recipes, batches and data sets.
        has_frames: whether the second latent axis counts frames or views, each ended by a [nextframe] token.
        doc: what the four latent axes (channels, frames, rows, columns) mean.
    """

    name: str
    has_frames: bool
    doc: str

    def patch(self, patch_size: int) -> tuple[int, int, int]:
        """Latent frames, rows and columns of one token. Frames are never merged: a video is a sequence of pictures."""
        return (1, patch_size, patch_size)


MODALITIES: dict[str, Modality] = {
    row.name: row
    for row in [
        Modality("image", False, "channels, 1, rows, columns"),
        Modality("video", True, "channels, frames, rows, columns"),
        Modality("multiview", True, "channels, views around the object, rows, columns"),
        Modality("audio", False, "channels, 1, mel bands from low to high, time steps"),
    ]
}
