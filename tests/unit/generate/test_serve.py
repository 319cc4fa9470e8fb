"""The page's server over HTTP, and the page itself in a headless browser where there is one."""

import base64
import io
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace

import pytest
import torch
from PIL import Image

from flagdit.errors import RecipeError
from flagdit.generate import serve
from flagdit.generate.pipeline import Pipeline

pytest.importorskip("starlette")
from starlette.testclient import TestClient


@pytest.fixture
def pipeline(recipe, random_model):
    return Pipeline.build(random_model(recipe), recipe)


@pytest.fixture
def client(pipeline):
    return TestClient(serve.build_app(pipeline), base_url="http://127.0.0.1")


def uri(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def lines(client, **asked):
    reply = client.post("/api/sample", json=asked)
    assert reply.status_code == 200
    return [json.loads(line) for line in reply.text.splitlines()]


def picture(client, **asked) -> Image.Image:
    *progress, last = lines(client, **asked)
    assert "sample" in last, last
    assert all(p["steps"] >= p["step"] > 0 for p in progress)
    return Image.open(io.BytesIO(base64.b64decode(last["sample"].partition(",")[2])))


def test_the_page_and_what_it_needs_to_know(client):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html") and "<form" in page.text
    assert "http://" not in page.text and "https://" not in page.text, "nothing is loaded from elsewhere"
    about = client.get("/api/model").json()
    assert (about["follows"], about["multiple"], about["modalities"]) == ("text", 2, ["image"])
    assert about["defaults"]["size"] == "8x8" and "fast" in about["presets"]


def test_a_picture_is_that_of_the_pipeline(client, pipeline):
    drawn = picture(client, prompt="a dog", size="12x8", steps="4", guidance="2.5", seed=7)
    cfg = replace(pipeline.recipe.sample, steps=4, guidance=2.5, seed=7)
    (wanted,) = pipeline.generate(["a dog"], cfg, sizes=[(12, 8)])
    assert drawn.size == (12, 8)
    assert drawn.tobytes() == serve.to_image(wanted).tobytes()
    *progress, _ = lines(client, prompt="a dog", preset="draft")
    assert progress == [{"step": i, "steps": 5} for i in range(1, 6)]


def test_editing_by_upload_and_mask(client):
    upload = Image.new("RGB", (16, 16), (200, 40, 40))
    mask = Image.new("RGB", (8, 8), "black")
    mask.paste("white", (0, 0, 4, 8))
    drawn = picture(client, prompt="a dog", picture=uri(upload), mask=uri(mask), strength="1")
    right, left = drawn.crop((4, 0, 8, 8)), drawn.crop((0, 0, 4, 8))
    assert right.getcolors() == [(32, (200, 40, 40))] and len(left.getcolors()) > 5
    whole = picture(client, prompt="a dog", picture=uri(upload), strength=0.9)
    assert len(whole.crop((4, 0, 8, 8)).getcolors()) > 5


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"size": "9x8"}, "try 8x8 or 10x8"),
        ({"size": "8000x8000"}, "more than 16 megapixels"),
        ({"steps": "many"}, "not a number"),
        ({"steps": 0}, "at least 1"),
        ({"preset": "magic"}, "no preset"),
        ({"picture": "data:image/png;base64,%%"}, "not a data URI"),
        ({"picture": "data:image/png;base64,aGVsbG8="}, "cannot be read"),
        ({"picture": uri(Image.new("RGB", (8, 8))), "strength": 0}, "above 0"),
    ],
)
def test_a_mistake_is_a_line_that_says_what_to_change(client, asked, told):
    (last,) = lines(client, prompt="a dog", **asked)
    assert told in last["error"]
    assert picture(client, prompt="a dog").size == (8, 8), "the server lives on"


def test_a_fault_of_the_program_is_told_and_does_not_end_the_server(client, monkeypatch, capfd):
    monkeypatch.setattr(serve, "edit", None)
    (last,) = lines(client, prompt="a", picture=uri(Image.new("RGB", (8, 8))))
    assert last["error"].startswith("TypeError") and "in _edited" in capfd.readouterr().err
    assert picture(client, prompt="a dog").size == (8, 8)


def test_strangers_get_nothing(client, monkeypatch):
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    # what a page of another origin can send without asking first
    simple = client.post("/api/sample", content=json.dumps({"prompt": "a"}), headers={"content-type": "text/plain"})
    assert simple.status_code == 415
    assert client.options("/api/sample").status_code == 405
    monkeypatch.setattr(serve, "MOST_BYTES", 100)
    assert client.post("/api/sample", json={"prompt": "a" * 200}).status_code == 413
    for content in ("{", "[]"):
        bad = client.post("/api/sample", content=content, headers={"content-type": "application/json"})
        assert bad.status_code == 400


def test_requests_are_drawn_one_after_the_other(client, pipeline):
    inside, most = 0, 0
    inner = pipeline.model.forward

    def watch(*args):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.01)
        inside -= 1
        return inner(*args)

    pipeline.model.forward = watch
    threads = [threading.Thread(target=lines, args=(client,), kwargs={"prompt": "a dog"}) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


@pytest.fixture
def address(pipeline, monkeypatch):
    """A real server on a free port of the loopback interface."""
    monkeypatch.setattr(serve, "load_pipeline", lambda run, step, ema: pipeline)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    where = {"host": "127.0.0.1", "port": port}
    thread = threading.Thread(target=serve.serve_run, args=("run",), kwargs=where, daemon=True)
    with torch.enable_grad():
        thread.start()
    for _ in range(200):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api/model", timeout=5).read()
            break
        except OSError:
            time.sleep(0.05)
    return f"http://127.0.0.1:{port}"


def test_it_serves_on_loopback(address, capsys):
    page = urllib.request.urlopen(address, timeout=5).read().decode()
    assert "<form" in page
    port = int(address.rpartition(":")[2])
    with pytest.raises(RecipeError, match="cannot listen"):
        serve.serve_run("run", host="127.0.0.1", port=port)


def test_the_command_needs_no_network_to_import():
    script = "import sys, flagdit.generate.serve; print('starlette' in sys.modules, 'uvicorn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"], "servers are imported when one is started"
