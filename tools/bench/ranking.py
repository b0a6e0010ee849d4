"""Filtered ranking: `python -m tools.bench.ranking [--quick]`.

Counts of the kernel are checked against the plain form first. Then queries per second on one DB15K-sized shard (12,842
entities, D 256) for vectors without any relation, where no sum can stop early, and for queries that lie near their
targets, as those of a trained model do; the compiled distance alone, without counting, beside them; and the share of
the machine's vector rate. `plain_scores_per_s` is what other benchmarks hold their rankings against.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from mocme_dist.kernels.counting import count, count_tiles, target_distances
from mocme_dist.kernels.distance import distance
from tools.bench.common import DEVICE, ceilings, finish, measure, row
from tools.bench.workload import use_all_cores

ENTITIES, WIDTH, QUERIES = 12_842, 256, 1024
# Vector instructions for one modulus of the AVX-512 kernel: 2 sub, 2 fma, 3 of the estimate, mul, fnmadd, fma.
OPERATIONS = 10


@torch.compile(dynamic=False, fullgraph=True)
def plain_compiled_distance(query_QD: Tensor, tile_TD: Tensor) -> Tensor:
    """(Q, T) distances as torch.compile makes them of the plain formula."""
    return distance(query_QD[:, None], tile_TD[None])


def plain_scores_per_s(width: int = WIDTH, queries: int = 256, tile: int = 1024, repeats: int = 20) -> float:
    """Query-candidate pairs a second that `plain_compiled_distance` scores with torch's threads, nothing counted."""
    query_QD, tile_TD = torch.randn(queries, width, device=DEVICE), torch.randn(tile, width, device=DEVICE)
    with torch.inference_mode():
        median_ms, _ = measure(lambda: plain_compiled_distance(query_QD, tile_TD), 3, repeats)
    return queries * tile / median_ms * 1e3


def make_problem(noise: float | None, queries: int, entities: int = ENTITIES) -> tuple[Tensor, Tensor, Tensor]:
    """(queries, rows, targets' rows) on the device.

    `noise` is each query's distance from its target, relative to random vectors.
    """
    gen = torch.Generator().manual_seed(0)
    rows_rD = torch.randn(entities, WIDTH, generator=gen).to(DEVICE) * 14 / WIDTH
    target_QD = rows_rD[torch.randint(entities, (queries,), generator=gen).to(DEVICE)]
    free_QD = torch.randn(queries, WIDTH, generator=gen).to(DEVICE) * 14 / WIDTH
    return (free_QD if noise is None else target_QD + noise * free_QD), rows_rD, target_QD


def rank_all(problem: tuple[Tensor, Tensor, Tensor], compiled: bool, block: int = 256) -> Tensor:
    """(2, Q) counts in blocks, as evaluation makes them."""
    query_QD, rows_rD, target_QD = problem
    nobody = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    counts = []
    for start in range(0, len(query_QD), block):
        part, target_part = query_QD[start : start + block], target_QD[start : start + block]
        target_Q = target_distances(part, target_part, 1024, compiled)
        make = count if compiled else count_tiles
        counts.append(make(part, target_Q, rows_rD, nobody, nobody, 1024, compiled))
    return torch.cat(counts, 1)


def large_rows(entities: int = 1_000_000, block: int = 1024) -> list[dict[str, object]]:
    """On CUDA: the count of one large block of queries over a large shard, where launches are small beside the work."""
    query_QD, rows_rD, target_QD = make_problem(None, block, entities)
    target_Q, nobody = (
        target_distances(query_QD, target_QD, block, True),
        torch.zeros(0, dtype=torch.int64, device=DEVICE),
    )
    median_ms, _ = measure(lambda: count(query_QD, target_Q, rows_rD, nobody, nobody, block, True), 2, 20)
    return [
        row(
            "large_scores_per_s", block * entities / median_ms * 1e3, f"pairs/s, {block} queries, {entities:,} entities"
        ),
    ]


def main() -> None:
    """Parse, check parity, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    args = parser.parse_args()
    use_all_cores()
    repeats = 5 if args.quick else 20
    few = make_problem(0.7, 128)
    found, expected = rank_all(few, True), rank_all(few, False)
    # Two kernels round apart: a count may differ by the candidates in the last digits around the target.
    parity = bool(((found - expected).abs() <= 1).all()) and float((found == expected).float().mean()) > 0.98
    limits = ceilings(repeats)
    rows = []
    for name, noise in (("", None), ("_near_targets", 0.7)):
        problem = make_problem(noise, QUERIES)
        median_ms, p90_ms = measure(lambda problem=problem: rank_all(problem, True), 2, repeats)  # type: ignore[misc]
        per_s = QUERIES / median_ms * 1e3
        rows += [
            row(f"queries_per_s{name}", per_s, "queries/s"),
            row(f"block_p90_ms{name}", p90_ms, f"ms per {QUERIES}"),
        ]
        if noise is None:
            scores = per_s * ENTITIES
            if DEVICE.type == "cpu":
                done = scores * WIDTH / 2 / 1e9
                rows += [
                    row(
                        "fraction_of_vector_rate",
                        done * OPERATIONS / limits["vector_gop_per_s"],
                        "of the matrix product's instructions",
                    )
                ]
    if DEVICE.type == "cuda":
        rows += large_rows()
    plain = plain_scores_per_s(repeats=repeats)
    rows += [row("over_plain_compiled_distance", scores / plain, "x"), row("plain_scores_per_s", plain, "pairs/s")]
    shapes = {"entities": ENTITIES, "D": WIDTH, "queries": QUERIES}
    finish("ranking", parity, rows, shapes=shapes, ceilings=limits)


if __name__ == "__main__":
    main()
