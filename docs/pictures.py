"""Make the README's pictures from a real run: `make pictures`. Needs Debian's chromium for the page's.

python docs/pictures.py ROOT models:/NAME/VERSION
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

PICTURES = Path(__file__).parent / "pictures"
QUIET = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
SIZE = {"width": 1200, "height": 800}

# The point nearest to where the card covers least, in pixels of the window.
AIMED = """() => {
  const map = latentMap;
  const point = map.nearest(map.width * 0.55, map.height * 0.75, Infinity);
  const box = map.place.getBoundingClientRect();
  const [x, y] = map.pixel(point);
  return [box.x + x, box.y + y];
}"""


def main(root: str, model: str) -> None:
    """Draw the report, take its figure of samples, and photograph the page."""
    command = [sys.executable, "-m", "flows.cli", "report", model, "--root", root, "--json"]
    drawn = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    page = Path(drawn["page"])
    shutil.copy(page.parent / "figures" / "samples-prior.png", PICTURES / "fashion-mnist-samples.png")
    photograph(page)


def photograph(page: Path) -> None:
    """The top of the page, and its map."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=list(QUIET))
        opened = browser.new_page(viewport=SIZE, color_scheme="light")  # type: ignore[arg-type]
        opened.goto(page.as_uri())
        opened.wait_for_function("document.documentElement.dataset.ready")
        opened.screenshot(path=PICTURES / "report.png")
        photograph_map(opened)
        browser.close()


def photograph_map(page: Page) -> None:
    """The latent map with the image of a point."""
    page.evaluate("document.querySelector('#map').scrollIntoView()")
    x, y = page.evaluate(AIMED)
    page.mouse.move(x - 2, y - 2)
    page.mouse.move(x, y)
    page.locator("#latent-map .hover").wait_for(state="visible")
    page.screenshot(path=PICTURES / "report-map.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
