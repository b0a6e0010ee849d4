"""How long a question takes.

A bundle of 5e6 x 256 against one pass over its bytes, a small graph, and the command's start.

    python -m tools.bench.query [--quick] [--dtype float16]

The bundle is real (every file that export writes), its vectors random; 6 GB for the whole size, in a temporary folder,
or in --dir, where it stays and is used again. It is read through the page cache, warm. `stream_ms` maps the same files
and takes the exclusive or of all their words with the same threads: nothing less reads every byte. `query_ms` is a
whole question in words: names, known answers, rotation, the scan, the top ten, their probabilities and names.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mocme_dist.data.known import KnownAnswers
from mocme_dist.data.tensors import write_tensors
from mocme_dist.data.vocabulary import write_names
from mocme_dist.kernels import scan
from mocme_dist.serving.bundle import Bundle
from mocme_dist.serving.bundle_format import CARD, FORMAT, MANIFEST, file_entries, part_name
from mocme_dist.serving.predict import Question, predict
from tools.bench.common import finish, measure, row

RELATIONS = 20


def make_bundle(folder: Path, num_entities: int, width: int, dtype: str) -> Bundle:
    """A bundle of random vectors, with four facts an entity; the one that is there already, if there is one."""
    if (folder / MANIFEST).is_file():
        return Bundle.open(folder)
    folder.mkdir(parents=True)
    gen = np.random.default_rng(0)
    part_rows = min(1 << 16, num_entities)
    for part, first in enumerate(range(0, num_entities, part_rows)):
        n = min(part_rows, num_entities - first)
        write_tensors(
            folder / part_name("vectors", part),
            {"vectors": gen.standard_normal((n, width), np.float32).astype(dtype)},
            {},
        )
        write_tensors(folder / part_name("modalities", part), {"weights": np.ones((n, 1), np.float32)}, {})
    write_tensors(
        folder / "relations.safetensors", {"phases": gen.uniform(-3, 3, (RELATIONS, width // 2)).astype(np.float32)}, {}
    )
    write_names(folder / "entities.parquet", [f"entity number {number}".encode() for number in range(num_entities)])
    write_names(folder / "relations.parquet", [f"relation {number}".encode() for number in range(RELATIONS)])
    head, tail = gen.integers(num_entities, size=(2, 4 * num_entities))
    triples = np.stack([head, gen.integers(RELATIONS, size=len(head)), tail], axis=1)
    known = KnownAnswers.build(triples, RELATIONS)
    none = KnownAnswers.build(triples[:0], RELATIONS)
    for name, answers in (("all", known), ("train", known), ("valid", none), ("test", none)):
        answers.save(folder, name)
    (folder / CARD).write_text("# Random vectors\n")
    manifest = {
        "format": FORMAT,
        "kind": "bundle",
        "num_entities": num_entities,
        "num_relations": RELATIONS,
        "width": width,
        "gamma": 12.0,
        "part_rows": part_rows,
        "modalities": ["structure"],
        "views": False,
        "reflexive": [],
        "calibration": {"directions": [[0.0, 1.0, -1.0]] * 2, "relations": []},
        "files": file_entries(folder),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return Bundle.open(folder)


def stream(parts: list[NDArray[Any]]) -> int:
    """Read every byte once, with as many threads as a query uses."""
    words = [part.reshape(-1).view(np.uint64) for part in parts]
    with ThreadPoolExecutor(scan.num_threads()) as pool:
        return int(np.bitwise_xor.reduce(list(pool.map(np.bitwise_xor.reduce, words))))


def check_parity(bundle: Bundle) -> bool:
    """Whether the compiled scan of the first rows gives what numpy gives."""
    rows = [part[:20_000] for part in bundle.vector_parts[:2]]
    query = np.random.default_rng(1).standard_normal((2, bundle.width), np.float32)
    ours, plain = scan.nearest(rows, query, 10), scan.nearest(rows, query, 10, compiled=False)
    return bool(np.array_equal(ours.id_Qk, plain.id_Qk) and np.allclose(ours.distance_Qk, plain.distance_Qk, rtol=1e-5))


def torch_scan(bundle: Bundle, query_D: NDArray[np.float32]) -> NDArray[np.int64]:
    """The same by eager torch, tile by tile, as one would write it first."""
    import torch

    query, best_d, best_i, first, C = (
        torch.from_numpy(query_D),
        torch.zeros(0),
        torch.zeros(0, dtype=torch.long),
        0,
        bundle.width // 2,
    )
    for part in bundle.vector_parts:
        for tile in torch.from_numpy(np.asarray(part)).split(8192):
            square = (tile.float() - query).square_()
            distance = (square[:, :C] + square[:, C:]).sqrt_().sum(1)
            both, ids = torch.cat([best_d, distance]), torch.cat([best_i, torch.arange(first, first + len(tile))])
            best_d, at = both.topk(min(10, len(both)), largest=False)
            best_i, first = ids[at], first + len(tile)
    return best_i.numpy()


def startup_seconds(folder: Path, repeats: int) -> tuple[float, float]:
    """Wall seconds of the whole command on a small graph.

    The first time (the kernel may be compiled) and the median of the rest.
    """
    command = [
        sys.executable,
        "-m",
        "mocme_dist.query",
        str(folder),
        "--head",
        "entity number 7",
        "--relation",
        "relation 3",
        "--json",
    ]
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return times[0], statistics.median(times[1:])


def main() -> None:
    """Make the bundles, check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5e5 entities instead of 5e6")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of the vectors on disk")
    parser.add_argument("--dir", type=Path, help="where the bundles lie, to be used again")
    parser.add_argument("--slow-twins", action="store_true", help="also time the scan by numpy and by eager torch")
    args = parser.parse_args()
    E = 500_000 if args.quick else 5_000_000
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.dir or Path(temporary)
        bundle = make_bundle(folder / f"{E}-{args.dtype}", E, 256, args.dtype)
        small = folder / f"15000-{args.dtype}"
        little = make_bundle(small, 15_000, 256, args.dtype)
        parity = check_parity(bundle)
        numbers = iter(range(1000))
        ask = lambda b: predict(b, [Question(f"entity number {next(numbers)}", "relation 3", None)], 10)  # noqa: E731
        query = np.random.default_rng(2).standard_normal((1, 256), np.float32)
        # In turn, so that a change of the machine's mood meets both.
        works = (
            lambda: stream(bundle.vector_parts),
            lambda: scan.nearest(bundle.vector_parts, query, 10),
            lambda: ask(bundle),
        )
        pairs = [[measure(work, 1, 3)[0] for work in works] for _ in range(5)]
        stream_ms, scan_ms, query_ms = (statistics.median(column) for column in zip(*pairs, strict=True))
        small_ms, small_p90 = measure(lambda: ask(little), 5, 50)
        start = time.perf_counter()
        bundle.entities.suggest("entitty numbr 77777")
        suggest_s = time.perf_counter() - start
        first_s, startup_s = startup_seconds(small, 5)
        rows = [
            row("query_over_stream", query_ms / stream_ms, "ratio", "<= 1.5"),
            row("small_graph_ms", small_ms, "ms", "< 50"),
            row("startup_s", startup_s, "s", "< 3"),
            row("scan_over_stream", scan_ms / stream_ms, "ratio"),
            row("stream_ms", stream_ms, "ms"),
            row("query_ms", query_ms, "ms"),
            row("stream_gb_per_s", sum(part.nbytes for part in bundle.vector_parts) / stream_ms / 1e6, "GB/s"),
            row("small_graph_p90_ms", small_p90, "ms"),
            row("first_start_s", first_s, "s"),
            row("suggest_s", suggest_s, "s"),
        ]
        if args.slow_twins:
            rows.append(
                row(
                    "numpy_scan_ms",
                    measure(lambda: scan.nearest(bundle.vector_parts, query, 10, compiled=False), 0, 2)[0],
                    "ms",
                )
            )
            rows.append(row("torch_scan_ms", measure(lambda: torch_scan(bundle, query[0]), 0, 2)[0], "ms"))
            command = [
                sys.executable,
                "-c",
                "import time; t = time.perf_counter(); import torch; print(time.perf_counter() - t)",
            ]
            rows.append(
                row(
                    "import_torch_s",
                    float(subprocess.run(command, capture_output=True, text=True, check=True).stdout),
                    "s",
                )
            )
        finish("query", parity, rows, entities=E, width=256, dtype=args.dtype, threads=scan.num_threads())


if __name__ == "__main__":
    main()
