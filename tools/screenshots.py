"""Pictures of TensorBoard for the README: `python -m tools.screenshots RUNS OUT [--browser PATH]`.

Starts TensorBoard on loopback over the runs in RUNS, drives the installed Chromium (Debian's package `chromium`) by
Playwright, and writes one PNG per tab into OUT: curves.png, arranged.png, information.png, projector.png, settings.png.
"""

from __future__ import annotations

import argparse
import json
import shutil
import urllib.parse
from pathlib import Path
from typing import Any

from mocme_dist.commands import run_command
from mocme_dist.errors import ConfigError

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# The projector draws with WebGL, also where there is no GPU.
_FLAGS = [
    "--no-sandbox",
    "--hide-scrollbars",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--ignore-gpu-blocklist",
]
_OPEN_ALL = ("tf-category-paginated-view, tf-category-pane", "e => { if ('opened' in e) e.opened = true; }")
_SHOW_IMAGES = ("#show-images, paper-icon-button.show-images", "e => e.click()")
_PINNED = ("valid/mrr", "train/loss", "fusion/modality/text", "entropy/hard")
# tab of the address, window, elements and what to do to each, seconds to wait before and after it
TABS: dict[str, tuple[str, tuple[int, int], tuple[str, str] | None, tuple[float, float]]] = {
    "curves": ("timeseries", (1500, 1050), None, (8, 0)),
    "arranged": ("custom_scalars", (1500, 1320), _OPEN_ALL, (6, 6)),
    "information": ("images", (1500, 760), _OPEN_ALL, (6, 3)),
    "projector": ("projector", (1500, 950), _SHOW_IMAGES, (15, 2)),
    "settings": ("hparams", (1500, 600), None, (6, 0)),
}


def find_browser(wanted: str | None) -> str:
    """The browser's path.

    Raises:
        ConfigError: there is none.
    """
    for name in (wanted,) if wanted else _BROWSERS:
        if found := shutil.which(name):
            return found
    raise ConfigError(
        f"--browser: no {wanted or ' nor '.join(_BROWSERS)} is found; install one (Debian: apt-get install chromium)"
    )


def shoot(page: Any, address: str, name: str) -> bytes:
    """One tab as PNG.

    Args:
        page: of Playwright. address: of TensorBoard.
    """
    tab, (width, height), action, (before_s, after_s) = TABS[name]
    pinned = urllib.parse.quote(json.dumps([{"plugin": "scalars", "tag": tag} for tag in _PINNED]))
    page.set_viewport_size({"width": width, "height": height})
    page.goto("about:blank")
    page.goto(f"{address}?darkMode=false&pinnedCards={pinned}#{tab}")
    page.wait_for_timeout(1000 * before_s)
    if action is not None:
        selector, script = action
        for frame in page.frames:  # TensorBoard nests its older tabs; selectors pass into shadow roots by themselves
            for element in frame.query_selector_all(selector):
                element.evaluate(script)
        page.wait_for_timeout(1000 * after_s)
    return bytes(page.screenshot())


def screenshots(runs: Path, out: Path, browser: str) -> list[Path]:
    """Write the pictures; their paths.

    Raises:
        ConfigError: there are no event files in `runs`.
    """
    if not any(runs.rglob("events.out.tfevents.*")):
        raise ConfigError(f"{runs.absolute()}: no TensorBoard events in it; give a folder of runs")
    from playwright.sync_api import sync_playwright
    from tensorboard import program

    out.mkdir(parents=True, exist_ok=True)
    board = program.TensorBoard()
    board.configure(argv=[None, "--logdir", str(runs), "--host", "127.0.0.1", "--port", "0"])
    address = board.launch()  # in a thread, which ends with this process
    written = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=_FLAGS)
        page = chromium.new_page()
        page.goto(address)
        page.wait_for_timeout(3000)  # it answers before it has read the runs
        for name in TABS:
            path = out / f"{name}.png"
            path.write_bytes(shoot(page, address, name))
            written.append(path)
            print(f"{path}: {path.stat().st_size // 1024} KiB", flush=True)
        chromium.close()
    return written


def main() -> None:
    """Parse, take, say where they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, metavar="RUNS", help="folder of run directories")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the PNG files")
    parser.add_argument("--browser", metavar="PATH", help=f"default: the first of {', '.join(_BROWSERS)} on PATH")
    args = parser.parse_args()
    screenshots(args.runs, args.out, find_browser(args.browser))


if __name__ == "__main__":
    run_command(main)
