"""Joins the Ray cluster that there is, or starts a small one for this process. Imports ray lazily."""

from __future__ import annotations

import ctypes
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from mocme_dist.errors import ConfigError

log = logging.getLogger(__name__)

# Parameters of glibc's mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
# A local cluster moves only task descriptions and statistics; Ray's default would take a third of the memory.
OBJECT_STORE_BYTES = 200_000_000
# Settings of Ray Train that its workers read from their own environment; Ray itself passes on only some of its names.
PASSED_ON = ("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S")

PREPARE = "mocme_dist.cluster.prepare_worker"


def prepare_worker() -> None:
    """Runs first in every process of a job that trains: tells Ray Train's clean-up actor which cluster it belongs to.

    Once a second that actor asks a dashboard whether its controller lives, and takes the workers' places away if not.
    Without RAY_ADDRESS it asks the newest Ray of its machine, which may be somebody else's and knows no such controller.
    Where its own cluster has no dashboard that it can reach (a local one starts none) it warns or breaks off with a
    traceback: that is not shown, because what it would clean up ends with the driver all the same.
    """
    import ray

    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    logging.getLogger("ray.train.v2._internal.execution.controller.placement_group_cleaner").setLevel(logging.ERROR)
    shown = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        if failure.thread is None or failure.thread.name != "PlacementGroupCleanerMonitor":
            shown(failure)

    threading.excepthook = hook


def keep_pages() -> None:
    """Make the allocator keep the pages of large tensors for the next ones; called once by a worker process.

    glibc would map and unmap each of them: the page faults cost about half of a training step on a CPU, and an eighth
    of a text encoder's time in an actor's thread.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another C library: nothing to tune
    for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_ARENA_MAX, 1)):
        mallopt(parameter, value)


def return_pages() -> None:
    """Give the system the pages that the allocator keeps but nobody uses, between phases of different shapes.

    What a step freed lies in pieces that a ranking's tensors do not fit into: without this a rank holds both.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def connect_ray(min_cpus: int, log_to_driver: bool = True, trains: bool = True, meanwhile: Callable[[], object] | None = None) -> None:
    """Make `ray` usable: join the cluster that RAY_ADDRESS names (as under `ray job submit`), else start a local one.

    Does nothing when Ray is initialised already. A local cluster listens on loopback only, has no dashboard and ends
    with this process; it claims `min_cpus` CPUs where the machine has fewer, so a small machine shares instead of
    waiting for ever. On a joined cluster too few CPUs are a warning: it may be one that grows.

    Args:
        min_cpus: CPUs that the work to come asks for.
        log_to_driver: show what workers write to their standard output and error.
        trains: workers prepare for Ray Train first; without, every process starts a second sooner.
        meanwhile: called in a thread of its own while Ray's processes start, and waited for.

    Raises:
        ConfigError: Ray is not installed, or the cluster of RAY_ADDRESS cannot be reached.
    """
    # RAY_ADDRESS is Ray's own way to name a cluster; `ray job submit` sets it for the driver. Asked here because
    # ray.init() without it would also pick up the stale address file of a cluster that is gone.
    address = os.environ.get("RAY_ADDRESS")
    if not address or address.startswith(("127.", "localhost:", "[::1]")):
        # Read when ray is first imported. Without it a local cluster listens on all interfaces, and 127.0.0.1 is
        # rewritten to the outward address, where a cluster on loopback does not answer.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError:
        raise ConfigError("Ray is not installed; pip install 'ray[default,data,train]', or run with launch.mode=local") from None
    if ray.is_initialized():
        return
    with ThreadPoolExecutor(1) as thread:
        if meanwhile is not None:
            thread.submit(meanwhile)  # what it raises is met again where its result is used
        _join(address, min_cpus, log_to_driver, trains)


