"""Several gloo ranks inside a test: forked from a server that has torch in memory, joined over a file store.

A body gets the rank's `Comm` first, then the test's arguments; it stands at the top of a test module, because ranks
find it by name. What it returns comes back by rank; when one fails, the test fails with the trace of each rank.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

# Only a hang comes near: on a machine with other work a body takes many times as long as alone.
TIMEOUT_S, COLLECTIVE_S = 400, 200
# A rank that failed leaves others in a collective; they get so long to notice by themselves.
GRACE_S = 5


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ranks_preload"])
    here = str(Path(__file__).resolve().parent)
    known = os.environ.get("PYTHONPATH", "")
    if here not in known.split(os.pathsep):
        # The server imports the preload module before it learns this process's sys.path, and hides its absence.
        os.environ["PYTHONPATH"] = os.pathsep.join([here, *([known] if known else [])])
        try:
            from multiprocessing.forkserver import ensure_running

            ensure_running()
        finally:
            os.environ.pop("PYTHONPATH")
            if known:
                os.environ["PYTHONPATH"] = known
    return context


def _rank(body: Callable[..., Any], rank: int, world: int, store: str, args: tuple[Any, ...], pipe: Any) -> None:
    """One rank: join, run the body, send back its result or its trace."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        import torch
        import torch.distributed as dist

        from mocme_dist.parallel.comm import communication

        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=COLLECTIVE_S),
        )
        with communication(COLLECTIVE_S) as comm:
            result = body(comm, *args)
        pipe.send_bytes(pickle.dumps((True, result)))
        # Together: a rank that leaves first would close connections that the others still use.
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        pipe.close()


def _answer(pipe: Any, rank: int) -> tuple[bool, Any]:
    try:
        ok, value = pickle.loads(pipe.recv_bytes())
    except EOFError:
        return False, f"rank {rank} died without a word"
    return ok, value


def run(world: int, body: Callable[..., Any], *args: Any) -> list[Any]:
    """`body(comm, *args)` on `world` ranks; their results in order of rank.

    Raises:
        AssertionError: a rank raised, died or took longer than TIMEOUT_S; the text has every trace.
    """
    context = _context()
    with tempfile.TemporaryDirectory(prefix="mocme-ranks-") as folder:
        ranks = []
        for rank in range(world):
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank, args=(body, rank, world, f"{folder}/store", args, theirs), daemon=True
            )
            process.start()
            theirs.close()
            ranks.append((process, mine))
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + TIMEOUT_S
        while len(answers) < world and time.monotonic() < deadline:
            waiting = {ranks[rank][1]: rank for rank in range(world) if rank not in answers}
            for pipe in multiprocessing.connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic())):
                answers[waiting[pipe]] = _answer(pipe, waiting[pipe])
                if not answers[waiting[pipe]][0]:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        for process, pipe in ranks:
            process.join(timeout=GRACE_S if len(answers) == world else 0)
            if process.is_alive():
                process.kill()
                process.join()
            pipe.close()
    failed = [f"rank {rank} of {world}:\n{value}" for rank, (ok, value) in sorted(answers.items()) if not ok]
    missing = [f"rank {rank} of {world}: no answer" for rank in range(world) if rank not in answers]
    assert not failed and not missing, "\n".join([*failed, *missing])
    return [answers[rank][1] for rank in range(world)]
