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

# The point nearest to the middle of the map, where the card covers least, in pixels of the page.
MIDDLE = """() => {
  const canvas = document.querySelector('#latent-map .canvas');
  const {xaxis, yaxis} = canvas._fullLayout;
  const at = canvas.data.flatMap(t => t.customdata.map((_, i) =>
    [xaxis.d2p(t.x[i]) + xaxis._offset, yaxis.d2p(t.y[i]) + yaxis._offset]));
  const aim = [canvas.clientWidth * 0.55, canvas.clientHeight * 0.72];
  const [x, y] = at.reduce((a, b) => Math.hypot(a[0] - aim[0], a[1] - aim[1]) < Math.hypot(b[0] - aim[0], b[1] - aim[1]) ? a : b);
  const box = canvas.getBoundingClientRect();
  return [box.x + x, box.y + y];
}"""  # noqa: E501


def main(root: str, model: str) -> None:
    """Draw the report, take its figure of samples, and photograph the page."""
    command = [sys.executable, "-m", "flows.cli", "report", model, "--root", root, "--json"]
    drawn = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    page = Path(drawn["page"])
    shutil.copy(page.parent / "figures" / "samples-prior.png", PICTURES / "fashion-mnist-samples.png")
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
    page.wait_for_timeout(500)
    x, y = page.evaluate(MIDDLE)
    page.mouse.move(x - 2, y - 2)
    page.mouse.move(x, y)
    page.locator("#latent-map .hover").wait_for(state="visible")
    page.screenshot(path=PICTURES / "report-map.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
