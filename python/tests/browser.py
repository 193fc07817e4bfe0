"""A real browser without a window, for what people look at.

It is the Chromium of the machine; nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
PHONE = {"width": 390, "height": 844}
WIDE = {"width": 1280, "height": 900}
PATIENCE_MS = 60_000

_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

# Every text that is seen, with its contrast against what is behind it, as WCAG 2 has it; and what
# sticks out at the right.
_LOOK = """() => {
  const parts = colour => {
    const [r, g, b, a] = colour.match(/[\\d.]+/g).map(Number);
    return {rgb: [r, g, b], a: a ?? 1};
  };
  const light = rgb => {
    const [r, g, b] = rgb.map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const {rgb, a} = parts(getComputedStyle(at).backgroundColor);
      if (a === 1) return rgb;
    }
    return [255, 255, 255];
  };
  const texts = [], out = [], wide = document.documentElement.clientWidth;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
    if (!text || ["SCRIPT", "STYLE", "NOSCRIPT"].includes(element.tagName)) continue;
    const range = document.createRange();
    range.selectNodeContents(walker.currentNode);
    const box = range.getBoundingClientRect();
    if (!box.width || !box.height) continue;
    const [a, b] = [light(parts(getComputedStyle(element).color).rgb), light(behind(element))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    texts.push({text, contrast, px: parseFloat(getComputedStyle(element).fontSize)});
    if (box.right > wide + 0.5 && !element.closest(".scroll, thead")) out.push(text);
  }
  return {texts, out, wide, scroll: document.documentElement.scrollWidth};
}"""


def executable() -> str:
    """The browser. Where there is none the test is skipped with a loud reason; in CI it fails."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        why = "NO CHROMIUM, the agent's page is not tested: `make browser` installs it"
        if os.environ.get("TIERKEEP_LAB") == "require":
            pytest.fail(why)
        pytest.skip(why)
    return found


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A browser with a profile of its own, both gone at the end."""
    path = executable()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(_FLAGS))
        try:
            yield browser
        finally:
            browser.close()


class Tab:
    """A page that is looked at, with all that it asked for and all that it complained of."""

    def __init__(self, browser: Browser, **options: Any) -> None:
        self.context = browser.new_context(**({"viewport": WIDE, "locale": "en-GB"} | options))
        self.context.set_default_timeout(PATIENCE_MS)
        self.page: Page = self.context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(f"dialog {dialog.message}"))

    def _hear(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def open(self, url: str) -> dict[str, Any]:
        """Goes there; the data that the page drew first."""
        with self.page.expect_response("**/status.json") as answer:
            self.page.goto(url)
        data: dict[str, Any] = answer.value.json()
        self.page.locator("#when", has_text="as of").wait_for()
        return data

    def next(self) -> dict[str, Any]:
        """The data that it asks for by itself, a few seconds later."""
        with self.page.expect_response("**/status.json") as answer:
            pass
        data: dict[str, Any] = answer.value.json()
        return data

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def look(self) -> dict[str, Any]:
        """Texts with their contrast, and what sticks out."""
        looked: dict[str, Any] = self.page.evaluate(_LOOK)
        return looked

    def screenshot(self, name: str) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)

    def close(self) -> None:
        self.context.close()
