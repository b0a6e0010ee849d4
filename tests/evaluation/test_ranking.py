"""Counted ranks against brute force, bit for bit at every world size; and what must not become a good rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from graphs import D, E, R, brute_force, graph, vectors

from mocme_dist.data.known import KnownAnswers
from mocme_dist.evaluation.ranking import Queries, RowShard, Sizes, rank_queries, split_queries
from mocme_dist.parallel.comm import Comm, communication
from mocme_dist.partition import RowPartition


def rank_alone(
    queries: Queries,
    known: KnownAnswers,
    z_ED: torch.Tensor,
    phase_RC: torch.Tensor,
    progress: Callable[[int, int], None] | None = None,
    **sizes: Any,
) -> np.ndarray:
    place = (lambda relation: phase_RC[relation], RowShard(z_ED, 0), known)
    with communication(30) as comm:
        return rank_queries(queries, *place, comm, Sizes(**sizes), progress).filtered


@pytest.mark.parametrize(("query_block", "tile_rows"), [(7, 17), (80, 53), (256, 1024), (16, 16), (1, 52), (100, 20)])
def test_ranks_equal_brute_force(query_block, tile_rows):
    test, known = graph()
    queries = split_queries(test)
    z_ED, phase_RC = vectors()
    found = rank_alone(queries, known, z_ED, phase_RC, query_block=query_block, tile_rows=tile_rows)
    expected = brute_force(queries, known, z_ED, phase_RC)
    assert found.dtype == np.float64
    assert np.array_equal(found, expected)


def test_the_graph_has_ties_and_several_answers():
    """What the parity rests on: halves among the ranks, targets among equals, filters of more than one answer."""
    test, known = graph()
    queries = split_queries(test)
    expected = brute_force(queries, known, *vectors())
    assert (expected % 1 == 0.5).any()
    offsets, _ = known.lookup(queries.source, queries.relation, queries.direction)
    assert (np.diff(offsets) > 3).any()
    unfiltered = brute_force(queries, KnownAnswers.build(np.zeros((0, 3), np.int64), R), *vectors())
    assert (unfiltered > expected).any()


@pytest.mark.parametrize("seed", range(4))
def test_ranks_equal_brute_force_on_other_graphs(seed):
    test, known = graph(seed + 1)
    queries, (z_ED, phase_RC) = split_queries(test), vectors(seed + 1)
    found = rank_alone(queries, known, z_ED, phase_RC, query_block=16, tile_rows=24)
    assert np.array_equal(found, brute_force(queries, known, z_ED, phase_RC))


@pytest.mark.parametrize("compiled", [False, True])
def test_ranks_without_the_source_equal_ranks_that_filter_it(compiled):
    test, known = graph()
    queries, (z_ED, phase_RC) = split_queries(test), vectors()
    both = Queries(*(column.repeat(2) for column in queries))
    with communication(30) as comm:
        place = (lambda relation: phase_RC[relation], RowShard(z_ED, 0), known, comm)
        found = rank_queries(both, *place, Sizes(16, 24, compiled))

    class AndSources:
        """Known answers and each query's source."""

        def lookup(self, source, relation, direction):
            offsets, targets = known.lookup(source, relation, direction)
            parts = [np.union1d(a, s) for a, s in zip(np.split(targets, offsets[1:-1]), source, strict=True)]
            return np.cumsum([0, *map(len, parts)]), np.concatenate(parts)

    expected = brute_force(both, AndSources(), z_ED, phase_RC)
    assert np.array_equal(found.without_source, expected)
    assert (found.without_source < found.filtered).any()


@pytest.mark.parametrize("compiled", [False, True])
def test_an_entity_that_the_model_knows_nothing_of_ranks_last(compiled):
    """Its vector is zero, which is nearer to a query than most others are."""
    test, known = graph()
    queries, (z_ED, phase_RC) = split_queries(test), vectors()
    unknown = [1, 5, 20, 51]
    z_ED[unknown] = 0
    found = rank_alone(queries, known, z_ED, phase_RC, query_block=16, tile_rows=24, compiled=compiled)
    is_target = np.isin(queries.target, unknown)
    offsets, targets = known.lookup(queries.source, queries.relation, queries.direction)
    answers = [set(part.tolist()) for part in np.split(targets, offsets[1:-1])]
    for q in np.flatnonzero(is_target):
        others = [e for e in range(E) if e not in answers[q] and e not in unknown]
        ties = [e for e in unknown if e not in answers[q]]
        assert found[q] == 1 + len(others) + len(ties) / 2
    rest = ~is_target & ~np.isin(queries.source, unknown)
    assert is_target.any()
    z_ED[unknown] = 1e9
    assert np.array_equal(found[rest], brute_force(queries, known, z_ED, phase_RC)[rest])


def rank_shard(comm: Comm, tile_rows: int, compiled: bool, num_rows: int) -> np.ndarray:
    test, known = graph()
    queries = split_queries(test[(test[:, 0] < num_rows) & (test[:, 2] < num_rows)])
    z_ED, phase_RC = vectors()
    first, last = RowPartition(num_rows, comm.world_size).bounds(comm.rank)
    phase_of = lambda relation: phase_RC[relation]  # noqa: E731
    shard = RowShard(z_ED[first:last], first)
    return rank_queries(queries, phase_of, shard, known, comm, Sizes(16, tile_rows, compiled)).filtered


