"""Makes Ray Train's workers ranks of one process group. Imported only under Ray.

Ray's own backend for torch opens a store on every interface of rank 0's machine, to any client. This one listens only
on the address by which Ray knows the machine, and puts each rank on the device that the configuration asks for.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

from mocme_dist.errors import RankError
from mocme_dist.parallel.comm import make_group, pick_device
from mocme_dist.parallel.meeting import join_store, listen, listen_beside, open_store

# Socket of rank 0, from the time it listens until its store takes it over.
_listening: list[socket.socket] = []


@dataclass
class RanksConfig(TorchConfig):
    """Ray Train's settings for a group of ranks.

    Attributes:
        gpus: number of GPUs per rank; 0 selects the CPU even if torch sees GPUs.
    """

    gpus: float = 0.0

    @property
    def backend_cls(self) -> type[_Ranks]:
        """Return the backend that makes the group."""
        return _Ranks

    @property
    def train_func_context(self) -> Callable[[], AbstractContextManager[None]]:
        """Return an empty context: Ray's would put the rank on a GPU that it did not ask for."""
        return nullcontext


class CarriedFunction:
    """Brings the function of the workers to them by value, in place of Ray Train's reference to an object.

    Ray's core ends a driver that owns objects of a lost raylet, with exit code 1 and within a tenth of a second: it
    tries to recover them in a store that is gone. Without such objects the driver lives on, and `ray_loss` ends it.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def get(self) -> Callable[[], None]:
        """Return the function."""
        return self._function


def carry_functions_by_value() -> None:
    """Make trainers of this process use `CarriedFunction`; keeps Ray's reference where Ray has none under this name."""
    from ray.train.v2.api import data_parallel_trainer

    if hasattr(data_parallel_trainer, "ObjectRefWrapper"):
        data_parallel_trainer.ObjectRefWrapper = CarriedFunction  # type: ignore[assignment,misc]


class _Ranks(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        host, port = worker_group.execute_single(0, _listen)
        worker_group.execute(_set_torch_distributed_env_vars)
        joining = [
            worker_group.execute_single_async(
                rank, _join, host, port, rank, len(worker_group), backend_config.gpus, backend_config.timeout_s
            )
            for rank in range(len(worker_group))
        ]
        limit_s = backend_config.timeout_s + 60  # the group's own limit comes first, and says more
        try:
            ray.get(joining, timeout=limit_s)
        except GetTimeoutError:
            raise RankError(f"waited {limit_s} s for {len(joining)} ranks to join their group") from None


def _listen() -> tuple[str, int]:
    host = ray.util.get_node_ip_address()
    _listening[:] = [listen(host)]
    return host, _listening[0].getsockname()[1]


def _join(host: str, port: int, rank: int, world_size: int, gpus: float, timeout_s: int) -> None:
    listen_beside(host)
    timeout = timedelta(seconds=timeout_s)
    store = open_store(_listening.pop(), timeout) if rank == 0 else join_store(host, port, timeout)
    # The task reports a GPU that torch does not see: an error here would count as workers that could not be placed.
    device = pick_device(gpus if torch.cuda.is_available() else 0)
    make_group(device, store, rank, world_size, timeout_s)
