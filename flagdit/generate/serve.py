"""`flagdit serve`: one local page to play with a model. The page is `templates/serve.html`; this is what it talks to.

GET  /             the page
GET  /api/model    what the model can do and its defaults, as JSON
POST /api/sample   a request as JSON → one JSON object a line: {"step", "steps"}, then {"sample"} or {"error"}
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import queue
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import Tensor

from flagdit.config.schema import SampleConfig
from flagdit.config.validate import parse_size
from flagdit.data_pipelines.pictures import resize_cover
from flagdit.data_pipelines.sound import wav
from flagdit.errors import FlagDiTError, RecipeError
from flagdit.generate.edit import edit
from flagdit.generate.images import picture_of, to_image, to_pixels
from flagdit.generate.media import frames_of, save_animation
from flagdit.generate.pipeline import Pipeline, Progress, load_pipeline
from flagdit.generate.presets import PRESETS
from flagdit.generate.sample import settings_of

MOST_BYTES = 32 << 20
"""Of a request, pictures included."""
MOST_PIXELS, MOST_SECONDS, MOST_STEPS = 1 << 24, 600, 1000
ASKED = {
    "modality": str,
    "size": str,
    "frames": int,
    "seconds": float,
    "solver": str,
    "steps": int,
    "guidance": float,
    "seed": int,
    "train_size": str,
}
"""Keys of the recipe's `sample` block that a request may hold."""
LOCAL_HOSTS = ["127.0.0.1", "localhost", "[::1]", "::1"]


def build_app(pipeline: Pipeline, hosts: list[str] | None = None) -> Any:
    """The application of a pipeline. It draws one request after the other.

    Args:
        pipeline: of the model.
        hosts: names under which it answers, so that no foreign page can reach it through a name that points here.
            None: those of this machine.
    """
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    page = page_text()
    busy = threading.Lock()

    async def index(request: Request) -> Response:
        return HTMLResponse(page)

    async def model(request: Request) -> Response:
        return JSONResponse(about(pipeline))

    async def sample(request: Request) -> Response:
        # A page of another origin cannot send this type without asking first, and it is never allowed.
        if request.headers.get("content-type", "").split(";")[0] != "application/json":
            return JSONResponse({"error": "send application/json"}, 415)
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MOST_BYTES:
                return JSONResponse({"error": f"more than {MOST_BYTES >> 20} MB"}, 413)
        try:
            asked = json.loads(body)
        except ValueError:
            return JSONResponse({"error": "this is not JSON"}, 400)
        if not isinstance(asked, dict):
            return JSONResponse({"error": "this is not a JSON object"}, 400)
        return StreamingResponse(answers(pipeline, asked, busy), media_type="application/x-ndjson")

    return Starlette(
        routes=[
            Route("/", index),
            Route("/api/model", model),
            Route("/api/sample", sample, methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts or LOCAL_HOSTS)],
    )


def page_text() -> str:
    """The page's HTML, with all that it needs inside."""
    return files("flagdit.generate").joinpath("templates/serve.html").read_text(encoding="utf-8")


def about(pipeline: Pipeline) -> dict[str, Any]:
    """What the page needs to know."""
    cfg, model = pipeline.recipe.sample, pipeline.model.cfg
    return {
        "name": pipeline.recipe.name,
        "step": pipeline.step,
        "modalities": list(model.modalities),
        "follows": "text" if model.text_dim else "classes" if model.num_classes else "nothing",
        "multiple": pipeline.codec.factor * model.patch_size,
        "presets": PRESETS,
        "prompts": list(cfg.prompts),
        "defaults": {k: getattr(cfg, k) for k in ASKED},
    }


def answers(pipeline: Pipeline, asked: dict[str, Any], busy: threading.Lock) -> Iterator[str]:
    """Lines of JSON: progress, then the picture or an error that tells the person what to change."""
    told: queue.Queue[dict[str, Any]] = queue.Queue()

    def work() -> None:
        with busy:
            try:
                drawn = draw(pipeline, asked, lambda step, steps: told.put({"step": step, "steps": steps}))
                told.put({"sample": drawn})
            except FlagDiTError as error:
                told.put({"error": str(error)})
            except Exception as error:  # a fault of the program: told here and there, and the server lives on
                traceback.print_exc()
                told.put({"error": f"{type(error).__name__}: {error}"})

    threading.Thread(target=work, daemon=True).start()
    while True:
        line = told.get()
        yield json.dumps(line) + "\n"
        if "step" not in line:
            return


