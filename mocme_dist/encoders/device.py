"""Copies between host memory and the device of an encoder, overlapped with its computation on a GPU.

Inputs go from pinned memory to the GPU on a stream of their own, so the next batch is copied while the network computes
the last one. Features come back to pinned memory without a wait of the host; `Overlapped.launch` returns a function
that waits for them. On a CPU both are plain conversions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Fetch = Callable[[], np.ndarray]  # waits for features (n, F) float32 and returns them


class Copies:
    """Copies of one encoder to its device and back.

    Args:
        device: device of the network, "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def to_device(self, host: Tensor) -> Tensor:
        """Return `host` on the device; on a GPU the copy overlaps with kernels that were launched before it."""
        if self._stream is None:
            return host.to(self.device)
        pinned = host if host.is_pinned() else host.pin_memory()
        with torch.cuda.stream(self._stream):
            copied = pinned.to(self.device, non_blocking=True)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._stream)
        # its memory belongs to the copying stream: it must not be reused there before the computation has read it
        copied.record_stream(computing)
        return copied

    def fetch(self, values: Tensor) -> Fetch:
        """Start the copy of `values` to the host, and return a function that waits for it."""
        if self._stream is None:
            array: np.ndarray = values.numpy()
            return lambda: array
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self.device))

        def wait() -> np.ndarray:
            copied.synchronize()
            return np.asarray(host.numpy())

        return wait


class Overlapped(ABC):
    """An encoder whose host may prepare the next batch while its device computes the last one."""

    @abstractmethod
    def launch(self, batch: Any) -> Fetch:
        """Start encoding a batch of `collate`, and return a function that waits for its features (n, F) float32."""

    def encode(self, batch: Any) -> np.ndarray:
        """Return (n, F) float32 features of a batch, one row per piece."""
        return self.launch(batch)()
