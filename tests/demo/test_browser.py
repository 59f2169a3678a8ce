"""The demo as a visitor uses it: a real server, a real headless Chromium, and the images that come out.

What the page shows is held against the pipeline itself, at the same prompts and seeds. With VISAR_SCREENSHOTS=FOLDER
the images of the documentation are written there.
"""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from PIL import Image

from tests.helpers.stepped import LONG, hears_interrupts
from visar import TextToImagePipeline
from visar.samplers import get_sampler

pytestmark = pytest.mark.slow

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
PATIENCE = 1000 * LONG  # milliseconds

# The demo, but while the file HOLD exists a decoding waits after 40 passes until it is stopped or the file is gone.
HELD = """
import sys, time
from pathlib import Path
from visar.cli import main
from visar.demo.jobs import Job

original = Job._after_pass

def after_pass(self, progress):
    held = Path("HOLD").exists() and progress.passes >= 40
    if held:
        self.every = 0
    original(self, progress)
    while held and Path("HOLD").exists() and not self._stop.wait(0.05):
        pass

Job._after_pass = after_pass
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sync_playwright = None
    if CHROMIUM is None or sync_playwright is None:
        # A browser is no dependency of a library: who has none skips these tests. CI has one, says so, and fails here.
        assert "VISAR_NEEDS_BROWSER" not in os.environ, "Chromium or playwright is missing"
        pytest.skip("needs Chromium and playwright")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server runs."""
    return tmp_path_factory.mktemp("server")


@pytest.fixture
def hold(folder: Path) -> Iterator[Path]:
    """A file; while it exists, decodings wait after 40 passes."""
    file = folder / "HOLD"
    file.touch()
    yield file
    file.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    command = [sys.executable, "-c", HELD, "demo", "--port", "0", "--dtype", "float32"]
    command += ["--max-images", "2", "--max-waiting", "1", "--max-per-address", "3"]
    server = subprocess.Popen(
        command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=hears_interrupts
    )
    try:
        assert server.stdout is not None
        said = server.stdout.readline()
        found = re.search(r"http://\S+", said)
        assert found, said + server.stdout.read()
        yield found[0]
        server.send_signal(signal.SIGINT)
        rest, _ = server.communicate(timeout=LONG)
    finally:
        server.kill()
    assert server.returncode in (0, 130) and "Traceback" not in rest, rest


