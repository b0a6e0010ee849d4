"""Joins a running Ray cluster, or starts a small local one for this process. Imports ray lazily."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from mocme_dist import environment, ray_loss
from mocme_dist.console import filter_stderr, listen_to_workers
from mocme_dist.data.progress import Progress, show_worker
from mocme_dist.errors import ConfigError, MocmeError, RankError, StorageError, one_line
from mocme_dist.memory import free_memory

log = logging.getLogger(__name__)

# Set while this process is in a Ray session that `connect_ray` joined or started.
_joined_here = threading.Event()
_left_behind = threading.Event()
# Ray needs about five seconds (seconds).
LEAVE_S = 60.0

# A local cluster transfers only task descriptions and statistics; Ray's default takes a third of the memory.
OBJECT_STORE_BYTES = 200_000_000
# How often a local cluster is started before the command gives up: on a busy machine a later try succeeds.
START_TRIES = 3
# Variables that workers read from their own environment: settings of Ray Train, of which Ray passes on only some,
# and the waiting policy of OpenMP (mocme_dist/__init__.py).
PASSED_ON = (
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
)

PREPARE = "mocme_dist.cluster.prepare_worker"


def prepare_worker() -> None:
    """Set-up hook of every process of a training job: tells Ray Train's clean-up actor which cluster it belongs to.

    Once per second that actor asks a dashboard whether its controller is alive, and removes the workers' placement
    group if not. Without RAY_ADDRESS it asks the newest Ray of its machine, which may belong to somebody else and does
    not know the controller. If its own cluster has no reachable dashboard (a local one starts none) it warns or ends
    with a traceback, which is hidden because its resources end with the driver in any case.
    """
    import ray

    environment.set_variables({"RAY_ADDRESS": ray.get_runtime_context().gcs_address})
    logging.getLogger("ray.train.v2._internal.execution.controller.placement_group_cleaner").setLevel(logging.ERROR)
    shown = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        if failure.thread is None or failure.thread.name != "PlacementGroupCleanerMonitor":
            shown(failure)

    threading.excepthook = hook


def connect_ray(
    min_cpus: int, log_to_driver: bool = True, trains: bool = True, meanwhile: Callable[[], object] | None = None
) -> None:
    """Initialise Ray: join the cluster that RAY_ADDRESS names (as under `ray job submit`), else start a local one.

    Does nothing if Ray is initialised already. A local cluster listens on loopback only, has no dashboard and ends with
    this process. It declares `min_cpus` CPUs even if the machine has fewer, so that a small machine shares them instead
    of waiting for ever. On a joined cluster too few CPUs are a warning, because it may grow.

    Args:
        min_cpus: CPUs that the work needs.
        log_to_driver: show the standard output and error of workers.
        trains: workers prepare for Ray Train first; without it every process starts a second sooner.
        meanwhile: called in a separate thread while Ray's processes start; its end is awaited.

    Raises:
        ConfigError: Ray is not installed, or the cluster of RAY_ADDRESS cannot be reached.
    """
    # RAY_ADDRESS is Ray's own way to name a cluster; `ray job submit` sets it for the driver. It is read here because
    # ray.init() would otherwise also use the stale address file of a cluster that has ended.
    address = environment.ray_address()
    if not address or _is_loopback(address):
        # Read at the first import of ray. Without it a local cluster listens on all interfaces, and 127.0.0.1 is
        # replaced by the external address, on which a loopback cluster does not answer.
        environment.set_defaults({"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"})
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "Ray is not installed; pip install 'ray[default,data,train]', or run with launch.mode=local"
        ) from None
    if ray.is_initialized():
        return
    filter_stderr()
    listen_to_workers(show_worker)
    with (
        Progress("joining Ray" if address else "starting Ray"),
        ThreadPoolExecutor(1) as thread,
        _own_signals(),
    ):
        if meanwhile is not None:
            thread.submit(meanwhile)  # its errors recur where its result is used
        try:
            _join(address, min_cpus, log_to_driver, trains)
        finally:  # also where a signal ends the start half way
            if ray.is_initialized():
                _joined_here.set()


def keep_token_private() -> None:
    """Make the token of local clusters readable by its user alone, and create it if there is none.

    Ray itself writes the file with the permissions of the umask, often readable by everybody.
    """
    if environment.has_ray_token():
        return
    path = Path.home() / ".ray" / "auth_token"  # where Ray looks for it
    try:
        if path.exists():
            if path.stat().st_uid == os.getuid() and path.stat().st_mode & 0o077:
                path.chmod(0o600)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, aside = tempfile.mkstemp(dir=path.parent)  # with mode 0600
    except OSError as error:
        log.info(
            "%s cannot be written (%s); the token of this cluster is kept in memory", path, error.strerror or error
        )
        environment.set_variables({"RAY_AUTH_TOKEN": secrets.token_hex(32)})
        return
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
        with suppress(FileExistsError):  # another process was first: its token is used
            os.link(aside, path)  # atomic
    finally:
        os.unlink(aside)  # noqa: PTH108


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the caller's handler of SIGTERM, which Ray replaces by one that exits with a different code."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # raised by Ray's handler, while its processes start
        raise KeyboardInterrupt("SIGTERM") from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


# A Unix socket's path has at most 107 bytes, of which Ray's session and the socket's name take this many.
_SOCKET_PATH_BYTES = 107
_SESSION_BYTES = 70


def _ray_folder() -> str | None:
    """Return a folder for Ray's sockets and logs if the default one cannot serve; None if it can.

    Raises:
        StorageError: no folder is writable and has a path short enough for a socket.
    """
    wanted = environment.temporary_folder()
    found: dict[str, str] = {}
    for place in dict.fromkeys((wanted, "/tmp", "/dev/shm", "/var/tmp")):
        if len(os.fsencode(place)) + _SESSION_BYTES > _SOCKET_PATH_BYTES:
            found[place] = f"{len(os.fsencode(place))} bytes are too long for the path of a socket"
            continue
        try:
            with tempfile.TemporaryDirectory(dir=place):
                pass
        except OSError as error:
            found[place] = error.strerror or str(error)
            continue
        if found:
            log.warning("ray: %s cannot be used (%s); Ray's files go to %s", wanted, found[wanted], place)
        return str(Path(place) / "ray") if found else None
    raise StorageError(
        f"Ray needs a folder for its sockets: {'; '.join(f'{place}: {why}' for place, why in found.items())}; set "
        f"TMPDIR to a writable folder whose path has at most {_SOCKET_PATH_BYTES - _SESSION_BYTES} bytes"
    )


def _join(address: str | None, min_cpus: int, log_to_driver: bool, trains: bool) -> None:
    import ray

    if not address:
        cpus = max(os.cpu_count() or 1, min_cpus)
        keep_token_private()
        # Ray warns that token authentication is on, which is intended.
        warner = logging.getLogger("ray._private.authentication.authentication_token_setup")
        warner.addFilter(lambda record: "authentication is enabled" not in record.getMessage())
        for left in reversed(range(START_TRIES)):
            try:
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    log_to_driver=log_to_driver,
                    logging_level=logging.WARNING,
                    runtime_env={"worker_process_setup_hook": PREPARE} if trains else None,
                    _temp_dir=_ray_folder(),
                )
                break
            except MocmeError:
                raise
            except Exception as error:  # a plain one if a process of Ray does not start within its fixed limit of 30 s
                if not left:
                    raise RankError(
                        f"Ray did not start on this machine: {one_line(error)}; run the same command again when the "
                        "machine is less busy, or without Ray: launch.mode=local"
                    ) from error
                log.warning("ray: did not start (%s); trying again", one_line(error, 80))
        log.info("ray: started a local cluster with %d CPUs", cpus)
        return
    _check_listening(address)
    try:
        runtime: dict[str, Any] = {"worker_process_setup_hook": PREPARE} if trains else {}
        if variables := environment.chosen(PASSED_ON):
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
            f"RAY_ADDRESS={address}: no cluster answers ({reason}); start it, or unset RAY_ADDRESS; a cluster with "
            "token authentication answers only where RAY_AUTH_MODE=token is set as well"
        ) from None
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus = int(resources.get("CPU", 0))
    log.info("ray: joined %s with %d CPUs", address, cpus)
    if cpus < min_cpus:
        log.warning(
            "ray: the cluster has %d CPUs, this work asks for %d: it waits until the cluster grows", cpus, min_cpus
        )


def leave_ray() -> None:
    """Leave the Ray that `connect_ray` joined or started, so that Ray prints nothing after the last line of a command.

    A Ray session that the caller of a command opened itself is left alone: it may have other work in it. Ray waits for
    its raylet without a limit; after `LEAVE_S` seconds Ray is left behind, see `left_behind`.
    """
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized() and _joined_here.is_set():
        _joined_here.clear()
        ray_loss.leaving()
        leaver = threading.Thread(target=ray.shutdown, name="leave-ray", daemon=True)
        with Progress("leaving Ray"):
            leaver.start()
            leaver.join(LEAVE_S)
        if leaver.is_alive():
            _left_behind.set()
            log.warning("ray: has not answered for %g s, so this command ends without leaving it", LEAVE_S)


def left_behind() -> bool:
    """Return whether Ray did not let this process go, which must then end without running Python's exit handlers."""
    return _left_behind.is_set()


