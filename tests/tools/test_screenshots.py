"""Pictures of TensorBoard: mistakes are told, and with a browser at hand every tab becomes a PNG."""

from __future__ import annotations

import io
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mocme_dist.errors import ConfigError, MocmeError
from tools.screenshots import TABS, answered, find_browser, free_port, running, screenshots


def test_a_browser_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"no nobrowser is found; install one"):
        find_browser("nobrowser")


def test_a_folder_without_events_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no TensorBoard events"):
        screenshots(tmp_path, tmp_path / "out", "unused")


def test_a_server_that_ends_is_told_and_one_that_runs_is_ended_with_the_block():
    with running([sys.executable, "-c", "pass"]) as process, pytest.raises(MocmeError, match=r"board at http.*: ended"):
        answered(f"http://127.0.0.1:{free_port()}/", "board", process)
    with running([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        assert process.poll() is None
    assert process.poll() is not None


def is_running(pid: int) -> bool:
    """Not gone, and not a zombie that waits for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes as Linux shows them")
def test_what_a_process_has_started_is_ended_with_it(tmp_path):
    command = f"sleep 300 & echo $! > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/child; wait"
    with running(["sh", "-c", command]):
        deadline = time.monotonic() + 60
        while not (tmp_path / "child").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        child = int((tmp_path / "child").read_text())
        assert is_running(child)
    deadline = time.monotonic() + 20
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("chromium", "google-chrome"))), reason="no headless browser: Debian's package chromium")
def test_every_tab_becomes_a_picture(tmp_path, monkeypatch):
    from mocme_dist.training.log import RunLog

    log = RunLog(tmp_path / "metrics.jsonl", tmp_path / "runs" / "tensorboard", True, 0)
    log.layout({"Learning": {"loss": ["train/loss"]}})
    for step in range(5):
        log.scalars(step, {"train/loss": 1 / (1 + step)})
    log.heat_map("information/inter", 4, np.eye(3), 1.0)
    log.projector(
        4, np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32), [[f"e{n}", "r"] for n in range(20)], ["name", "role"], None
    )
    log.close()

    def pictures() -> dict[str, np.ndarray]:
        paths = screenshots(tmp_path / "runs", tmp_path / "out", find_browser(None))
        return {path.stem: np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("L")) for path in paths}

    # So little to show is there after a quarter of the waits; on a busy machine perhaps not, and then the waits are the tool's.
    with monkeypatch.context() as hasty:
        for name, (*what, waits) in TABS.items():
            hasty.setitem(TABS, name, (*what, tuple(wait / 4 for wait in waits)))
        found = pictures()
    if any(picture.std() <= 5 for picture in found.values()):
        found = pictures()
    assert list(found) == list(TABS)
    for name, picture in found.items():
        assert picture.shape == TABS[name][1][::-1] and picture.std() > 5, name  # not one colour
