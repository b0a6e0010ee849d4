"""Pictures of TensorBoard: mistakes are told, and with a browser at hand every tab becomes a PNG."""

from __future__ import annotations

import io
import shutil

import numpy as np
import pytest
from PIL import Image

from mocme_dist.errors import ConfigError
from tools.screenshots import TABS, find_browser, screenshots


def test_a_browser_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"no nobrowser is found; install one"):
        find_browser("nobrowser")


def test_a_folder_without_events_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no TensorBoard events"):
        screenshots(tmp_path, tmp_path / "out", "unused")


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, ("chromium", "google-chrome"))), reason="no headless browser: Debian's package chromium"
)
def test_every_tab_becomes_a_picture(tmp_path, monkeypatch):
    from mocme_dist.observe.log import RunLog

    log = RunLog(tmp_path / "metrics.jsonl", tmp_path / "runs" / "tensorboard", True, 0)
    log.layout({"Learning": {"loss": ["train/loss"]}})
    for step in range(5):
        log.scalars(step, {"train/loss": 1 / (1 + step)})
    log.heat_map("information/inter", 4, np.eye(3), ["structure", "text", "image"], 1.0, "nats")
    log.projector(
        4,
        np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32),
        [[f"e{n}", "r"] for n in range(20)],
        ["name", "role"],
        None,
    )
    log.close()

    def pictures() -> dict[str, np.ndarray]:
        paths = screenshots(tmp_path / "runs", tmp_path / "out", find_browser(None))
        return {path.stem: np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("L")) for path in paths}

    # So little to show is there after a quarter of the waits; on a busy machine perhaps not, and then the waits are the
    # tool's.
    with monkeypatch.context() as hasty:
        for name, (*what, waits) in TABS.items():
            hasty.setitem(TABS, name, (*what, tuple(wait / 4 for wait in waits)))
        found = pictures()
    if any(picture.std() <= 5 for picture in found.values()):
        found = pictures()
    assert list(found) == list(TABS)
    for name, picture in found.items():
        assert picture.shape == TABS[name][1][::-1] and picture.std() > 5, name  # not one colour