class Job(NamedTuple):
    """A job that was submitted to Ray; `copied` says whether it runs in Ray's copy of an uploaded folder."""

    copied: bool


def submitted_job() -> Job | None:
    """Return the submitted job whose driver is this process or one of its parents, or None."""
    if not environment.in_ray_job():
        return None
    return Job(copied="working_dir_files" in Path.cwd().parts)


def may_grow() -> bool:
    """Return whether nodes may join: true for a cluster named by RAY_ADDRESS, not for a local one."""
    return bool(environment.ray_address())


def count_workers(each: Mapping[str, float], free: bool = False) -> int:
    """Return how many workers fit into the cluster, node by node; draining nodes do not count.

    Args:
        each: resources per worker, for example {"CPU": 1, "GPU": 1}.
        free: count free resources only (summed over all nodes, because Ray does not report them per node).
    """
    import ray

    leaving = draining_nodes()
    # Ray's stubs have no types for these functions.
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    alive = [node["Resources"] for node in nodes if node["Alive"] and node["NodeID"] not in leaving]
    total = sum(_fitting(resources, each) for resources in alive)
    if not free:
        return total
    available: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    return min(total, _fitting(available, each))


def _fitting(resources: Mapping[str, float], each: Mapping[str, float]) -> int:
    # With a small tolerance: three workers of 0.1 fit into 0.3.
    return min(int(resources.get(key, 0.0) / amount + 1e-9) for key, amount in each.items() if amount > 0)


def draining_nodes() -> set[str]:
    """Return ids of draining nodes; empty if this version of Ray does not report them."""
    from ray._private.state import state  # not public outside a train worker

    ask = getattr(state, "get_draining_nodes", None)
    return set(ask()) if ask is not None else set()


def _is_loopback(address: str) -> bool:
    return address.startswith(("127.", "localhost:", "[::1]"))


def _check_listening(address: str) -> None:
    """Fail at once if nothing listens; Ray itself would retry for many minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "/" in host:
        return  # "auto", "ray://..." and similar: checked by Ray
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        reason = error.strerror or str(error)
        here = ": cluster/local.sh start" if _is_loopback(address) else ""
        raise ConfigError(
            f"RAY_ADDRESS={address}: no cluster answers ({reason}); start it{here}, or unset RAY_ADDRESS"
        ) from None


def node_memory(cpus_per_rank: float, gpus_per_rank: float, local_ranks: int | None) -> list[tuple[str, int, int]]:
    """Return (name, ranks that fit by CPUs and GPUs, memory in bytes) of the machines of a run.

    Args:
        cpus_per_rank, gpus_per_rank: resources that a rank requests from Ray.
        local_ranks: number of ranks on this machine without Ray; None asks the connected Ray.
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
