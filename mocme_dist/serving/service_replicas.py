"""The endpoint in several processes, under Ray Serve: one proxy that listens, N replicas that each hold the bundles.

The vectors are mapped, so replicas of one machine share their pages. A replica that dies is started again, and requests
that it held fail with an error that a client may retry.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from mocme_dist import environment
from mocme_dist.cluster import connect_ray, leave_ray
from mocme_dist.data.storage import is_url
from mocme_dist.errors import ConfigError, MocmeError
from mocme_dist.serving.bundle import Bundle
from mocme_dist.serving.service import ServiceSettings, make_app

log = logging.getLogger(__name__)

# How long the proxy may take to start once the replicas have (seconds).
_START_S = 120.0
_ONGOING = 256  # requests that a replica holds; its batcher refuses more


def serve_replicas(
    settings: ServiceSettings, host: str, port: int, replicas: int, ready: Callable[[int], None]
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        ready: called with the port once all replicas answer.

    Raises:
        ConfigError: the replicas do not start. DataError: a bundle cannot be opened.
    """
    # What replicas would die of is met here first, where it can be told in one line.
    for place in settings.places.values():
        Bundle.open(place)
    with tempfile.TemporaryDirectory(prefix="mocme-metrics-") as folder:
        settings = dataclasses.replace(settings, metrics_dir=folder, places=_absolute(settings.places))
        if settings.data is not None and not is_url(settings.data):
            settings = dataclasses.replace(settings, data=str(Path(settings.data).absolute()))
        environment.set_variables({"RAY_SERVE_ENABLE_HAPROXY": "0", "RAY_SERVE_USE_GRPC_BY_DEFAULT": "0"})
        # Ray's own processes take seconds to start; what this process needs of Serve is imported meanwhile.
        importing = partial(importlib.import_module, "ray.serve")
        connect_ray(min_cpus=replicas, log_to_driver=False, trains=False, meanwhile=importing)
        try:
            start(settings, host, port, replicas)
            ready(port)
            with suppress(KeyboardInterrupt):
                threading.Event().wait()
        finally:
            from ray import serve

            serve.shutdown()
            leave_ray()


def _absolute(places: dict[str, str]) -> dict[str, str]:
    return {name: place if is_url(place) else str(Path(place).absolute()) for name, place in places.items()}


def start(settings: ServiceSettings, host: str, port: int, replicas: int) -> None:
    """Start proxy and replicas in the Ray that is connected, and wait until they answer.

    Raises:
        ConfigError: they do not start; the message has the replica's own.
    """
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    deployment = serve.deployment(
        name="mocme",
        num_replicas=replicas,
        max_ongoing_requests=_ONGOING,
        ray_actor_options={"num_cpus": 0.01},
        health_check_period_s=2,
        graceful_shutdown_timeout_s=5,
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )(serve.ingress(_builder(settings))())
    start_proxy = partial(
        serve.start,
        proxy_location="HeadOnly",
        http_options={"host": host, "port": port, "request_timeout_s": 60.0},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    try:
        # The replicas start as soon as the controller is there, beside the proxy, and not after it.
        with ThreadPoolExecutor(1) as thread:
            proxy = thread.submit(start_proxy)
            while not proxy.done() and not serve.status().proxies:
                time.sleep(0.05)
            serve.run(deployment.bind(), name="mocme", route_prefix="/")
            proxy.result(timeout=_START_S)
    except MocmeError:
        raise
    except Exception as error:
        last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise ConfigError(f"the replicas do not start: {last[0]}") from None


def _builder(settings: ServiceSettings) -> Callable[[], Any]:
    """Return a function that makes the application in a replica."""

    def build() -> Any:
        _close_internal_server()
        return make_app(settings)

    return build


def _close_internal_server() -> None:
    """Keep this replica from opening Ray Serve's internal gRPC server.

    It would listen on all interfaces, without authentication, and unpickle what it receives. Proxies and handles reach
    replicas by actor calls and do not need it (RAY_SERVE_USE_GRPC_BY_DEFAULT=0). The name is private, so another
    version of Ray may not have it: then the replica refuses to start.

    Raises:
        ConfigError: this version of Ray opens the server in another way.
    """
    import ray
    from ray.serve._private import replica

    if not hasattr(replica, "add_port_to_grpc_server"):
        raise ConfigError(f"--replicas: not with Ray {ray.__version__}, whose replicas would listen on all interfaces")

    def opens_nothing(*_: object) -> int:
        return 0

    replica.add_port_to_grpc_server = opens_nothing
