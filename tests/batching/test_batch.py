"""A rank's share of a global batch: the same chunks, pools and masks at any world size, masks as brute force says."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from mocme_dist.batching.batch import Batch, BatchMaker
from mocme_dist.batching.sampler import QuerySampler, negative_pool
from mocme_dist.data.known import KnownAnswers

E, R, T = 23, 3, 61


def graph(seed: int = 0) -> np.ndarray:
    gen = np.random.default_rng(seed)
    triples = np.stack([gen.integers(E, size=4 * T), gen.integers(R, size=4 * T), gen.integers(E, size=4 * T)], 1)
    return gen.permutation(np.unique(triples, axis=0))[:T]


def maker(rank: int, world: int, *, batch_size: int = 20, chunk_size: int = 4, num_negatives: int = 16) -> BatchMaker:
    triples_T3 = graph()
    sampler = QuerySampler(len(triples_T3), batch_size, seed=3)
    return BatchMaker(triples_T3, KnownAnswers.build(triples_T3, R), E, sampler, chunk_size, num_negatives, rank, world)


def rows(batch: Batch) -> list[tuple]:
    """Every real query of the share: (source, relation, sign, target, its pool and its mask)."""
    ids = batch.ids_U
    found = []
    for g, b in zip(*np.nonzero(batch.weight_Gb.numpy()), strict=True):
        pool = tuple(ids[batch.pool_GN[g]])
        query = (
            ids[batch.source_Gb[g, b]],
            batch.relation_Gb[g, b].item(),
            batch.sign_Gb[g, b].item(),
            ids[batch.target_Gb[g, b]],
        )
        found.append((*(int(value) for value in query), pool, tuple(batch.allowed_GbN[g, b].tolist())))
    return found


# Steps of an epoch of 122 queries in batches of 20: whole ones, and the last of 2 queries.
@pytest.mark.parametrize("step", [0, 5, 6, 7])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_shares_unite_to_the_same_global_batch(world, step):
    plain = QuerySampler(T, 20, seed=3).queries(step)
    shares = [maker(rank, world).make(step) for rank in range(world)]
    found = sorted(row for share in shares for row in rows(share))
    expected = []
    triples_T3 = graph()
    facts = {tuple(int(x) for x in triple) for triple in triples_T3}
    for place, query in enumerate(plain):
        head, relation, tail = (int(x) for x in triples_T3[query // 2])
        source, sign, target = (head, 1, tail) if query % 2 == 0 else (tail, -1, head)
        pool = tuple(int(x) for x in negative_pool(3, step, place // 4, 16, E))
        known = {x for x in range(E) if ((source, relation, x) if sign == 1 else (x, relation, source)) in facts}
        assert target in known
        expected.append((source, relation, sign, target, pool, tuple(x not in known for x in pool)))
    assert found == sorted(expected)
    assert {share.total for share in shares} == {len(plain)}


def test_pools_hold_duplicates_and_targets():
    """What the parity above rests on: its pools do repeat ids, and do hold known answers and the target itself."""
    every = [row for step in range(7) for row in rows(maker(0, 1).make(step))]
    assert any(len(set(pool)) < len(pool) for *_, pool, _ in every)
    assert any(target in pool for _, _, _, target, pool, _ in every)
    assert all(
        not ok for *_, target, pool, allowed in every for x, ok in zip(pool, allowed, strict=True) if x == target
    )


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("step", [0, 6])
def test_shapes_are_those_of_every_step_and_filling_weighs_nothing(world, step):
    for rank in range(world):
        share = maker(rank, world).make(step)
        G = -(-5 // world)  # 20 queries are 5 chunks of 4
        assert (
            share.source_Gb.shape == share.target_Gb.shape == share.relation_Gb.shape == share.weight_Gb.shape == (G, 4)
        )
        assert share.pool_GN.shape == (G, 16)
        assert share.allowed_GbN.shape == (G, 4, 16)
        assert share.sign_Gb.dtype == share.weight_Gb.dtype == torch.float32
        assert set(share.weight_Gb.unique().tolist()) <= {0.0, 1.0}
        assert np.array_equal(share.ids_U, np.unique(share.ids_U))
    total = sum(int(maker(rank, world).make(step).weight_Gb.sum()) for rank in range(world))
    assert total == (20 if step == 0 else 2)


@pytest.mark.parametrize("step", [0, 6])
def test_filling_asks_for_no_entity_that_the_batch_does_not_hold(step):
    """Rows that are asked for are moved by their optimizer's momentum: filling must not widen their set."""
    asked = [
        set(np.concatenate([maker(rank, world).make(step).ids_U for rank in range(world)])) for world in (1, 2, 3, 8)
    ]
    assert asked[0] == asked[1] == asked[2] == asked[3]
    needed = {
        entity for source, _, _, target, pool, _ in rows(maker(0, 1).make(step)) for entity in (source, target, *pool)
    }
    assert asked[0] == needed