def test_ranks_are_the_same_bit_for_bit_at_every_world_size(run_ranks):
    test, known = graph()
    expected = brute_force(split_queries(test), known, *vectors())
    for world in (1, 2, 3, 4):
        for found in run_ranks(world, rank_shard, 17, False, E):
            assert np.array_equal(found, expected)


def test_ranks_without_rows_take_part(run_ranks):
    """Five entities on three ranks in tiles of 16, then one entity, so that two ranks hold nothing."""
    for num_rows in (5, 1):
        (alone,) = run_ranks(1, rank_shard, 16, False, num_rows)
        for found in run_ranks(3, rank_shard, 16, False, num_rows):
            assert np.array_equal(found, alone)
        assert (alone <= num_rows).all()


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3])
def test_compiled_ranks_equal_brute_force_at_every_world_size(run_ranks, world):
    """21 rows a tile divide neither 53 nor a rank's 18 or 27 rows, and a vector register's lanes do not divide 21."""
    test, known = graph()
    expected = brute_force(split_queries(test), known, *vectors())
    for found in run_ranks(world, rank_shard, 21, True, E):
        assert np.array_equal(found, expected)


@pytest.mark.slow
def test_equal_vectors_tie_in_the_compiled_kernel_wherever_they_stand():
    """All entities are copies of two vectors: one last digit between two places would break a tie."""
    gen = torch.Generator().manual_seed(0)
    kinds = torch.randn(2, 2 * 37, generator=gen)
    z_ED, phase_RC = kinds[torch.arange(101) % 2], torch.rand(1, 37, generator=gen)
    triples = np.stack([np.arange(60), np.zeros(60, np.int64), np.arange(60) + 41], 1)
    none = KnownAnswers.build(np.zeros((0, 3), np.int64), 1)
    found = rank_alone(split_queries(triples), none, z_ED, phase_RC, query_block=16, tile_rows=37, compiled=True)
    # 51 even ids and 50 odd ones: a target is in the middle of its own kind, before or behind the other.
    assert set(found) <= {26.0, 25.5, 76.0, 76.5}


def test_all_equal_vectors_give_the_mean_rank():
    test, known = graph()
    queries = split_queries(test)
    found = rank_alone(queries, known, torch.ones(E, D), torch.zeros(R, D // 2), query_block=16, tile_rows=20)
    offsets, _ = known.lookup(queries.source, queries.relation, queries.direction)
    # Every target is among its known answers; the others leave, and it stands in the middle of what is left.
    left = E - (np.diff(offsets) - 1)
    assert np.array_equal(found, (1 + left) / 2)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_vectors_that_are_not_finite_give_no_good_rank(bad, compiled):
    """A model that has diverged must not look perfect: a target without a distance is last."""
    test, known = graph()
    queries, (z_ED, phase_RC) = split_queries(test), vectors()
    everything = rank_alone(
        queries, known, torch.full((E, D), float("nan")), phase_RC, query_block=16, tile_rows=20, compiled=compiled
    )
    offsets, _ = known.lookup(queries.source, queries.relation, queries.direction)
    assert np.array_equal(everything, E - (np.diff(offsets) - 1.0))
    z_ED[queries.target[0]] = bad
    found = rank_alone(queries, known, z_ED, phase_RC, query_block=16, tile_rows=20, compiled=compiled)
    assert found[0] == E - (np.diff(offsets)[0] - 1)


def test_progress_counts_queries_and_no_queries_give_no_ranks():
    test, known = graph()
    z_ED, phase_RC = vectors()
    seen = []
    rank_alone(split_queries(test), known, z_ED, phase_RC, query_block=32, progress=lambda *at: seen.append(at))
    assert seen == [(32, 80), (64, 80), (80, 80)]
    assert rank_alone(split_queries(test[:0]), known, z_ED, phase_RC).shape == (0,)


def test_both_directions_and_samples_of_them():
    triples = np.array([[1, 0, 2], [3, 1, 4], [5, 1, 6]])
    queries = split_queries(triples)
    assert queries.source.tolist() == [1, 2, 3, 4, 5, 6]
    assert queries.target.tolist() == [2, 1, 4, 3, 6, 5]
    assert queries.relation.tolist() == [0, 0, 1, 1, 1, 1]
    assert queries.direction.tolist() == [0, 1] * 3
    many = np.stack([np.arange(500), np.zeros(500, np.int64), np.arange(500) + 1], 1)
    sample, again = split_queries(many, 60), split_queries(many, 60)
    assert len(sample.source) == 60
    assert all(np.array_equal(one, other) for one, other in zip(sample, again, strict=True))
    assert np.array_equal(sample.source[::2], sample.target[1::2])
    assert len(np.unique(sample.source[::2])) == 30
    assert len(split_queries(many, 1000).source) == len(split_queries(many, 0).source) == 1000
    assert len(split_queries(many, 1).source) == 2


def test_pairs_are_made_a_block_at_a_time_and_none_for_filling():
    test, known = graph()
    queries, asked = split_queries(test), list[int]()

    class Counted:
        def lookup(self, source: np.ndarray, relation: np.ndarray, direction: np.ndarray) -> Any:
            asked.append(len(source))
            return known.lookup(source, relation, direction)

    found = rank_alone(queries, Counted(), *vectors(), query_block=32, tile_rows=40)  # type: ignore[arg-type]
    assert asked == 2 * [32, 32, 16]  # once for the sources, once for the rows
    assert np.array_equal(found, brute_force(queries, known, *vectors()))
