"""The page: what it shows of an answer, and its use in a real browser."""

from __future__ import annotations

import colorsys
import importlib.util
import json
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.request import urlopen
from zipfile import ZipFile

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from annexe.errors import UserError
from annexe.inference.page import fragments, mount
from annexe.inference.page.clip_view import ask_frames, look_at_clip, missing_extra
from annexe.inference.page.examples import MAX_EXAMPLES, examples_of
from annexe.inference.page.mask_files import coco_json, png_zip, rle_json
from annexe.inference.page.pictures import depth_picture, mask_layers
from annexe.inference.page.view import look
from annexe.inference.predictor import Predictor
from annexe.inference.results import Photo, PhotoResult
from annexe.rle import decode

CHROMIUM = shutil.which("chromium")
ALL_SLOTS = ("model.presence_threshold=0",)  # one step of training finds nothing by itself
NO_SLOTS = ("model.presence_threshold=1",)
REFUSED = "Where is the elephant?"
QUESTION = "Which <b>hands</b> & ${1 + 1} {{value}} are in use?"


class Asked:
    """Answers photos like a server: one after the other, whatever thread asks.

    One question is refused, and every other is answered with a mask in each slot.
    """

    def __init__(self, run_folder: Path) -> None:
        self.generous = Predictor.from_run(run_folder, device="cpu", options=ALL_SLOTS)
        self.strict = Predictor.from_run(run_folder, device="cpu", options=NO_SLOTS)
        self.lock = threading.Lock()
        self.results: list[PhotoResult] = []

    def __call__(self, photo: Photo) -> PhotoResult | UserError:
        predictor = self.strict if photo.questions == (REFUSED,) else self.generous
        with self.lock:
            (result,) = predictor.answer_batch([photo])
            if isinstance(result, PhotoResult):
                self.results.append(result)
        return result

    @property
    def about(self) -> dict[str, Any]:
        return self.generous.about


@pytest.fixture(scope="module")
def asked(trained: Path) -> Asked:
    return Asked(trained)


@pytest.fixture(scope="module")
def photo_file(scenes: Path) -> Path:
    return sorted((scenes / "RGB").iterdir())[0]


@pytest.fixture(scope="module")
def answered(asked: Asked, photo_file: Path) -> PhotoResult:
    result = asked(Photo.of(photo_file, QUESTION))
    assert isinstance(result, PhotoResult)
    assert result.answers[0].targets
    return result


# What an answer becomes


def test_saved_masks_have_the_pixels_of_the_result(answered, tmp_path):
    (answer,) = answered.answers
    expected = {target.slot: target.mask for target in answer.targets}
    assert any(mask.any() for mask in expected.values())

    # PNG
    assert_same_masks(masks_of_zip(png_zip(answer)), expected)

    # Run lengths
    image, query = json.loads(rle_json(answered))["records"]
    assert (image["analysis"], query["answer"]) == (answered.analysis, answer.text)
    assert_same_masks({mask["slot"]: decode(mask["rle"]) for mask in query["masks"]}, expected)

    # COCO, as its own library reads it
    file = tmp_path / "coco.json"
    file.write_bytes(coco_json(answered))
    coco = COCO(file)
    assert coco.imgs[1]["file_name"] == answered.source.image.name
    assert (coco.imgs[1]["height"], coco.imgs[1]["width"]) == answered.size
    for annotation, target in zip(coco.anns.values(), answer.targets, strict=True):
        assert (coco.annToMask(annotation).astype(bool) == target.mask).all()
        assert coco.cats[annotation["category_id"]]["name"] == (target.phrase or "target")
        assert annotation["area"] == target.mask.sum()
        left, top, width, height = annotation["bbox"]
        assert target.mask[top : top + height, left : left + width].sum() == target.mask.sum()


def masks_of_zip(content: bytes) -> dict[int, np.ndarray]:
    """Slot -> mask, of a ZIP file of the page."""
    masks = {}
    with ZipFile(BytesIO(content)) as archive:
        for name in archive.namelist():
            pixels = np.asarray(Image.open(BytesIO(archive.read(name))))
            assert set(np.unique(pixels)) <= {0, 255}
            masks[int(name.split("_")[0])] = pixels == 255
    return masks


