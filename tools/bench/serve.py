"""Load test of the endpoint: `python -m tools.bench.serve [--demo BUNDLE] [--entities 1000000]`.

Starts `mocme serve` on loopback, asks it with concurrent clients over kept connections, and compares the time per
request with the time that answering one question takes in this process, without HTTP. Parity: the endpoint's answers
are those of `predict`. One bundle is the demo's, the other has random vectors (as in tools.bench.query).
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mocme_dist.serving.bundle import Bundle
from mocme_dist.serving.predict import Question, predict
from tools.bench.common import finish, row
from tools.bench.query import make_bundle


class Load(NamedTuple):
    """What a load gave: seconds in all, and the milliseconds of each request."""

    seconds: float
    times_ms: list[float]

    def at(self, share: float) -> float:
        """Return a quantile of the requests' times in milliseconds."""
        return float(np.quantile(self.times_ms, share))


class Endpoint:
    """`mocme serve` over one bundle."""

    def __init__(self, bundle: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "mocme_dist.serve", f"served={bundle}", "--port", "0", *arguments]
        start = time.perf_counter()
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.startup_s = time.perf_counter() - start
        self.startup_cpu_s = self.cpu_s()
        if not line:
            raise RuntimeError("the endpoint did not start")
        self.port = int(line.rsplit(":", 1)[1])

    def cpu_s(self) -> float:
        """Return the CPU seconds of the server so far: what a loaded machine does not stretch."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9

    def connect(self) -> http.client.HTTPConnection:
        """Return a connection that is kept open."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)

    def stop(self) -> None:
        """End the server."""
        self.process.terminate()
        self.process.wait(30)


def ask(connection: http.client.HTTPConnection, head: str, relation: str) -> Any:
    """Return the answers to one question."""
    connection.request("GET", f"/predict?{urllib.parse.urlencode({'head': head, 'relation': relation, 'top': 10})}")
    response = connection.getresponse()
    content = response.read()
    if response.status != 200:
        raise RuntimeError(f"{response.status}: {content[:200]!r}")
    return json.loads(content)["answers"]


def load(endpoint: Endpoint, questions: list[tuple[str, str]], clients: int) -> Load:
    """Ask all questions from `clients` threads, each over its own connection, as fast as they are answered."""
    times: list[list[float]] = [[] for _ in range(clients)]

    def work(client: int) -> None:
        connection = endpoint.connect()
        for head, relation in questions[client::clients]:
            start = time.perf_counter()
            ask(connection, head, relation)
            times[client].append(1e3 * (time.perf_counter() - start))
        connection.close()

    threads = [threading.Thread(target=work, args=(client,)) for client in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Load(time.perf_counter() - start, [value for own in times for value in own])


def questions_of(bundle: Bundle, count: int) -> list[tuple[str, str]]:
    """Return `count` questions for tails: heads and relations of facts of the graph, else of any entity."""
    generator = np.random.default_rng(0)
    keys = np.asarray(bundle.known.keys)
    keys = keys[keys % 2 == 0]
    if len(keys):
        chosen = keys[generator.integers(len(keys), size=count)] // 2
        heads, relations = chosen // bundle.num_relations, chosen % bundle.num_relations
    else:
        heads = generator.integers(bundle.num_entities, size=count)
        relations = generator.integers(bundle.num_relations, size=count)
    return list(zip(bundle.entities.take(heads), bundle.relations.take(relations), strict=True))


def measured(name: str, place: Path, count: int, clients: int) -> tuple[bool, list[dict[str, Any]]]:
    """Return parity and the rows of one bundle."""
    bundle = Bundle.open(place)
    asked = questions_of(bundle, count)
    endpoint = Endpoint(place)
    try:
        used, start = endpoint.cpu_s(), time.perf_counter()
        connection = endpoint.connect()
        first = ask(connection, *asked[0])
        first_ms = 1e3 * (time.perf_counter() - start)
        first_cpu_ms = 1e3 * (endpoint.cpu_s() - used)
        own = predict(bundle, [Question(asked[0][0], asked[0][1], None)], 10)
        scores = [answer["score"] for answer in first]
        parity = len(scores) == len(own.score) and bool(np.allclose(scores, own.score, atol=1e-3))
        load(endpoint, asked[: 4 * clients], clients)
        pairs = []
        # In turn, so that a change of the machine's load meets both.
        for part in range(4):
            some = asked[part * count // 4 : (part + 1) * count // 4]
            alone = []
            for head, relation in some[: max(6, len(some) // 8)]:
                start = time.perf_counter()
                predict(bundle, [Question(head, relation, None)], 10)
                alone.append(1e3 * (time.perf_counter() - start))
            pairs.append((statistics.median(alone), load(endpoint, some, clients)))
        one = load(endpoint, asked[: max(8, count // 8)], 1)
    finally:
        endpoint.stop()
    together = Load(sum(own.seconds for _, own in pairs), [value for _, own in pairs for value in own.times_ms])
    alone_ms = statistics.median(value for value, _ in pairs)
    each_ms = statistics.median(1e3 * own.seconds / len(own.times_ms) for _, own in pairs)
    tails = [own.at(0.99) / own.at(0.5) for _, own in pairs]
    return parity, [
        row(
            f"{name}_request_over_scan",
            statistics.median(1e3 * own.seconds / len(own.times_ms) / value for value, own in pairs),
            "ratio",
            "<= 1.5",
        ),
        row(f"{name}_p99_over_p50", statistics.median(tails), "ratio", "<= 4"),
        row(f"{name}_startup_s", endpoint.startup_s, "s", "<= 10"),
        row(f"{name}_first_answer_ms", first_ms, "ms", "<= 100" if name == "demo" else ""),
        row(f"{name}_startup_cpu_s", endpoint.startup_cpu_s, "s of CPU"),
        row(f"{name}_first_answer_cpu_ms", first_cpu_ms, "ms of CPU"),
        row(f"{name}_scan_ms", alone_ms, "ms"),
        row(f"{name}_ms_per_request", each_ms, "ms"),
        row(f"{name}_requests_per_s", len(together.times_ms) / together.seconds, "requests/s"),
        row(f"{name}_p50_ms", together.at(0.5), "ms"),
        row(f"{name}_p99_ms", together.at(0.99), "ms"),
        row(f"{name}_one_client_p50_ms", one.at(0.5), "ms"),
    ]


def main() -> None:
    """Make what is missing, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="the demo's bundle; without it 15,000 random entities stand in")
    parser.add_argument("--entities", type=int, default=1_000_000, help="of the large bundle; 0 leaves it out")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--dir", type=Path, help="where the random bundles lie, to be used again")
    parser.add_argument(
        "--requests", type=int, default=2000, help="to the small bundle; an eighth of them to the large one"
    )
    parser.add_argument("--quick", action="store_true", help="fewer requests, 200,000 entities")
    args = parser.parse_args()
    entities = min(args.entities, 200_000) if args.quick else args.entities
    many = min(args.requests, 200) if args.quick else args.requests
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.dir or Path(temporary)
        small = args.demo or folder / "15000-float32"
        if args.demo is None:
            make_bundle(small, 15_000, 256, "float32")
        parity, rows = measured("demo" if args.demo else "small", small, many, args.clients)
        if entities:
            large = folder / f"{entities}-float32"
            make_bundle(large, entities, 256, "float32")
            good, more = measured("large", large, many // 8, args.clients)
            parity, rows = parity and good, rows + more
    finish("serve", parity, rows, clients=args.clients, entities=entities, cpus=len(os.sched_getaffinity(0)))


if __name__ == "__main__":
    main()
