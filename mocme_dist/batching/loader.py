"""Prepares what the next steps need while the current one runs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")
# How many items wait for the step that takes them; one more is being made, or held until there is room.
DEPTH = 2


class Prefetcher(Generic[Item]):
    """Calls `make(step)` for step = first, first + 1, ... before `last` in one thread, at most `depth` ahead.

    Items come in order. An error of `make` is raised where the item would have come. `close` ends the thread;
    as a context manager it closes itself.
    """

    def __init__(self, make: Callable[[int], Item], first: int, last: int, depth: int = DEPTH) -> None:
        self._queue: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._range = range(first, last)
        self._thread = threading.Thread(target=self._run, args=(make,), name="prefetch", daemon=True)
        self._thread.start()

    def _put(self, entry: tuple[Item | None, BaseException | None]) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(entry, timeout=0.2)
                return
            except queue.Full:
                continue

    def _run(self, make: Callable[[int], Item]) -> None:
        for step in self._range:
            if self._stop.is_set():
                return
            try:
                item = make(step)
            except BaseException as error:
                self._put((None, error))
                return
            self._put((item, None))

    def __iter__(self) -> Iterator[Item]:
        for _ in self._range:
            item, error = self._queue.get()
            if error is not None:
                raise error
            yield item  # type: ignore[misc]

    def close(self) -> None:
        """Stop the thread; items already made are dropped."""
        self._stop.set()
        self._thread.join(timeout=60)

    def __enter__(self) -> Prefetcher[Item]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
