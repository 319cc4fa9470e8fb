"""`flagdit data show`: a page with samples of a data set, to look at and listen to."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

import numpy as np
from PIL import Image

from flagdit.data_pipelines.index import Dataset
from flagdit.data_pipelines.readers import read_values
from flagdit.errors import DataError

SIDE = 144
STYLE = """
body{font:14px system-ui,sans-serif;margin:24px;background:#fafafa;color:#222}
main{display:flex;flex-wrap:wrap;gap:14px}
figure{margin:0;background:#fff;border:1px solid #ddd;padding:8px;max-width:620px}
figcaption{max-width:340px;margin-top:6px}small{color:#777;display:block}img{image-rendering:pixelated}.bad{color:#b00}
"""


def write_page(path: str | Path, out: Path, limit: int = 60) -> Path:
    """Writes one HTML page, which needs no other file, with samples spread evenly over a data set.

    Pictures stand as they are, clips and views with their frames in a row, sounds with a player. Of an encoded data set
    the first channels of the latents are shown. Samples that cannot be read stand there with the reason.

    Raises:
        DataError: not a data set, or the page cannot be written.
    """
    dataset = Dataset.open(path, None)
    count = min(limit, len(dataset))
    chosen = [i * len(dataset) // count for i in range(count)]
    info = dataset.info
    head = f"{html.escape(str(path))}: {len(dataset)} samples, {info['modality']}, {info['kind']}"
    body = "\n".join(_figure(dataset, i) for i in chosen)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{head}</title><style>{STYLE}</style>'
        f"<h1>{head}</h1><p>{html.escape(info['licence'])}</p><main>\n{body}\n</main></html>\n"
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot be written: {error.strerror}", where=str(out), fix="Give another --out.") from error
    return out


def _figure(dataset: Dataset, sample_id: int) -> str:
    name = f"<small>{html.escape(dataset.key(sample_id))} · {'×'.join(map(str, dataset.shape(sample_id)))}</small>"
    try:
        if dataset.info["kind"] == "encoded":
            sample = dataset.read(sample_id)
            caption, shown = sample.caption, _picture(_of_latent(sample.latent_CFHW.numpy()))
        else:
            members = dataset.members(sample_id)
            caption = bytes(members["txt"]).decode()
            if "wav" in members:
                data = base64.b64encode(members["wav"]).decode()
                shown = f'<audio controls preload="none" src="data:audio/wav;base64,{data}"></audio>'
            else:
                shown = _picture(_side_by_side(read_values(dataset, sample_id, members).numpy()))
    except (DataError, KeyError, OSError, ValueError) as error:
        return f'<figure><b class="bad">{html.escape(str(error))}</b><figcaption>{name}</figcaption></figure>'
    return f"<figure>{shown}<figcaption>{html.escape(caption)}{name}</figcaption></figure>"


def _side_by_side(pixels_CFHW: np.ndarray) -> Image.Image:
    """Frames in a row."""
    _, _, rows, _ = pixels_CFHW.shape
    levels = ((pixels_CFHW + 1) * 127.5).round().astype(np.uint8)
    return Image.fromarray(levels.transpose(2, 1, 3, 0).reshape(rows, -1, 3))


def _of_latent(latent_CFHW: np.ndarray) -> Image.Image:
    """The first three channels as colours, or the first as grey, frames in a row, low rows of sound at the bottom."""
    channels = 3 if len(latent_CFHW) >= 3 else 1
    part = latent_CFHW[:channels]
    low, high = np.percentile(part, (1, 99))
    levels = ((part - low) / max(high - low, 1e-6) * 255).clip(0, 255).astype(np.uint8)
    row = levels.transpose(2, 1, 3, 0).reshape(part.shape[2], -1, channels)
    return Image.fromarray(row if channels == 3 else row[::-1, :, 0])


def _picture(image: Image.Image) -> str:
    zoom = max(1, SIDE // max(image.height, 1))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<img width="{image.width * zoom}" height="{image.height * zoom}" src="data:image/png;base64,{data}">'