@pytest.fixture(scope="module")
def pipe() -> TextToImagePipeline:
    pipe = TextToImagePipeline.from_pretrained("icons", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Visitor:
    """One browser window on the page."""

    def __init__(self, browser: Any, address: str, width: int = 1280, dark: bool = False):
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light"
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.elsewhere: list[str] = []
        self.troubles: list[str] = []
        self.page.on("request", lambda r: self._seen(r.url, urlsplit(address).netloc))
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.goto(address)
        self.page.wait_for_selector("#generate")
        self.page.wait_for_selector("#status .visar-status")
        self.page.wait_for_timeout(500)  # until the page's own program listens

    def _seen(self, url: str, own: str) -> None:
        if url.startswith("http") and urlsplit(url).netloc != own:
            self.elsewhere.append(url)

    def fill(self, label: str, value: Any) -> None:
        box = self.page.locator(f'label:has-text("{label}") >> input,textarea >> visible=true').first
        box.fill(str(value))
        box.press("Tab")

    def choose(self, label: str, value: str) -> None:
        box = self.page.locator(f'input[aria-label="{label}"] >> visible=true')
        box.click()
        self.page.locator(f'[role="option"][aria-label="{value}"] >> visible=true').click()

    def sampler(self, name: str, label: str = "") -> None:
        """Choose a sampler, and wait until its own parameters are there."""
        self.choose("Sampler", label or name)
        self.wait(rf"^{name} ", ".visar-exactness")
        self.page.wait_for_timeout(500)  # boxes that were not there are mounted a moment later

    def set(self, parameter: str, value: Any) -> None:
        """Fill the box of a parameter of the sampler."""
        place = f".visar-parameter-{parameter}"
        box = self.page.locator(f"{place} input[type=number], {place} textarea, {place} input[type=text]")
        box.locator("visible=true").first.fill(str(value))
        self.page.keyboard.press("Tab")

    def wait(self, text: str, where: str = "#status") -> str:
        """The status, once it matches."""
        self.page.wait_for_function(
            "([where, text]) => new RegExp(text).test(document.querySelector(where).innerText)", arg=[where, text]
        )
        return str(self.page.inner_text(where)).strip()

    def generate(self) -> str:
        self.page.click("#generate")
        self.wait("Waiting|passes, ")
        return self.wait("done, ")

    def metric(self, name: str, where: str = "#metrics") -> float:
        text = self.page.inner_text(f'{where} [data-metric="{name}"]')
        return float(text.replace(",", ""))

    def images(self, where: str = "#images") -> list[Image.Image]:
        sources = self.page.eval_on_selector_all(f"{where} img", "found => found.map(image => image.src)")
        return [Image.open(io.BytesIO(base64.b64decode(s.partition(",")[2]))).convert("RGB") for s in sources]

    def keep(self, name: str) -> None:
        """Take a screenshot for the documentation, if one is wanted."""
        shot = self.page.screenshot(full_page=True)
        assert len(shot) > 10_000
        if folder := os.environ.get("VISAR_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            image = Image.open(io.BytesIO(shot)).convert("RGB")
            image.thumbnail((1000, 2000))
            image.save(Path(folder) / f"demo-{name}.webp", quality=75, method=6)

    def close(self) -> None:
        self.context.close()


@pytest.fixture
def visitor(browser: Any, address: str) -> Iterator[Visitor]:
    made = Visitor(browser, address)
    yield made
    assert made.elsewhere == [], "the page loads something from elsewhere"
    assert made.troubles == []
    made.close()


def expected(pipe: TextToImagePipeline, prompt: str, **settings: Any) -> tuple[list[bytes], int]:
    out = pipe(prompt, **settings)
    assert isinstance(out.images, list)
    return [image.tobytes() for image in out.images], out.stats.nfe


def test_two_samplers_give_what_the_pipeline_gives(visitor: Visitor, pipe: TextToImagePipeline) -> None:
    visitor.fill("Seed", 7)
    visitor.generate()
    images, nfe = expected(pipe, "a red heart, 3d", sampler="scd", seed=7)
    assert [p.tobytes() for p in visitor.images()] == images
    assert visitor.metric("NFE") == nfe < 200
    assert "Exact" in visitor.page.inner_text("#metrics")
    visitor.keep("generate")

    visitor.sampler("ar")
    visitor.generate()
    images, nfe = expected(pipe, "a red heart, 3d", sampler="ar", seed=7)
    assert [p.tobytes() for p in visitor.images()] == images
    assert visitor.metric("NFE") == nfe == 257
    assert abs(visitor.metric("tokens per pass") - 1) < 0.01


def test_a_samplers_own_parameters_are_shown_and_used(visitor: Visitor, pipe: TextToImagePipeline) -> None:
    visitor.sampler("gsd", "gsd (relaxed)")
    visitor.set("group", 3)
    visitor.set("window", 8)
    visitor.generate()
    images, nfe = expected(pipe, "a red heart, 3d", sampler=get_sampler("gsd", group=3, window=8), seed=0)
    assert [p.tobytes() for p in visitor.images()] == images and visitor.metric("NFE") == nfe
    assert "Relaxed" in visitor.page.inner_text("#metrics")


def test_the_image_comes_while_it_is_decoded_and_stops_when_asked(visitor: Visitor, hold: Path) -> None:
    visitor.sampler("eagle")
    visitor.page.locator('input[aria-label="number input for Images"] >> visible=true').fill("2")
    visitor.page.keyboard.press("Tab")
    visitor.page.click("#generate")
    visitor.wait("40 passes")
    half = visitor.images()
    assert len(half) == 2
    for image in half:
        assert image.size == (64, 64)
        last = image.crop((0, 60, 64, 64)).getcolors()
        assert last and all(abs(c - 128) < 4 for _, colour in last for c in colour)  # type: ignore[union-attr]
        assert len(image.crop((0, 0, 64, 4)).getcolors() or range(999)) > 1 or image.getpixel((0, 0)) != (128,) * 3
    visitor.keep("decoding")
    visitor.page.click("#stop")
    assert re.search("after 4[01] passes", visitor.wait("Stopped after"))
    hold.unlink()
    visitor.page.click("#stop")
    assert visitor.wait("nothing to stop")
    visitor.sampler("ar")
    visitor.generate()  # and the next one is served
    assert visitor.metric("NFE") == 257


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("", "The prompt is empty"),
        ("qqqq zzzz", "No word of the prompt"),
        ("a red heart " * 40, "characters; at most 300"),
    ],
)
def test_bad_input_is_a_sentence(visitor: Visitor, prompt: str, sentence: str) -> None:
    visitor.page.evaluate("document.querySelectorAll('textarea').forEach(t => t.removeAttribute('maxlength'))")
    visitor.page.locator(".visar-prompt textarea >> visible=true").fill(prompt)
    visitor.page.click("#generate")
    visitor.wait(sentence)
    assert visitor.page.locator('#status [role="alert"]').count() == 1
    if not prompt:
        visitor.keep("refused")
    assert not visitor.images()


