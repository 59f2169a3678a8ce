"""A window of a real browser on the demo, and what is asked of every page: nothing jumps, is pale or nameless."""

from __future__ import annotations

import base64
import io
import os
import re
import time
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from tests.helpers.stepped import LONG

PATIENCE = 200 * LONG  # milliseconds: a page that says nothing for two minutes will say nothing

# The cumulative layout shift as browsers define it: the largest window of shifts within 1 s of one another, 5 s in all,
# without those that follow an input within 500 ms.
SHIFTS = """
window.shifted = 0;
let sum = 0, from = 0, last = 0;
new PerformanceObserver(list => {
  for (const entry of list.getEntries()) {
    if (entry.hadRecentInput) continue;
    if (entry.startTime - last > 1000 || entry.startTime - from > 5000) { sum = 0; from = entry.startTime; }
    last = entry.startTime;
    sum += entry.value;
    window.shifted = Math.max(window.shifted, sum);
  }
}).observe({ type: "layout-shift", buffered: true });
"""

# Texts in sight whose contrast with what is behind them is below WCAG's AA: 4.5, or 3 for large ones.
PALE = """() => {
  const parse = text => { const n = (text.match(/[\\d.]+/g) || []).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = node => {
    for (let at = node; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour[3] > .95) return colour;
    }
    return [255, 255, 255, 1];
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some(c => c.nodeType === 3 && c.textContent.trim());
    if (!own && !(node.matches("input:not([type=checkbox]):not([type=range]), textarea") && node.value)) continue;
    if (!node.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true })) continue;
    if (node.closest("svg, button:disabled")) continue;
    const style = getComputedStyle(node), a = light(parse(style.color)), b = light(behind(node));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05), large = parseFloat(style.fontSize) >= 24;
    if (ratio < (large ? 3 : 4.5)) found.push(
      `${node.tagName} ${node.className} ${(node.textContent || node.value).trim().slice(0, 30)}: ${ratio.toFixed(2)}`
    );
  }
  return found;
}"""

# Parts that reach beyond the window, also those that are cut off there, unless they are in something that scrolls.
WIDE = """() => [...document.querySelectorAll("body *")].filter(node => {
  const box = node.getBoundingClientRect();
  if (!node.checkVisibility() || !box.width || box.left >= -1 && box.right <= innerWidth + 1) return false;
  const scroller = node.parentElement.closest(".visar-curves");
  return !scroller || scroller.getBoundingClientRect().right > innerWidth + 1;
}).map(node => `${node.tagName} ${node.id} ${node.className}`.slice(0, 80))"""

# Boxes and buttons in sight without a name for a screen reader.
NAMELESS = """() => [...document.querySelectorAll("input, textarea, button, select, a[href]")].filter(node =>
  node.checkVisibility() && !node.ariaLabel && !node.textContent.trim() && !node.title && !node.alt
  && !(node.labels && [...node.labels].some(l => l.textContent.trim())) && !node.querySelector("img[alt]")
  && !node.getAttribute("aria-labelledby")).map(node => node.outerHTML.slice(0, 160))"""


QUALITY = 50  # of the images for the documentation


def wanted() -> Path | None:
    """The folder for the images of the documentation, if they are wanted."""
    if not (folder := os.environ.get("VISAR_SCREENSHOTS")):
        return None
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


