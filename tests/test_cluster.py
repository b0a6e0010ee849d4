"""Joining Ray: nothing to do when it runs, a clear word when the named cluster does not answer."""

from __future__ import annotations

import os
import socket
import time

import pytest

from mocme_dist.cluster import connect_ray, prepare_worker
from mocme_dist.errors import ConfigError


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


@pytest.mark.ray
def test_a_running_ray_is_used_as_it_is(ray_session, monkeypatch):
    import ray

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    before = ray.get_runtime_context().get_job_id()
    connect_ray(64)
    assert ray.get_runtime_context().get_job_id() == before


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
