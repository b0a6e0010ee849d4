"""Joining Ray: nothing to do when it runs, a clear word when the named cluster does not answer."""

from __future__ import annotations

import os
import socket
import time

import pytest

from mocme_dist import cluster
from mocme_dist.cluster import connect_ray, keep_token_private, prepare_worker
from mocme_dist.commands import run_command
from mocme_dist.errors import ConfigError, RankError, StorageError


@pytest.fixture
def unconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)


def test_a_cluster_that_does_not_answer_is_a_config_error_at_once(monkeypatch, unconnected):
    with socket.socket() as free:  # bound, not listening: connections are refused
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(ConfigError, match=r"RAY_ADDRESS=127\.0\.0\.1:\d+: no cluster answers"):
            connect_ray(2)
    assert time.monotonic() - started < 60


def test_the_address_of_the_dashboard_is_refused(monkeypatch, unconnected):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(ConfigError, match="no cluster answers"):
        connect_ray(2)


def test_a_ray_that_does_not_start_is_one_line(monkeypatch, unconnected):
    import ray

    tries = []

    def busy(**_: object) -> None:
        tries.append(1)
        raise Exception("The current node timed out during startup.\nThis could happen ...")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", busy)
    with pytest.raises(
        RankError, match=r"^Ray did not start on this machine: The current .* happen \.\.\.; run the same"
    ):
        cluster._join(None, 1, False, False)
    assert len(tries) == cluster.START_TRIES
    monkeypatch.setattr(ray, "init", lambda **_: busy() if len(tries) == cluster.START_TRIES else None)
    cluster._join(None, 1, False, False)
    assert len(tries) == cluster.START_TRIES + 1


def test_the_token_of_local_clusters_is_its_user_s_alone_whoever_wrote_it(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    before = os.umask(0o022)
    try:
        keep_token_private()
        token = tmp_path / ".ray" / "auth_token"
        assert token.stat().st_mode & 0o777 == 0o600 and len(token.read_text()) == 64
        written = token.read_text()
        token.chmod(0o644)  # as Ray leaves it
        keep_token_private()
    finally:
        os.umask(before)
    assert token.stat().st_mode & 0o777 == 0o600 and token.read_text() == written
    assert [path.name for path in token.parent.iterdir()] == ["auth_token"]


@pytest.mark.parametrize("folder", ["x" * 90, "absent"])
def test_a_folder_in_which_ray_cannot_work_is_replaced(folder, tmp_path, monkeypatch, caplog):
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / folder) if folder != "absent" else "/proc/absent")
    assert cluster._ray_folder() == "/tmp/ray"
    assert "Ray's files go to /tmp" in caplog.text
    monkeypatch.setenv("TMPDIR", "/tmp")
    assert cluster._ray_folder() is None
    monkeypatch.setattr(cluster, "_SESSION_BYTES", 200)
    with pytest.raises(StorageError, match="set TMPDIR to a writable folder"):
        cluster._ray_folder()


def test_without_a_writable_home_the_token_stays_in_memory(monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")  # restored at the end
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("HOME", "/proc/absent")
    keep_token_private()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


@pytest.mark.ray
def test_a_running_ray_is_used_as_it_is(ray_session, monkeypatch):
    import ray

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    before = ray.get_runtime_context().get_job_id()
    connect_ray(64)
    assert ray.get_runtime_context().get_job_id() == before


@pytest.mark.ray
def test_a_failing_command_leaves_the_ray_of_its_caller_alone(ray_session, capsys):
    import ray

    def broken() -> None:
        connect_ray(1)
        raise ConfigError("train.seed: expected a number")

    before = ray.get_runtime_context().get_job_id()
    with pytest.raises(SystemExit):
        run_command(broken)
    assert ray.is_initialized() and ray.get_runtime_context().get_job_id() == before
    assert capsys.readouterr().err == "error: ConfigError: train.seed: expected a number\n"


@pytest.mark.ray
def test_a_process_of_a_job_knows_its_cluster_among_several(ray_session):
    import ray

    def address() -> str:
        before = os.environ.pop("RAY_ADDRESS", None)
        prepare_worker()
        found = os.environ["RAY_ADDRESS"]
        if before is not None:
            os.environ["RAY_ADDRESS"] = before
        return found

    mine = ray.get_runtime_context().gcs_address
    assert ray.get(ray.remote(address).remote()) == mine
