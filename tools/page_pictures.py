"""The pictures of the page of `alula serve` in docs/images, taken of a running demo.

    alula serve --demo &
    python tools/page_pictures.py http://127.0.0.1:8000

Needs Playwright and Chromium (``chromium`` on the path).
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

IMAGES = Path(__file__).parents[1] / "docs" / "images"
WIDE, SMALL = {"width": 1240, "height": 800}, {"width": 360, "height": 740}
IDLE = "html:not(.answering)"


def ask(page: Any, sample: str) -> None:
    page.locator(f".sample:has-text('{sample}')").first.click()
    page.wait_for_selector(".turn")
    page.wait_for_selector(IDLE)


def look(page: Any, *, token: int = 0) -> None:
    page.locator(".answer-text").last.locator(".t").nth(token).click()
    page.wait_for_selector("#looked-words:not(:empty)")
    page.wait_for_timeout(200)


def compare(page: Any) -> None:
    page.locator("#compare:not([disabled])").click()


def shot(page: Any) -> Image.Image:
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB")


def save(picture: Image.Image, name: str) -> None:
    picture.save(IMAGES / name, optimize=True)


def main(url: str) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])

        def visit(size: dict[str, int], scheme: str) -> Any:
            page = browser.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce").new_page()
            page.goto(url)
            page.wait_for_selector(".sample")
            return page

        for scheme in ("light", "dark"):
            page = visit(WIDE, scheme)
            compare(page)
            ask(page, "Describe")
            look(page, token=3)
            save(shot(page), f"page-{scheme}.png")

        pair = Image.new("RGB", (2 * SMALL["width"] + 24, SMALL["height"]), "#888f96")
        for number, scheme in enumerate(("light", "dark")):
            page = visit(SMALL, scheme)
            ask(page, "Describe")
            if scheme == "dark":
                look(page, token=3)
            pair.paste(shot(page), (number * (SMALL["width"] + 24), 0))
        save(pair, "page-small.png")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