class Visitor:
    """One browser window on the page."""

    def __init__(self, browser: Any, address: str, width: int = 1280, dark: bool = False, query: str = ""):
        self.width = width
        self.context = browser.new_context(
            viewport={"width": width, "height": 900 if width > 800 else 800},
            device_scale_factor=1 if width > 800 else 2,
            color_scheme="dark" if dark else "light", permissions=["clipboard-read", "clipboard-write"],
            accept_downloads=True,
        )  # fmt: skip
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.page.add_init_script(SHIFTS)
        self.elsewhere: list[str] = []
        self.troubles: list[str] = []
        self.page.on("request", lambda r: self._seen(r.url, urlsplit(address).netloc))
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.goto(address + query)
        self.page.wait_for_selector("#generate")
        self.page.wait_for_selector("#status .visar-status")
        self.page.wait_for_timeout(1000)  # until the page's own program listens

    def look(self) -> None:
        """All that is in sight now can be read and is within the window."""
        assert self.page.evaluate(PALE) == [] and self.page.evaluate(NAMELESS) == []
        assert self.page.evaluate("document.documentElement.scrollWidth") <= self.width
        assert self.page.evaluate(WIDE) == []

    def _seen(self, url: str, own: str) -> None:
        if url.startswith("http") and urlsplit(url).netloc != own:
            self.elsewhere.append(url)

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def open(self, name: str) -> None:
        """Open an accordion."""
        self.page.locator(f'button:has-text("{name}") >> visible=true').first.click()
        self.page.wait_for_timeout(500)  # its boxes are mounted a moment later

    def prompt(self, text: str) -> None:
        self.page.locator("#prompt input, #prompt textarea").first.fill(text)

    def seed(self, value: int) -> None:
        self.open("Settings")
        self.page.get_by_label("Random seed").uncheck()
        self.page.locator("#seed input").fill(str(value))
        self.page.keyboard.press("Tab")

    def choose(self, label: str, value: str) -> None:
        self.page.locator(f'input[aria-label="{label}"] >> visible=true').click()
        self.page.locator(f'[role="option"][aria-label^="{value}"] >> visible=true').first.click()
        self.page.wait_for_timeout(500)

    def wait(self, text: str, where: str = "#status") -> str:
        """The status, once it matches."""
        self.page.wait_for_function(
            "([where, text]) => new RegExp(text).test(document.querySelector(where).innerText)", arg=[where, text]
        )
        return str(self.page.inner_text(where)).strip()

    def generate(self) -> str:
        self.page.click("#generate")
        self.wait("Starting|Waiting|passes, |tokens|Done")
        said = self.wait("Done: ")
        self.page.wait_for_selector("#result [data-seed]")
        return said

    def images(self, where: str = "#images") -> list[Image.Image]:
        sources = self.page.eval_on_selector_all(f"{where} img", "found => found.map(image => image.src)")
        return [Image.open(io.BytesIO(base64.b64decode(s.partition(",")[2]))).convert("RGB") for s in sources]

    def copied(self, what: str, where: str = "#result") -> str:
        self.page.click(f'{where} button:has-text("Copy {what}")')
        self.page.wait_for_selector(f'{where} button:has-text("Copied")')
        return str(self.page.evaluate("navigator.clipboard.readText()"))

    def keep(self, name: str) -> None:
        """Take a screenshot for the documentation, if one is wanted."""
        if folder := wanted():
            image = self.shot()
            image.thumbnail((640, 800))
            image.save(folder / f"demo-{name}.webp", quality=QUALITY, method=6)

    def shot(self) -> Image.Image:
        return Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")

    def close(self) -> None:
        """Nothing came from elsewhere, nothing failed, and nothing jumped."""
        shifted = self.page.evaluate("window.shifted")
        self.context.close()
        assert self.elsewhere == [] and self.troubles == []
        assert shifted < 0.1


class Film:
    """An animation of a window in its own time, three frames a second or fewer. Equal frames become one that lasts."""

    def __init__(self, visitor: Visitor, size: tuple[int, int]):
        self.visitor, self.size = visitor, size
        visitor.page.set_viewport_size(dict(zip(("width", "height"), size, strict=True)))
        self.frames: list[tuple[float, Image.Image]] = []  # each with its time in milliseconds

    def shoot(self, wait: int = 300) -> None:
        """A frame of what is in sight, which stands for at least `wait` milliseconds."""
        shot = self.visitor.shot().resize(self.size, Image.Resampling.LANCZOS)
        if not self.frames or shot.tobytes() != self.frames[-1][1].tobytes():
            self.frames.append((1000 * time.monotonic(), shot))
        self.visitor.page.wait_for_timeout(wait)

    def until(self, text: str, where: str = "#status") -> None:
        while not re.search(text, self.visitor.page.inner_text(where)):
            self.shoot()
        self.visitor.page.wait_for_timeout(700)  # and what comes with the end
        self.shoot(2500)

    def save(self, file: Path) -> None:
        starts = [start for start, _ in self.frames] + [1000 * time.monotonic()]
        times = [round(end - start) for start, end in pairwise(starts)]
        first, *rest = [frame for _, frame in self.frames]
        first.save(
            file, save_all=True, append_images=rest, duration=times, loop=0, quality=QUALITY, method=6,
            minimize_size=True,
        )  # fmt: skip
