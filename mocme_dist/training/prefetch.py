"""Inputs that a background thread prepares before their step, and their way to the device of the steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mocme_dist.batching.batch import Batch
from mocme_dist.model.mine import Halves
from mocme_dist.parallel.exchange import Route
from mocme_dist.parallel.table import Merge
from mocme_dist.training.graph_step import GraphInput
from mocme_dist.training.step import EntityInput


class Prepared(NamedTuple):
    """Inputs of a micro-batch that do not depend on trained values.

    Attributes:
        rows_V: the route's rows on the host.
        halves: which rows train the statistics networks; None if the step estimates nothing.
        entities: inputs of the encoder without structure; None if they are looked up at the step.
        merge: of the rows of all micro-batches of the step, with the last of several.
        graph: inputs of a step that runs as a graph; batch and route are then on the host, and the rest is None.
        mark: see `DevicePrefetcher.mark`.
    """

    batch: Batch
    route: Route
    rows_V: Tensor
    halves: Halves | None
    entities: EntityInput | None
    merge: Merge | None
    graph: GraphInput | None
    mark: Any

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors that are sent to the device."""
        if self.graph is not None:
            yield from self.graph.tensors()
            return
        e = self.entities
        inputs = () if e is None else (*e.raw.values(), e.present_MV)
        more = *(self.halves or ()), *(self.merge or ())
        for value in (*vars(self.batch).values(), *vars(self.route).values(), *inputs, *more):
            if isinstance(value, Tensor):
                yield value


class DevicePrefetcher:
    """Copies tensors to the device of the steps while a step runs there.

    On a GPU they are copied from pinned memory on a separate stream, and the host does not wait: a mark records where
    the copies of a micro-batch end, and the stream of the step waits for it. On a CPU nothing is copied or waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            # Features that are on the device already were put there by the current stream.
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def in_background(self) -> AbstractContextManager[object]:
        """Return a context for the background thread, whose work on the device runs beside the step's."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def send(self, value: Tensor) -> Tensor:
        """Return `value` on the device, copied in the order of the current stream; the host does not wait."""
        if value.device.type == self.device.type:
            return value
        return value.pin_memory().to(self.device, non_blocking=True)

    def mark(self) -> Any:
        """Return an event after all copies so far; None if nothing is copied."""
        return None if self._stream is None else self._stream.record_event()

    def receive(self, mark: Any, values: Iterable[Tensor]) -> None:
        """Make the current stream wait for a mark before it uses `values`, which were sent before it."""
        if mark is None:
            return
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(mark)
        for value in values:
            # Otherwise their memory, freed by the host, would go to the next batch while this step still reads it.
            value.record_stream(stream)