def _join(address: str | None, min_cpus: int, log_to_driver: bool, trains: bool) -> None:
    import ray

    if not address:
        cpus = max(os.cpu_count() or 1, min_cpus)
        # Ray warns that the token is on, as it should be.
        warner = logging.getLogger("ray._private.authentication.authentication_token_setup")
        warner.addFilter(lambda record: "authentication is enabled" not in record.getMessage())
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=log_to_driver,
            logging_level=logging.WARNING,
            runtime_env={"worker_process_setup_hook": PREPARE} if trains else None,
        )
        log.info("ray: started a local cluster with %d CPUs", cpus)
        return
    _check_listening(address)
    try:
        runtime: dict[str, Any] = {"worker_process_setup_hook": PREPARE} if trains else {}
        if variables := {name: os.environ[name] for name in PASSED_ON if name in os.environ}:
            runtime["env_vars"] = variables
        ray.init(
            address="auto",
            log_to_driver=log_to_driver,
            logging_level=logging.WARNING,
            runtime_env=runtime or None,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"RAY_ADDRESS={address}: no cluster answers ({reason}); start it, or unset RAY_ADDRESS; "
            "a cluster with token authentication answers only where RAY_AUTH_MODE=token is set as well"
        ) from None
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus = int(resources.get("CPU", 0))
    log.info("ray: joined %s with %d CPUs", address, cpus)
    if cpus < min_cpus:
        log.warning("ray: the cluster has %d CPUs, this work asks for %d: it waits until the cluster grows", cpus, min_cpus)


def leave_ray() -> None:
    """Leave Ray, or end the local one, so that nothing of what it still has to say comes after the last line of a command."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()


def may_grow() -> bool:
    """Whether nodes may join: a cluster that RAY_ADDRESS names, not one that this process started for itself."""
    return bool(os.environ.get("RAY_ADDRESS"))


def count_workers(each: Mapping[str, float], free: bool = False) -> int:
    """How many workers fit into the cluster, node by node; nodes that are leaving do not count.

    Args:
        each: resources of one worker, as {"CPU": 1, "GPU": 1}.
        free: only into what nobody holds at the moment (over all nodes: Ray does not say it by node).
    """
    import ray

    leaving = draining_nodes()
    # The stubs of Ray give these functions no types.
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    alive = [node["Resources"] for node in nodes if node["Alive"] and node["NodeID"] not in leaving]
    total = sum(_fitting(resources, each) for resources in alive)
    if not free:
        return total
    available: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    return min(total, _fitting(available, each))


def _fitting(resources: Mapping[str, float], each: Mapping[str, float]) -> int:
    # A hair of tolerance: three workers of 0.1 fit into 0.3.
    return min(int(resources.get(key, 0.0) / amount + 1e-9) for key, amount in each.items() if amount > 0)


def draining_nodes() -> set[str]:
    """Ids of nodes that are about to be taken away; empty where this Ray does not tell."""
    from ray._private.state import state  # no public name for it outside a train worker

    ask = getattr(state, "get_draining_nodes", None)
    return set(ask()) if ask is not None else set()


def _check_listening(address: str) -> None:
    """Fail at once where nothing listens; Ray itself would try for many minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "/" in host:
        return  # "auto", "ray://..." and their like: Ray knows them
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"RAY_ADDRESS={address}: no cluster answers ({reason}); start it, or unset RAY_ADDRESS") from None


def node_memory(cpus_per_rank: float, gpus_per_rank: float, local_ranks: int | None) -> list[tuple[str, int, int]]:
    """(name, ranks it can hold by its CPUs and GPUs, memory in bytes) of the machines of a run.

    Args:
        cpus_per_rank, gpus_per_rank: what a rank asks of Ray.
        local_ranks: so many ranks run on this machine without Ray; None asks the Ray that is connected.
    """
    if local_ranks is not None:
        return [(socket.gethostname(), local_ranks, free_memory())]
    import ray

    nodes = []
    for node in ray.nodes():
        have = node["Resources"]
        fitting = _fitting(have, {"CPU": cpus_per_rank, "GPU": gpus_per_rank})
        if node["Alive"] and fitting:
            nodes.append((str(node["NodeManagerHostname"]), fitting, int(have.get("memory", 0))))
    return nodes


def free_memory() -> int:
    """Bytes that processes of this machine can still take, within the limit of their container."""
    with open("/proc/meminfo") as file:  # noqa: PTH123
        free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:  # noqa: PTH123
            return min(free, int(limit.read()) - int(used.read()))
    except (OSError, ValueError):  # no limit is "max"
        return free