def assert_same_masks(masks: dict[int, np.ndarray], expected: dict[int, np.ndarray]) -> None:
    assert masks.keys() == expected.keys()
    for slot, mask in expected.items():
        np.testing.assert_array_equal(masks[slot], mask)


def test_a_phrase_has_the_color_of_its_mask_and_texts_are_escaped(answered):
    (answer,) = answered.answers
    card = fragments.answer_card(answer)
    marked = re.findall(r'<mark [^>]*--color:(#\w{6})" data-mask="(\d+)">(.*?)</mark>', card)
    assert marked
    for color, index, phrase in marked:
        target = answer.targets[int(index)]
        assert (color, phrase) == (target.color, target.phrase)
    assert "&lt;b&gt;hands&lt;/b&gt; &amp; ${1 + 1}" in card
    assert "<b>hands" not in card
    assert "MSK" not in card

    # Layers over the photo, of the same colors
    photo, layers, colors = mask_layers(answered, answer)
    assert list(colors.values()) == [target.color for target in answer.targets]
    for (layer, label), target in zip(layers, answer.targets, strict=True):
        assert layer.shape == photo.size[::-1]
        assert label.startswith(f"{target.phrase or 'target'} · {target.score:.2f}")
        assert (layer[in_view(target.mask, layer.shape)] > 0).all()
    assert depth_picture(answered.depth, answered.size).size == photo.size


def in_view(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A mask at the size of a view."""
    size = shape[1::-1]
    return cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_LINEAR) > 0.5


def test_questions_that_cannot_be_asked_are_one_line(asked, photo_file, tmp_path, caplog):
    def line(path: Path | None, question: str, ask: Any = asked) -> str:
        with pytest.raises(UserError) as caught:
            look(ask, None if path is None else str(path), question)
        return str(caught.value)

    assert "no photo yet" in line(None, QUESTION)
    assert "no question yet" in line(photo_file, " \n")
    assert "token of the prompt" in line(photo_file, "Is [INST] there?")
    broken = tmp_path / "broken.jpg"
    broken.write_text("no photo")
    assert line(broken, QUESTION).startswith("cannot read photo 'broken.jpg' (not an image)")
    assert not caplog.records

    def fails(_: Photo) -> PhotoResult:
        raise RuntimeError("out of memory")

    assert line(photo_file, QUESTION, fails).startswith("The server could not answer")
    assert "out of memory" in caplog.text


def test_examples_come_from_the_data_of_the_run(asked, scenes, tmp_path):
    examples = examples_of(asked.about)
    assert len(examples) == min(MAX_EXAMPLES, 5)  # there are five test scenes
    for photo, question in examples:
        annotations = (scenes / "dataset_split" / "test" / f"{Path(photo).stem}.json").read_text()
        assert json.dumps(question)[1:-1] in annotations
    assert examples_of({"data_root": str(tmp_path / "gone")}) == []
    assert examples_of({"data_root": str(tmp_path)}) == []
    assert examples_of({}) == []


def test_the_page_says_what_the_model_was_trained_on(asked, tmp_path):
    line = fragments.training_line(asked.about)
    assert line.startswith("The model was trained on synthetic scenes laid out like Ego-IRGBench")
    assert "never seen a real photo" in line
    assert "synthetic" not in fragments.training_line({"dataset": "ego_irgbench"})
    facts = fragments.details(asked.about)
    assert "112 × 112 pixels" in facts
    assert str(tmp_path.parent) not in facts  # folders of the server are not told


def test_without_gradio_one_line_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r'pip install "annexe\[page\]"'):
        mount(None, None, {})


# In a browser


def needs(*modules: str, browser: bool = False) -> pytest.MarkDecorator:
    """Skips a test where a library or the browser is not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if browser and CHROMIUM is None:
        missing.append("chromium")
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@contextmanager
def served(asked: Asked) -> Iterator[str]:
    """The page under a server of its own.

    Yields:
        Its address.
    """
    import uvicorn
    from fastapi import FastAPI

    app = FastAPI()

    @app.get("/health")
    def health() -> str:
        return "well"

    mount(app, asked, asked.about)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            deadline = time.monotonic() + 30
            while not server.started and time.monotonic() < deadline:
                time.sleep(0.05)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


class Browser:
    """A page in Chromium, and what went on in it."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.requested: list[str] = []
        self.errors: list[str] = []
        page.on("request", lambda request: self.requested.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self._note)
        page.set_default_timeout(20_000)

    def _note(self, message: Any) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def ask(self, question: str) -> None:
        self.page.fill("#question textarea", question)
        self.page.click("#ask")

    def saved(self, name: str) -> bytes:
        """What the link of that name saves."""
        with self.page.expect_download() as started:
            self.page.click(f"#downloads a:text-is('{name}')")
        return Path(started.value.path()).read_bytes()


@pytest.fixture(scope="module")
def browser(asked: Asked) -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with served(asked) as address, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM)
        browser = Browser(chromium.new_page(viewport={"width": 1200, "height": 900}))
        browser.page.goto(address)
        yield browser
        chromium.close()


def hue(color: str | tuple[float, ...]) -> float:
    """Hue of ``#rrggbb``, of ``rgb(r, g, b)`` or of a pixel, in [0, 1)."""
    if isinstance(color, tuple):
        red, green, blue = color[:3]
    elif color.startswith("#"):
        red, green, blue = (int(color[first : first + 2], 16) for first in (1, 3, 5))
    else:
        red, green, blue = (float(number) for number in re.findall(r"[\d.]+", color)[:3])
    return colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)[0]


