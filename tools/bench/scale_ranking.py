"""Ranking over several processes for tools/bench/scale.py: exact ranks, their speed, and what plain scoring reaches."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mocme_dist.data.known import KnownAnswers
from mocme_dist.evaluation.ranking import Queries, RowShard, Sizes, rank_queries
from mocme_dist.parallel.comm import Comm, communication
from mocme_dist.partition import RowPartition

RELATIONS, BLOCK = 16, 1 << 16


def make_problem(
    num_entities: int, num_queries: int, width: int, first: int, last: int
) -> tuple[Queries, torch.Tensor, torch.Tensor]:
    """Queries, phases and vectors [first, last), a function of the sizes and the ids: any share is made by itself."""
    gen = np.random.default_rng(0)
    triples = np.stack(
        [gen.integers(num_entities, size=num_queries // 2), gen.integers(RELATIONS, size=num_queries // 2)], 1
    )
    triples = np.concatenate([triples, gen.integers(num_entities, size=(num_queries // 2, 1))], 1)
    phase_RC = torch.from_numpy(gen.uniform(-np.pi, np.pi, (RELATIONS, width // 2)).astype(np.float32))
    z_rD = np.empty((last - first, width), dtype=np.float32)
    for block in range(first // BLOCK, -(-last // BLOCK)):
        values = np.random.default_rng([1, block]).standard_normal((BLOCK, width), dtype=np.float32) * (14 / width)
        begin, end = max(first, block * BLOCK), min(last, (block + 1) * BLOCK)
        z_rD[begin - first : end - first] = values[begin - block * BLOCK : end - block * BLOCK]
    return Queries.both_directions(triples), phase_RC, torch.from_numpy(z_rD)


def rank_here(comm: Comm, num_entities: int, num_queries: int, width: int) -> tuple[np.ndarray, float]:
    """Exact ranks of all queries on this rank's share, and the seconds of the second of two passes."""
    first, last = RowPartition(num_entities, comm.world_size).bounds(comm.rank)
    queries, phase_RC, z_rD = make_problem(num_entities, num_queries, width, first, last)
    known = KnownAnswers.build(
        np.stack([queries.source[::2], queries.relation[::2], queries.target[::2]], 1), RELATIONS
    )
    shard = RowShard(z_rD, first)
    # Kernels are made on few rows.
    rank_queries(
        queries.take(slice(0, 256)),
        lambda relation: phase_RC[relation],
        RowShard(z_rD[:2048], first),
        known,
        comm,
        Sizes(compiled=True),
    )
    comm.barrier()
    start = time.perf_counter()
    ranks = rank_queries(
        queries, lambda relation: phase_RC[relation], shard, known, comm, Sizes(compiled=True)
    ).filtered
    return ranks, time.perf_counter() - start


def measure_here(comm: Comm, num_entities: int, num_queries: int, width: int) -> dict[str, Any]:
    """Ranking, and before and after it plain compiled scoring, all ranks at once."""
    from tools.bench.ranking import plain_scores_per_s

    plain = [plain_scores_per_s(width, repeats=40)]
    comm.barrier()
    ranks, seconds = rank_here(comm, num_entities, num_queries, width)
    comm.barrier()
    plain.append(plain_scores_per_s(width, repeats=40))
    return {"seconds": seconds, "plain": statistics.mean(plain), "ranks": ranks.tolist()}


def start_ranks(world_size: int, num_entities: int, num_queries: int, width: int, timed: bool) -> list[dict[str, Any]]:
    """What each of so many processes of one thread found."""
    with tempfile.TemporaryDirectory(prefix="mocme-scale-") as folder:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        sizes = [str(value) for value in (world_size, num_entities, num_queries, width, int(timed))]
        command = [sys.executable, "-m", "tools.bench.scale_ranking", f"{folder}/store", *sizes]
        processes = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True, env=env)
            for rank in range(world_size)
        ]
        outputs = [process.communicate(timeout=900)[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"ranking on {world_size} ranks failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def rank_shards(world_size: int, num_entities: int, num_queries: int, width: int) -> np.ndarray:
    """Ranks of the queries over so many processes."""
    return np.array(start_ranks(world_size, num_entities, num_queries, width, False)[0]["ranks"])


def ranking_fraction(num_entities: int, num_queries: int, width: int) -> dict[str, float]:
    """Scores a second of exact ranking over two ranks, and of the plain kernel on the same cores at once."""
    found = start_ranks(2, num_entities, num_queries, width, True)
    seconds = max(rank["seconds"] for rank in found)
    return {
        "scores_per_s": num_entities * num_queries / seconds,
        "plain_scores_per_s": sum(rank["plain"] for rank in found),
    }


def main() -> None:
    """One rank; started by `start_ranks`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument(
        "sizes", type=int, nargs=6, metavar="N", help="world size, entities, queries, width, timed, rank"
    )
    args = parser.parse_args()
    world_size, num_entities, num_queries, width, timed, rank = args.sizes
    torch.set_num_threads(1)
    import torch.distributed as dist

    store = dist.FileStore(str(args.store), world_size)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    with communication(900) as comm:
        if timed:
            found = measure_here(comm, num_entities, num_queries, width)
        else:
            found = {"ranks": rank_here(comm, num_entities, num_queries, width)[0].tolist()}
        print(json.dumps(found), flush=True)
        comm.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
