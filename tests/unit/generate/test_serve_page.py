"""The page in a headless browser: what a person does on it, and what they then see."""

import base64
import io
import shutil
import socket
import threading
import wave
from dataclasses import replace

import pytest
from PIL import Image

from flagdit.generate import serve
from flagdit.generate.pipeline import Pipeline

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium (Debian: apt-get install chromium)")
GREY = (128, 128, 128)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])


@pytest.fixture
def pipeline(recipe, random_model):
    modalities = {"image": 3, "video": 3, "audio": 1}
    recipe = replace(recipe, model=replace(recipe.model, modalities=modalities), seed=3)
    return Pipeline.build(random_model(recipe), recipe)


@pytest.fixture
def page(browser, pipeline):
    """The page of a real server; whatever its script complains of fails the test."""
    import uvicorn

    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(serve.build_app(pipeline), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        page = browser.new_page()
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda told: faults.append(told.text) if told.type == "error" else None)
        page.on("request", lambda asked: faults.append(asked.url) if "127.0.0.1" not in asked.url[:20] else None)
        page.set_default_timeout(20_000)
        page.goto(f"http://127.0.0.1:{listening.getsockname()[1]}/")
        page.wait_for_function("document.getElementById('prompt').value !== ''")
        yield page
        page.close()
        server.should_exit = True
        thread.join(20)
    assert not faults


def draw(page) -> None:
    """Presses the button and waits until the page is done."""
    page.click("#go")
    page.wait_for_selector("#go:enabled")


def shown(page) -> Image.Image:
    """What the visible picture holds."""
    assert page.is_visible("#picture"), page.inner_text("#error")
    assert page.evaluate("document.getElementById('picture').naturalWidth") > 0
    return Image.open(io.BytesIO(saved(page)))


def saved(page) -> bytes:
    return base64.b64decode(page.get_attribute("#save", "href").partition(",")[2])


def test_prompt_size_steps_and_seed_make_a_picture(page, pipeline):
    assert page.input_value("#prompt") == "a dog" and page.input_value("#steps") == "3"
    page.fill("#prompt", "a cat")
    for name, value in {"width": 12, "height": 8, "steps": 4, "seed": 7, "guidance": 2.5}.items():
        page.fill(f"#{name}", str(value))
    draw(page)
    cfg = replace(pipeline.recipe.sample, steps=4, seed=7, guidance=2.5)
    (wanted,) = pipeline.generate(["a cat"], cfg, sizes=[(12, 8)])
    assert shown(page).tobytes() == serve.to_image(wanted).tobytes()
    assert page.get_attribute("#picture", "alt") == "a cat"
    assert page.evaluate("[picture.naturalWidth, picture.naturalHeight]") == [12, 8]
    first = saved(page)
    page.fill("#seed", "8")
    draw(page)
    assert saved(page) != first


def test_editing_by_upload_and_mask(page, tmp_path):
    Image.new("RGB", (16, 16), GREY).save(tmp_path / "grey.png")
    page.click("#editing summary")
    page.set_input_files("#upload", tmp_path / "grey.png")
    page.wait_for_selector("#paint", state="visible")
    page.fill("#strength", "1")
    box = page.locator("#paint").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.1, box["y"] + box["height"] * 0.1)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.1, box["y"] + box["height"] * 0.9, steps=8)
    page.mouse.up()
    middle = "document.getElementById('paint').getContext('2d').getImageData({}, 4, 1, 1).data.slice(0, 3).join()"
    assert page.evaluate(middle.format(7)) == "128,128,128" != page.evaluate(middle.format(0)), "paint can be seen"
    draw(page)
    edited = shown(page)
    painted, rest = edited.crop((0, 0, 1, 8)), edited.crop((4, 0, 8, 8))
    assert rest.getcolors() == [(32, GREY)], "what is not painted stays"
    assert len(painted.getcolors()) > 4, "what is painted is drawn"
    page.click("#clear")
    draw(page)
    assert len(shown(page).crop((4, 0, 8, 8)).getcolors()) > 4, "without a mask, all is drawn"
    page.click("#take")
    page.click("#remove")
    assert page.is_hidden("#painting")


def test_a_mistake_is_told_and_the_page_lives_on(page):
    page.evaluate("document.getElementById('form').noValidate = true")
    page.fill("#width", "13")
    draw(page)
    assert "try 12x8 or 14x8" in page.inner_text("#error") and page.is_hidden("#picture")
    page.fill("#width", "12")
    draw(page)
    assert shown(page).size == (12, 8) and page.is_hidden("#error")


def test_videos_move_and_sounds_play(page):
    page.select_option("#modality", "video")
    page.fill("#frames", "5")
    draw(page)
    assert shown(page).format == "GIF" and shown(page).n_frames == 5
    assert page.is_hidden("#take") and page.is_hidden("#editing")
    page.select_option("#modality", "audio")
    assert page.is_hidden("#frames") and page.is_hidden("#width")
    page.fill("#seconds", "0.5")
    draw(page)
    assert page.is_visible("#sound") and page.is_hidden("#picture")
    page.wait_for_function("document.getElementById('sound').duration > 0.4")
    with wave.open(io.BytesIO(saved(page))) as sound:
        assert sound.getnframes() / sound.getframerate() == pytest.approx(0.5, abs=0.1)