@pytest.mark.slow
@needs("gradio", "uvicorn", "playwright", browser=True)
def test_ask_in_a_browser(asked, browser, photo_file, tmp_path):
    page = browser.page
    with urlopen(f"{page.url}health") as response:
        assert response.read() == b'"well"'  # a route of the server, behind which the page is

    # Errors of the user are one line
    page.click("#ask")
    page.wait_for_selector("#message [role=alert]:has-text('no photo yet')")
    broken = tmp_path / "broken.jpg"
    broken.write_text("no photo")
    page.set_input_files("#photo input[type=file]", broken)
    page.wait_for_selector("#photo [aria-label='Remove Image']")
    browser.ask(QUESTION)
    page.wait_for_selector("#message [role=alert]:has-text('(not an image)')")
    page.click("#photo [aria-label='Remove Image']")
    page.set_input_files("#photo input[type=file]", photo_file)
    page.wait_for_selector("#photo img")
    browser.ask("Is [INST] there?")
    page.wait_for_selector("#message [role=alert]:has-text('token of the prompt')")
    assert not page.is_visible("#result")

    # An answer
    browser.ask(QUESTION)
    page.wait_for_selector("#answer .answered")
    assert not page.query_selector("#message [role=alert]")
    result = asked.results[-1]
    (answer,) = result.answers
    assert "".join(text for text, _ in answer.parts()) in page.inner_text("#answer .said")
    assert result.analysis in page.inner_text("#analysis")
    assert f"{answer.presence:.2f}" == page.inner_text("#answer .presence b")

    # Phrases, masks and the legend have one hue for each target
    masks = page.locator("#masks img.mask")
    masks.nth(len(answer.targets) - 1).wait_for(state="attached")
    assert masks.count() == len(answer.targets)
    phrases = page.locator("#answer .phrase")
    assert phrases.count() == sum(slot is not None for _, slot in answer.parts())
    for index in range(phrases.count()):
        phrase = phrases.nth(index)
        target = answer.targets[int(phrase.get_attribute("data-mask"))]
        assert phrase.inner_text() == target.phrase
        shown = phrase.evaluate("node => getComputedStyle(node).borderBottomColor")
        assert hue(shown) == pytest.approx(hue(target.color), abs=0.01)
    for index, target in enumerate(answer.targets):
        with urlopen(masks.nth(index).get_attribute("src")) as response:
            pixels = np.asarray(Image.open(BytesIO(response.read())).convert("RGBA"))
        inside = pixels[..., 3] > 0
        assert inside[in_view(target.mask, inside.shape)].all()
        assert inside.sum() <= 1.5 * in_view(target.mask, inside.shape).sum()  # and its outline
        if target.mask.any():
            color = tuple(np.median(pixels[inside], axis=0))
            assert hue(color) == pytest.approx(hue(target.color), abs=0.01)

    # A phrase under the pointer shows its mask alone
    phrases.first.hover()
    index = int(phrases.first.get_attribute("data-mask"))
    page.wait_for_function(
        "index => [...document.querySelectorAll('#masks img.mask')]"
        ".every((mask, place) => (getComputedStyle(mask).opacity > 0) === (place === index))",
        arg=index,
    )

    # Saved masks
    expected = {target.slot: target.mask for target in answer.targets}
    assert_same_masks(masks_of_zip(browser.saved("PNG")), expected)
    records = json.loads(browser.saved("RLE"))["records"]
    assert_same_masks({mask["slot"]: decode(mask["rle"]) for mask in records[1]["masks"]}, expected)
    segments = [entry["segmentation"] for entry in json.loads(browser.saved("COCO"))["annotations"]]
    assert_same_masks(dict(zip(expected, map(decode, segments), strict=True)), expected)

    # A refusal
    browser.ask(REFUSED)
    page.wait_for_selector("#answer .refused:has-text('Refused')")
    assert page.locator("#masks img.mask").count() == 0
    assert not page.query_selector("#downloads a")

    # Nothing left this machine, and nothing failed
    assert all(url.startswith((page.url, "data:", "blob:")) for url in browser.requested)
    assert browser.errors == []
    assert "Traceback" not in page.content()


