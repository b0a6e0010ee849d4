"""The prefetcher: order, errors where they belong, and a thread that ends."""

from __future__ import annotations

import threading
import time

import pytest

from mocme_dist.prefetch import Prefetcher


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_items_come_in_order_from_one_thread():
    makers = set()

    def make(step: int) -> int:
        makers.add(threading.current_thread().name)
        return step * 10

    with Prefetcher(map(make, range(3, 9))) as items:
        assert list(items) == [30, 40, 50, 60, 70, 80]
    assert makers == {"prefetch"}
    assert not prefetch_threads()


def test_an_empty_iterator_gives_nothing():
    with Prefetcher(iter(())) as items:
        assert list(items) == []


def test_work_runs_ahead_but_not_far():
    made = []
    with Prefetcher(map(made.append, range(100)), depth=2) as items:
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
    with Prefetcher(map(make, range(10))) as items, pytest.raises(ValueError, match="step 2 cannot be made"):
        for item in items:
            got.append(item)
    assert got == [0, 1]
    assert not prefetch_threads()


@pytest.mark.parametrize("taken", [0, 1])
def test_close_ends_a_thread_that_waits_for_room(taken):
    items = Prefetcher(iter(range(10**9)))
    stream = iter(items)
    assert [next(stream) for _ in range(taken)] == list(range(taken))
    start = time.monotonic()
    items.close()
    assert time.monotonic() - start < 60
    assert not prefetch_threads()


def test_leaving_by_an_error_ends_the_thread():
    with pytest.raises(RuntimeError, match="the step failed"), Prefetcher(iter(range(10**9))):
        raise RuntimeError("the step failed")
    assert not prefetch_threads()


def test_a_generator_that_closes_it_ends_the_thread():
    """As files are decoded ahead of their encoder: the encoder's loop may end early."""

    def ahead():
        with Prefetcher(iter(int, 1)) as items:
            yield from items

    endless = ahead()
    assert next(endless) == 0
    assert prefetch_threads()
    endless.close()
    assert not prefetch_threads()