def draw(pipeline: Pipeline, asked: dict[str, Any], on_step: Callable[[int, int], None]) -> str:
    """The sample of a request as a data URI: a PNG, a GIF of a video's frames, or a WAV.

    A request holds a prompt, and may hold a preset and what ASKED names; picture, mask and style (data URIs; a mask is
    white where to draw) and strength edit.

    Raises:
        RecipeError: something that cannot be drawn.
    """
    cfg = _settings(pipeline, asked)
    pipeline = pipeline.of(cfg.modality)
    prompt = str(asked.get("prompt", ""))

    def told(step: int, *, finished: int) -> None:
        on_step(step, cfg.steps)

    if asked.get("picture"):
        drawn = _edited(pipeline, asked, prompt, cfg, told)
    else:
        (drawn,) = pipeline.generate([prompt], cfg, on_step=told)
    return data_uri(drawn, cfg.modality, pipeline.recipe.audio.sample_rate)


def _settings(pipeline: Pipeline, asked: dict[str, Any]) -> SampleConfig:
    given = {k: _value(k, asked[k], kind) for k, kind in ASKED.items() if asked.get(k) not in (None, "")}
    cfg = settings_of(pipeline.recipe, asked.get("preset") or None, given)
    width, height = parse_size(cfg.size)
    if width * height * cfg.frames > MOST_PIXELS or cfg.seconds > MOST_SECONDS or cfg.steps > MOST_STEPS:
        raise RecipeError(f"that is more than {MOST_PIXELS >> 20} megapixels, {MOST_SECONDS} s or {MOST_STEPS} steps")
    return cfg


def _edited(pipeline: Pipeline, asked: dict[str, Any], prompt: str, cfg: SampleConfig, on_step: Progress) -> Tensor:
    if cfg.modality != "image":
        raise RecipeError("this page edits images", fix="Choose the modality image, or remove the picture.")
    size = parse_size(cfg.size)
    picture = _picture(asked["picture"], size)
    masks = [_picture(asked["mask"], size).mean(0) > 0] if asked.get("mask") else None
    style = _picture(asked["style"], size) if asked.get("style") else None
    strength = _value("strength", asked.get("strength", 0.6), float)
    (drawn,) = edit(pipeline, [picture], [prompt], cfg, strength=strength, masks=masks, style=style, on_step=on_step)
    return drawn


def data_uri(sample: Tensor, modality: str, rate: int) -> str:
    """Pixels (3, F, H, W) or sound (1, 1, 1, N) as a browser shows or plays it."""
    stream = io.BytesIO()
    if modality == "audio":
        kind = "audio/wav"
        stream.write(wav(sample.reshape(-1).numpy(), rate))
    elif modality == "video":
        kind = "image/gif"
        save_animation(frames_of(sample), stream, "GIF")
    else:
        kind = "image/png"
        to_image(sample).save(stream, "PNG")
    return f"data:{kind};base64," + base64.b64encode(stream.getvalue()).decode()


def _picture(uri: Any, size: tuple[int, int]) -> Tensor:
    """A data URI → pixels (3, 1, H, W) of that (width, height)."""
    try:
        content = base64.b64decode(str(uri).partition(",")[2], validate=True)
    except binascii.Error as error:
        raise RecipeError("the picture is not a data URI") from error
    return to_pixels(resize_cover(picture_of(content, "the upload"), *size))


def _value(name: str, value: Any, kind: type) -> Any:
    try:
        return kind(value)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{name} is {value!r}, which is not a number") from error


def serve_run(run_dir: Path, *, host: str, port: int, step: int | None = None, ema: int | None = None) -> None:
    """Serves until it is interrupted.

    Args:
        run_dir: the run folder.
        host, port: where to listen.
        step, ema: which weights; see `load_pipeline`.

    Raises:
        CheckpointError: the run cannot be read.
        RecipeError: the address cannot be listened on.
    """
    import uvicorn

    pipeline = load_pipeline(run_dir, step=step, ema=ema)
    # A person who listens on another address knows under which names it is reached.
    hosts = None if host in LOCAL_HOSTS else ["*"]
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise RecipeError(
            f"cannot listen: {error.strerror}", where=f"{host}:{port}", fix="Try another --port."
        ) from error
    name = f"[{host}]" if ":" in host else host
    print(f"http://{name}:{listening.getsockname()[1]}  (Ctrl-C ends)", flush=True)
    uvicorn.Server(uvicorn.Config(build_app(pipeline, hosts), log_level="warning")).run(sockets=[listening])
