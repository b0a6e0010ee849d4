"""What a store behind HTTP costs: `python -m tools.bench.storage [--quick]`, an S3 server of moto's on loopback, s3fs as its client.

Sending many files as one batch against one by one, and what saving a checkpoint at the URL of a run adds to writing it
on this disk. Requests are counted, because on a real store each costs ten to a hundred times its time here.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mocme_dist.data.storage import Mirror
from mocme_dist.parallel.comm import communication
from mocme_dist.parallel.table import EntityTable
from mocme_dist.partition import RowPartition
from mocme_dist.training.checkpoint import Saver, find
from mocme_dist.training.lease import Lease
from mocme_dist.training.remote import shown
from mocme_dist.training.remote_saver import RemoteSaver
from tools.bench.common import finish, row

SERVE = """
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, False)
server.start()
print(*server.get_host_and_port(), flush=True)
input()
"""


@contextmanager
def store() -> Iterator[str]:
    """An empty bucket on a server of its own process; its address, with this process's environment made to match."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert server.stdout is not None
    try:
        host, port = server.stdout.readline().split()
        keys = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing", "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ.update(keys | {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "NO_PROXY": host})
        Mirror("s3://bench/x").files.mkdir("bench")
        yield "s3://bench"
    finally:
        server.kill()
        server.wait()


@contextmanager
def counted() -> Iterator[list[str]]:
    """Names of the S3 operations that are asked for meanwhile."""
    import s3fs

    asked: list[str] = []
    original = s3fs.S3FileSystem._call_s3

    async def call(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        asked.append(method)
        return await original(self, method, *args, **kwargs)

    s3fs.S3FileSystem._call_s3 = call
    try:
        yield asked
    finally:
        s3fs.S3FileSystem._call_s3 = original


def timed(action: Callable[[], object]) -> tuple[float, int]:
    """Seconds and requests of a call."""
    with counted() as asked:
        start = time.perf_counter()
        action()
        return time.perf_counter() - start, len(asked)


def _push_all(mirror: Mirror, batches: list[list[str]]) -> None:
    for batch in batches:
        mirror.push(batch)


def push(url: str, files: int) -> tuple[bool, list[dict[str, Any]]]:
    """A batch against one push a file."""
    figures, listings = [], []
    for name in ("batch", "single"):
        mirror = Mirror(f"{url}/{name}")
        names = [f"parts/{number:05d}" for number in range(files)]
        for each in names:
            (mirror.path / each).parent.mkdir(parents=True, exist_ok=True)
            (mirror.path / each).write_bytes(each.encode() * 100)
        batches = [names] if name == "batch" else [[each] for each in names]
        figures.append(timed(partial(_push_all, mirror, batches)))
        listings.append({each: version.split()[0] for each, version in mirror.listing().items()})
        assert Mirror(f"{url}/{name}").pull() == []
    (batch_s, batch_requests), (single_s, single_requests) = figures
    return listings[0] == listings[1] and len(listings[0]) == files, [
        row("push_batch_ms_per_file", batch_s / files * 1e3, "ms"),
        row("push_batch_requests_per_file", batch_requests / files, ""),
        row("push_single_requests_per_file", single_requests / files, ""),
        row("push_batch_speed_up", single_s / batch_s, "times", ">= 1"),
    ]


def save(url: str, rows: int, repeats: int) -> tuple[bool, list[dict[str, Any]]]:
    """Checkpoints of one rank at a URL against the same in a folder."""
    with communication(60) as comm, tempfile.TemporaryDirectory() as folder:
        table = EntityTable(RowPartition(rows, 1), 0, 64, learning_rate=0.01)
        dense = {"value/weight": torch.ones(1000)}
        lease = Lease(Mirror(f"{url}/run"))
        savers = Saver(Path(folder), 2, comm), RemoteSaver(Mirror(f"{url}/run"), 2, comm, lease.held, lambda: None)
        times: tuple[list[float], list[float]] = ([], [])
        for step in range(repeats):
            for saver, taken in zip(savers, times, strict=True):
                seconds, requests = timed(partial(saver.save, step, table, dense, {"metric": step}))
                taken.append(seconds)
        newest = shown(Mirror(f"{url}/run"))[0], find(Path(folder), "auto")
        files = [saved and {name: entry["sha256"] for name, entry in saved.manifest["files"].items()} for saved in newest]
        lease.release()
    return files[0] == files[1], [
        row("save_folder_ms", sorted(times[0])[repeats // 2] * 1e3, "ms"),
        row("save_url_ms", sorted(times[1])[repeats // 2] * 1e3, "ms"),
        row("save_url_requests", requests, ""),
    ]


def main() -> None:
    """Both subjects in one run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache, store() as url:
        os.environ["MOCME_CACHE"] = cache
        pushed, push_rows = push(url, 50 if quick else 300)
        saved, save_rows = save(url, 10_000, 6 if quick else 20)
    finish("storage", pushed and saved, [*push_rows, *save_rows])


if __name__ == "__main__":
    main()