def test_a_bad_parameter_is_a_sentence(visitor: Visitor) -> None:
    visitor.sampler("eagle")
    visitor.set("tree", "9x9x9")
    visitor.page.click("#generate")
    visitor.wait("at most 63 nodes")
    assert visitor.page.locator('#status [role="alert"]').count() == 1


def test_words_that_are_not_known_are_told(visitor: Visitor) -> None:
    visitor.page.locator(".visar-prompt textarea >> visible=true").fill("a red zzzqqq heart")
    assert "Words not known to this model were left out: zzzqqq." in visitor.generate()


def test_compare(visitor: Visitor, pipe: TextToImagePipeline) -> None:
    visitor.page.get_by_role("tab", name="Compare").click()
    visitor.page.click("#compare")
    visitor.page.wait_for_selector('#compare-ratio [data-metric="NFE ratio"]')
    nfes = []
    for side, sampler in (("left", "ar"), ("right", "scd")):
        images, nfe = expected(pipe, "a red heart, 3d", sampler=sampler, seed=0)
        assert [p.tobytes() for p in visitor.images(f"#compare-images-{side}")] == images
        assert visitor.metric("NFE", f"#compare-metrics-{side}") == nfe
        nfes.append(nfe)
    assert visitor.metric("NFE ratio", "#compare-ratio") == pytest.approx(nfes[1] / nfes[0], abs=0.006)
    assert 0 < visitor.metric("time ratio", "#compare-ratio") < 2
    assert "All done: ar and scd." in visitor.page.inner_text("#compare-status")
    visitor.keep("compare")


def test_visitors_are_not_mixed(browser: Any, address: str, pipe: TextToImagePipeline) -> None:
    wanted = [("a green apple, flat", 3), ("a lion, noto", 4)]
    visitors = [Visitor(browser, address) for _ in wanted]
    for visitor, (prompt, seed) in zip(visitors, wanted, strict=True):
        visitor.page.locator(".visar-prompt textarea >> visible=true").fill(prompt)
        visitor.fill("Seed", seed)
    for visitor in visitors:
        visitor.page.click("#generate")
    for visitor, (prompt, seed) in zip(visitors, wanted, strict=True):
        visitor.wait("done, ")
        assert [p.tobytes() for p in visitor.images()] == expected(pipe, prompt, sampler="scd", seed=seed)[0]
        visitor.close()


def test_a_full_queue_is_a_sentence(browser: Any, address: str, hold: Path) -> None:
    visitors = [Visitor(browser, address) for _ in range(3)]
    visitors[0].sampler("ar")
    visitors[0].page.click("#generate")
    visitors[0].wait("passes, ")
    visitors[1].page.click("#generate")
    visitors[1].wait("queue: 1/1")
    visitors[2].page.click("#generate")
    visitors[2].wait("Too many requests are waiting")
    hold.unlink()
    visitors[1].wait("done, ")
    for visitor in visitors:
        visitor.close()


def test_who_leaves_does_not_hold_up_the_next(browser: Any, address: str, hold: Path) -> None:
    away = Visitor(browser, address)
    away.choose("Model", "icons-mar")
    away.wait("mar-headspec", ".visar-exactness")
    away.sampler("mar-256")
    away.page.click("#generate")
    away.wait("40 passes")
    away.close()
    visitor = Visitor(browser, address)
    visitor.page.click("#generate")
    visitor.wait("40 passes")  # the first one was stopped, or it would still have the machine
    hold.unlink()
    visitor.wait("done, ")
    visitor.close()


def test_a_model_of_continuous_tokens(visitor: Visitor) -> None:
    visitor.choose("Model", "icons-mar")
    visitor.wait("mar-headspec", ".visar-exactness")
    visitor.set("steps", 16)
    visitor.generate()
    assert visitor.metric("NFE") == 16
    assert 0 < visitor.metric("denoiser calls per pass") < 100
    visitor.keep("continuous")


@pytest.mark.parametrize(("width", "dark", "name"), [(390, False, "narrow"), (1280, True, "dark")])
def test_other_windows(browser: Any, address: str, width: int, dark: bool, name: str) -> None:
    visitor = Visitor(browser, address, width, dark)
    visitor.generate()
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= width
    visitor.keep(name)
    visitor.page.get_by_role("tab", name="Compare").click()
    visitor.page.wait_for_selector("#compare >> visible=true")
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= width
    visitor.close()