@pytest.mark.parametrize("world", [1, 2, 3])
def test_one_vs_all_takes_every_entity_once_and_masks_what_is_known(world):
    facts = {tuple(int(x) for x in triple) for triple in graph()}
    seen = []
    for rank in range(world):
        share = maker(rank, world, num_negatives=0).make(2)
        assert share.pool_GN.shape == (1, E)
        assert np.array_equal(share.ids_U[share.pool_GN[0]], np.arange(E))
        assert share.allowed_GbN.shape == (1, -(-5 // world) * 4, E)
        for source, relation, sign, target, _, allowed in rows(share):
            known = [((source, relation, x) if sign == 1 else (x, relation, source)) in facts for x in range(E)]
            assert list(allowed) == [not k for k in known]
            seen.append((source, relation, sign, target))
    plain = [row[:4] for row in rows(maker(0, 1).make(2))]
    assert sorted(seen) == sorted(plain)


@pytest.mark.parametrize("num_negatives", [0, 16])
def test_masks_are_the_same_whether_answers_are_gone_through_or_searched(monkeypatch, num_negatives):
    for step in range(7):
        masks = []
        for hub in (0, 3 / (num_negatives or E), 16):  # every query is a hub's, some are, none is
            monkeypatch.setattr("mocme_dist.batching.batch._HUB", hub)
            masks.append(maker(0, 1, num_negatives=num_negatives).make(step).allowed_GbN)
        assert not masks[2].all()
        assert torch.equal(masks[0], masks[2]) and torch.equal(masks[1], masks[2])


def test_a_hub_that_half_of_the_queries_ask_for_does_not_fill_the_memory():
    heads = np.arange(1, 50_001)
    triples_T3 = np.stack([heads, np.zeros_like(heads), np.zeros_like(heads)], 1)
    known, sampler = KnownAnswers.build(triples_T3, 1), QuerySampler(len(triples_T3), 1024, 0)
    star = BatchMaker(triples_T3, known, len(heads) + 1, sampler, 128, 64, 0, 1)
    star.make(0)
    tracemalloc.start()
    batch = star.make(1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    asked = (batch.sign_Gb == -1).sum().item()
    assert (
        asked > 400 and not batch.allowed_GbN[batch.sign_Gb == -1].any(-1).any()
    )  # all but the hub itself answer, and it was not drawn
    assert peak < 8 * len(heads) * 10  # not all answers of all queries, which are 400 times as many numbers


def test_a_maker_forgets_its_last_step():
    """Batches depend on the step alone, not on what was made before."""
    one, other = maker(0, 2), maker(0, 2)
    for step in (4, 0, 6):
        one.make(step)
    again, fresh = one.make(1), other.make(1)
    assert np.array_equal(again.ids_U, fresh.ids_U)
    for name, value in vars(again).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(fresh, name)), name


def test_moved_sends_tensors_and_keeps_the_rest():
    share = maker(0, 1).make(0)
    moved = share.moved(lambda value: value.to("meta"))
    assert moved.allowed_GbN.device.type == "meta"
    assert moved.total == share.total
    assert moved.ids_U is share.ids_U
