"""What a background thread makes ahead of a step, and how it gets to the step's device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mocme_dist.batching.batch import Batch
from mocme_dist.parallel.exchange import Route
from mocme_dist.training.step import EntityInput


class Prepared(NamedTuple):
    """What a part of a step needs that training does not change.

    known: what encoding needs but the structure, where that is looked up ahead. sent: see `Courier.mark`.
    """

    batch: Batch
    route: Route
    known: EntityInput | None
    sent: Any

    def tensors(self) -> Iterator[Tensor]:
        """All of its tensors."""
        known = () if self.known is None else (*self.known.raw.values(), self.known.present_MV, self.known.held_out_V)
        values = (*vars(self.batch).values(), *vars(self.route).values(), *known)
        return (value for value in values if isinstance(value, Tensor))


class Courier:
    """Brings tensors to the device of the steps while a step runs there.

    On a GPU they are copied from pinned memory on a stream of the courier's own, and nobody waits but the device: a mark
    says where the copies of a part end, and the step's stream goes on behind it. On a CPU nothing is copied or waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            # What lies on the device already, features perhaps, was put there by the stream of now.
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def beside(self) -> AbstractContextManager[object]:
        """Around what the background thread does: its work on the device goes beside the step's."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def send(self, value: Tensor) -> Tensor:
        """`value` on the device, in the order of the current stream; the host does not wait for the copy."""
        if value.device.type == self.device.type:
            return value
        return value.pin_memory().to(self.device, non_blocking=True)

    def mark(self) -> Any:
        """An event behind all that was sent beside the step so far; None where nothing is copied."""
        return None if self._stream is None else self._stream.record_event()

    def receive(self, sent: Any, values: Iterable[Tensor]) -> None:
        """Let the current stream wait for a mark before it uses `values`, which came before it."""
        if sent is None:
            return
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(sent)
        for value in values:
            # Freed by the host, their memory would go to the next batch while this step still reads it.
            value.record_stream(stream)