@pytest.fixture(scope="module")
def clip_file(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of four scenes, a second each."""
    from annexe.inference.video.writing import Pace, video_file

    path = tmp_path_factory.mktemp("clip") / "scenes.mp4"
    files = sorted((scenes / "RGB").iterdir())[:4]
    with video_file(path, (90, 160), Pace(1.0, True)) as video:
        for second, file in enumerate(files):
            photo = Image.open(file).convert("RGB").resize((160, 90))
            video.add(float(second), np.asarray(photo))
    return path


def test_clips_that_cannot_be_asked_about_are_one_line(asked, tmp_path, caplog):
    def line(path: Path | None, question: str, every: float | None) -> str:
        file = None if path is None else str(path)
        with pytest.raises(UserError) as caught:
            look_at_clip(ask_video, file, question, every, out)
        return str(caught.value)

    ask_video = ask_frames(asked, asked.about)
    out = tmp_path / "out"
    out.mkdir()
    empty = tmp_path / "empty.mp4"
    empty.touch()
    assert "no video yet" in line(None, QUESTION, 1.0)
    assert "no question yet" in line(empty, "", 1.0)
    for every in (None, 0.0, -1.0, float("inf"), float("nan")):
        assert "above 0" in line(empty, QUESTION, every)
    assert line(empty, QUESTION, 1.0).startswith("clip 'empty.mp4' is empty")
    assert not caplog.records


@pytest.mark.slow
@needs("gradio", "uvicorn", "playwright", browser=True)
def test_ask_about_a_video_in_a_browser(asked, browser, request):
    page = browser.page
    page.get_by_role("tab", name="Video").click()
    if missing_extra() is not None:
        assert 'pip install "annexe[video]"' in page.inner_text("#video-missing")
        pytest.skip("neither TorchCodec nor PyAV is installed")
    page.click("#clip-ask")
    page.wait_for_selector("#clip-message [role=alert]:has-text('no video yet')")
    page.set_input_files("#clip input[type=file]", request.getfixturevalue("clip_file"))
    page.wait_for_selector("#clip video")
    assert not page.is_visible("#clip [aria-label^=Trim]")  # which would load from elsewhere
    page.fill("#clip-question textarea", QUESTION)
    num_before = len(asked.results)
    page.click("#clip-ask")
    page.wait_for_selector("#clip-report .annexe-flicker")
    assert len(asked.results) - num_before == 4  # frames
    assert "4 frames were answered" in page.inner_text("#clip-report")
    assert "3 pairs of neighbors. Frames so far apart are not" in page.inner_text("#clip-report")

    # The video that came of it plays in this browser
    page.wait_for_function("document.querySelector('#clip-video video')?.readyState >= 1")
    seconds = page.evaluate("document.querySelector('#clip-video video').duration")
    assert seconds == pytest.approx(4, abs=0.5)
    assert browser.errors == []
