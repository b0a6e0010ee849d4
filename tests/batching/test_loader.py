"""The prefetcher: order, errors where they belong, and a thread that ends."""

from __future__ import annotations

import threading
import time

import pytest

from mocme_dist.batching.loader import Prefetcher


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_items_come_in_order_from_one_thread():
    makers = set()

    def make(step: int) -> int:
        makers.add(threading.current_thread().name)
        return step * 10

    with Prefetcher(make, 3, 9) as items:
        assert list(items) == [30, 40, 50, 60, 70, 80]
    assert makers == {"prefetch"}
    assert not prefetch_threads()


def test_an_empty_range_gives_nothing():
    with Prefetcher(lambda step: step, 5, 5) as items:
        assert list(items) == []


def test_work_runs_ahead_but_not_far():
    made = []
    with Prefetcher(made.append, 0, 100, depth=2) as items:
        stream = iter(items)
        for taken in range(1, 4):
            next(stream)
            deadline = time.monotonic() + 60
            while len(made) < taken + 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.05)
            # Two wait in the queue, and one is held until there is room.
            assert taken + 2 <= len(made) <= taken + 3


def test_an_error_comes_where_the_item_would_have_come():
    def make(step: int) -> int:
        if step == 2:
            raise ValueError("step 2 cannot be made")
        return step

    got = []
    with Prefetcher(make, 0, 10) as items, pytest.raises(ValueError, match="step 2 cannot be made"):
        for item in items:
            got.append(item)
    assert got == [0, 1]
    assert not prefetch_threads()


@pytest.mark.parametrize("taken", [0, 1])
def test_close_ends_a_thread_that_waits_for_room(taken):
    items = Prefetcher(lambda step: step, 0, 10**9)
    stream = iter(items)
    assert [next(stream) for _ in range(taken)] == list(range(taken))
    start = time.monotonic()
    items.close()
    assert time.monotonic() - start < 60
    assert not prefetch_threads()


def test_leaving_by_an_error_ends_the_thread():
    with pytest.raises(RuntimeError, match="the step failed"), Prefetcher(lambda step: step, 0, 10**9):
        raise RuntimeError("the step failed")
    assert not prefetch_threads()
