"""Pictures of TensorBoard for the README: `python -m tools.screenshots RUNS OUT [--browser PATH]`.

Starts TensorBoard on loopback over the runs in RUNS, drives a headless Chromium (Debian's package `chromium`) over its
debugging socket, and writes a PNG a tab into OUT: curves.png, arranged.png, information.png, projector.png, settings.png.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp

from mocme_dist.commands import run_command
from mocme_dist.errors import ConfigError, MocmeError

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-angle=swiftshader",  # the projector draws with WebGL, also where there is no GPU
    "--enable-unsafe-swiftshader",
    "--ignore-gpu-blocklist",
)
# Finds every element that matches, inside shadow roots and same-origin frames too: TensorBoard nests both.
_FIND = """
const find = (selector) => {
  const found = [], seen = (root) => {
    found.push(...root.querySelectorAll(selector));
    for (const e of root.querySelectorAll('*')) {
      if (e.shadowRoot) seen(e.shadowRoot);
      if (e.tagName === 'IFRAME') { try { if (e.contentDocument) seen(e.contentDocument); } catch (error) {} }
    }
  };
  seen(document);
  return found;
};
"""
_OPEN_ALL = "for (const e of find('tf-category-paginated-view, tf-category-pane')) if ('opened' in e) e.opened = true;"
_PINNED = ("valid/mrr", "train/loss", "fusion/modality/text", "entropy/hard")
# tab of the address, window, what to do there, seconds to wait before and after it
TABS: dict[str, tuple[str, tuple[int, int], str, tuple[float, float]]] = {
    "curves": ("timeseries", (1500, 1050), "", (8, 0)),
    "arranged": ("custom_scalars", (1500, 1320), _OPEN_ALL, (6, 6)),
    "information": ("images", (1500, 760), _OPEN_ALL, (6, 3)),
    "projector": ("projector", (1500, 950), "for (const e of find('#show-images, paper-icon-button.show-images')) e.click();", (15, 2)),
    "settings": ("hparams", (1500, 600), "", (6, 0)),
}


def free_port() -> int:
    """A port of loopback that nobody holds now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answered(url: str, what: str, process: subprocess.Popen[bytes], seconds: float = 60) -> bytes:
    """What `url` answers, once it does.

    Raises:
        MocmeError: the process ended, or nothing answered in time.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                return bytes(response.read())
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise MocmeError(
        f"{what} at {url}: {'ended' if process.poll() is not None else f'no answer in {seconds:g} s'}; run it by hand to see why"
    )


@contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended with the block, and what it started with it: a browser's children would go on writing."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Page:
    """One tab of the browser, driven over its debugging socket."""

    def __init__(self, connection: aiohttp.ClientWebSocketResponse) -> None:
        self.connection, self.last = connection, 0

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self.last += 1
        await self.connection.send_json({"id": self.last, "method": method, "params": parameters})
        while True:
            answer: dict[str, Any] = await self.connection.receive_json(timeout=60)
            if answer.get("id") == self.last:
                if "error" in answer:
                    raise MocmeError(f"chromium: {method}: {answer['error'].get('message')}")
                return dict(answer["result"])

    async def shoot(self, url: str, window: tuple[int, int], script: str, waits: tuple[float, float]) -> bytes:
        """Open `url`, run a script in it, and take its picture as PNG."""
        width, height = window
        await self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        await self.call("Page.navigate", url="about:blank")
        await self.call("Page.navigate", url=url)
        await asyncio.sleep(waits[0])
        if script:
            done = await self.call("Runtime.evaluate", expression=f"(() => {{{_FIND}{script}}})()")
            if "exceptionDetails" in done:
                raise MocmeError(f"{url}: the page's script failed: {done['exceptionDetails'].get('text')}")
            await asyncio.sleep(waits[1])
        shot = await self.call("Page.captureScreenshot", format="png")
        return base64.b64decode(shot["data"])


async def take_all(debugger: str, tensorboard: str, keep: Callable[[str, bytes], None]) -> None:
    """Every tab, given to `keep` by name."""
    async with aiohttp.ClientSession() as session, session.ws_connect(debugger, max_msg_size=1 << 28) as connection:
        page = Page(connection)
        await page.call("Page.enable")
        pinned = urllib.parse.quote(json.dumps([{"plugin": "scalars", "tag": tag} for tag in _PINNED]))
        for name, (tab, window, script, waits) in TABS.items():
            keep(name, await page.shoot(f"{tensorboard}/?darkMode=false&pinnedCards={pinned}#{tab}", window, script, waits))


def find_browser(wanted: str | None) -> str:
    """The browser's path.

    Raises:
        ConfigError: there is none.
    """
    for name in (wanted,) if wanted else _BROWSERS:
        found = shutil.which(name)
        if found:
            return found
    raise ConfigError(f"--browser: no {wanted or ' nor '.join(_BROWSERS)} is found; install one (Debian: apt-get install chromium)")


def screenshots(runs: Path, out: Path, browser: str) -> list[Path]:
    """Write the pictures; their paths.

    Raises:
        ConfigError: there are no event files in `runs`. MocmeError: TensorBoard or the browser does not answer.
    """
    if not any(runs.rglob("events.out.tfevents.*")):
        raise ConfigError(f"{runs.absolute()}: no TensorBoard events in it; give a folder of runs")
    out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []

    def keep(name: str, png: bytes) -> None:
        path = out / f"{name}.png"
        path.write_bytes(png)
        written.append(path)
        print(f"{path}: {len(png) // 1024} KiB", flush=True)

    board, debugger = free_port(), free_port()
    serve = [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs), "--host", "127.0.0.1", "--port", str(board)]
    # A child that was just killed may still have made a file while the folder was being emptied: no reason to fail.
    made = tempfile.TemporaryDirectory(prefix="mocme-browser-", ignore_cleanup_errors=True)
    with running(serve) as tensorboard, made as profile:
        answered(f"http://127.0.0.1:{board}/data/logdir", "TensorBoard", tensorboard)
        time.sleep(3)  # it answers before it has read the runs
        with running([browser, *_FLAGS, f"--remote-debugging-port={debugger}", f"--user-data-dir={profile}", "about:blank"]) as chromium:
            targets = json.loads(answered(f"http://127.0.0.1:{debugger}/json/list", "chromium", chromium))
            page = next(target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page")
            asyncio.run(take_all(page, f"http://127.0.0.1:{board}", keep))
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
