"""Produces items of an iterator in a background thread, a few ahead of their use: batches of steps, decoded files.

A thread that hangs, on a disk that does not answer or in a library, would make its consumer wait for ever: after a
time in which nothing comes, the consumer gets an error that says what it waited for.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from mocme_dist.errors import StorageError

Item = TypeVar("Item")
# Items that wait for the consumer; one more is being produced, or held until there is room.
DEPTH = 2
# How long an item may take (seconds).
LIMIT_S = 1800.0


class Prefetcher(Generic[Item]):
    """The items of an iterable in order, produced by one thread at most `depth` ahead.

    An error of the iterable is raised in place of the item. `close` ends the thread, as does leaving the context.

    Args:
        items: the iterable.
        depth: number of items that may wait for the consumer.
        what: an item, for the error if none comes.
        limit_s: how long an item may take (seconds).
        alive: returns a value that changes while the iterable works on an item; each change starts the time anew.
        close_s: how long `close` waits for the thread (seconds).
    """

    def __init__(
        self,
        items: Iterable[Item],
        depth: int = DEPTH,
        what: str = "the next item",
        limit_s: float | None = None,
        alive: Callable[[], object] = lambda: None,
        close_s: float = 60.0,
    ) -> None:
        self.what, self.alive, self.close_s = what, alive, close_s
        self.limit_s = LIMIT_S if limit_s is None else limit_s
        self._queue: queue.Queue[tuple[bool, Item | BaseException | None]] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(items,), name="prefetch", daemon=True)
        self._thread.start()

    def _put(self, is_item: bool, value: Item | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put((is_item, value), timeout=0.2)
                return
            except queue.Full:
                continue

    def _run(self, items: Iterable[Item]) -> None:
        try:
            for item in items:
                self._put(True, item)
                if self._stop.is_set():
                    return
            self._put(False, None)
        except BaseException as error:
            self._put(False, error)

    def __iter__(self) -> Iterator[Item]:
        while True:
            is_item, value = self._next()
            if is_item:
                yield value  # type: ignore[misc]
            elif value is None:
                return
            else:
                raise value  # type: ignore[misc]

    def _next(self) -> tuple[bool, Item | BaseException | None]:
        seen, since = self.alive(), time.monotonic()
        while True:
            try:
                return self._queue.get(timeout=min(1.0, self.limit_s))
            except queue.Empty:
                pass
            if (now := self.alive()) != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since >= self.limit_s:
                self._stop.set()
                raise StorageError(
                    f"waited {self.limit_s:g} s for {self.what}, and nothing came: a disk or store does not answer, or "
                    "a library hangs; run the same command again"
                )

    def close(self) -> None:
        """Stop the thread; items already produced are dropped. A thread that hangs is left behind."""
        self._stop.set()
        self._thread.join(timeout=min(self.close_s, self.limit_s))

    def __enter__(self) -> Prefetcher[Item]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
