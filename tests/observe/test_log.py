"""What a run shows: pictures, curves that stay whole, and a writer that may die."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from mocme_dist.observe.heat_map import heat_map
from mocme_dist.observe.log import RunLog


def test_a_heat_map_has_names_values_and_a_scale():
    value = np.array([[0.0, 1.0], [9.0, np.nan]])
    picture = heat_map(value, ["text", "image"], peak=2.0, unit="nats")
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    colours = {tuple(pixel) for pixel in picture.reshape(-1, 3).tolist()}
    assert {(255, 255, 255), (131, 151, 181), (8, 48, 107), (200, 200, 200)} <= colours
    corner = np.argwhere((picture == (131, 151, 181)).all(-1))[0]  # of the cell that holds half the peak
    other = heat_map(value, ["words", "image"], peak=2.0, unit="nats")
    again = heat_map(value + 0.001, ["text", "image"], peak=2.0, unit="nats")
    assert not np.array_equal(picture[: corner[0]], other[: corner[0], : picture.shape[1]][: corner[0]])
    assert np.array_equal(picture[: corner[0]], again[: corner[0]])  # values are not where the names are
    assert not np.array_equal(picture, heat_map(value + 0.01, ["text", "image"], peak=2.0, unit="nats"))
    assert not np.array_equal(picture, heat_map(value, ["text", "image"], peak=2.0, unit="bits"))


def test_a_resumed_curve_loses_the_lines_behind_its_step_and_half_lines(tmp_path):
    curve = tmp_path / "metrics.jsonl"
    curve.write_text('{"step": 3, "a": 1}\n{"step": 6}\n{"step": 9}\n[1]\n{"st')
    log = RunLog(curve, tmp_path / "tensorboard", True, 6)
    log.line({"step": 7, "loss": float("nan"), "norm": float("inf"), "name": "x"})
    log.close()
    lines = curve.read_text().splitlines()
    assert lines == ['{"step": 3, "a": 1}', '{"step": 6}', '{"step": 7, "loss": null, "norm": null, "name": "x"}']
    assert all(json.loads(line) for line in lines)


def test_a_damaged_byte_costs_its_line_and_not_the_monitoring(tmp_path, caplog):
    curve = tmp_path / "metrics.jsonl"
    curve.write_bytes(b'{"step": 1}\n{"step": 2, "a": "\xff"}\n' + b"[" * 100_000 + b'\n{"step": 3}\n')
    log = RunLog(curve, tmp_path / "tensorboard", True, 6)
    log.line({"step": 7})
    log.close()
    assert curve.read_text().splitlines() == ['{"step": 1}', '{"step": 3}', '{"step": 7}']
    assert log.active and not caplog.records


def test_a_full_disk_ends_the_thread_of_tensorboard_without_a_traceback(tmp_path, caplog, capsys):
    log = RunLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", True, 0)
    log.flush()
    events = log._writer._get_file_writer().event_writer._async_writer._writer
    events._writer.close()
    events._writer = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115  a real ENOSPC, in TensorBoard's thread
    with caplog.at_level(logging.WARNING):
        for step in range(200):
            log.scalars(step, {"a": 1.0})
            log.flush()
    assert not log.active and "Traceback" not in capsys.readouterr().err
    assert [record.getMessage() for record in caplog.records] == [
        f"monitoring is off from here on: {tmp_path} cannot be written: OSError: [Errno 28] No space left on device"
    ]


def test_a_writer_that_fails_is_switched_off_with_one_warning(tmp_path, caplog):
    log = RunLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", True, 0)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    log._writer.add_scalar = full
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            log.scalars(step, {"a": 1.0})
            log.line({"step": step})
            log.heat_map("m", step, np.zeros((2, 2)), ["a", "b"], 1.0, "nats")
        log.flush()
        log.close()
    assert [record.getMessage() for record in caplog.records] == [
        f"monitoring is off from here on: {tmp_path} cannot be written: OSError: [Errno 28] No space left on device"
    ]


def test_other_ranks_write_nothing(tmp_path):
    log = RunLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", False, 0)
    log.line({"step": 1})
    log.scalars(1, {"a": 1.0})
    log.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_tensorboard_as_documented_listens_on_loopback_only(tmp_path):
    RunLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", True, 0).close()
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(tmp_path),
        "--port",
        "0",
        "--load_fast",
        "false",
    ]
    server = psutil.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        deadline, found = time.monotonic() + 200, list[str]()
        while not found and time.monotonic() < deadline and server.poll() is None:
            time.sleep(0.2)
            processes = [server, *server.children(recursive=True)]
            sockets = [each for process in processes for each in process.net_connections("tcp")]
            found = [each.laddr.ip.removeprefix("::ffff:") for each in sockets if each.status == "LISTEN"]
    finally:
        for process in (*server.children(recursive=True), server):
            process.kill()
        server.wait()
    assert found and set(found) <= {"127.0.0.1", "::1"}
