"""Ranks of the blend against brute force from the terms' definitions, bit for bit at every world size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted import E, R, brute_force, evidence_of, planted

from mocme_dist.data.known import KnownAnswers
from mocme_dist.evaluation.blended import BlendInputs, rank_blended
from mocme_dist.evaluation.ranking import RowShard, Sizes, rank_queries, split_queries
from mocme_dist.evidence.fit import model_alone
from mocme_dist.evidence.terms import term_names
from mocme_dist.parallel.comm import Comm, communication
from mocme_dist.partition import RowPartition

TERMS = term_names(["text", "model", "facts"])


def tables(parts: int = 1) -> list[torch.Tensor]:
    """Weights that differ by place with a term left out at some; the model alone."""
    weight_PF = torch.rand(2 * R, parts + len(TERMS), generator=torch.Generator().manual_seed(1)).mul(64).round() / 64
    weight_PF[:, parts:] *= torch.tensor([0.5, 0.5, 0.5, 3, 3, 3, 2, 0.5, 0.2])
    weight_PF[3, 0] = 0
    weight_PF[::2, 3] = 0
    return [weight_PF, model_alone(2 * R, parts + len(TERMS), parts)]


def rank_all(comm: Comm, seed: int, block: int, tile: int, compiled: bool, parts: int = 1) -> list[np.ndarray]:
    data = planted(seed)
    evidence = evidence_of(data, comm, compiled)
    known = KnownAnswers.build(np.concatenate([data.train, data.test]), R)
    shard = RowShard(data.z_ED[evidence.first : evidence.first + evidence.num_rows], evidence.first)
    phase_of = lambda relation: data.phase_RC[relation]  # noqa: E731
    sizes = Sizes(block, tile, compiled)
    inputs = BlendInputs(phase_of, shard, known, evidence, tables(parts), sizes)
    ranks = [found.filtered for found in rank_blended(split_queries(data.test), inputs, comm)]
    alone = rank_queries(split_queries(data.test), phase_of, shard, known, comm, Sizes(block, tile, compiled)).filtered
    return [*ranks, alone]


def by_hand(seed: int) -> np.ndarray:
    """Ranks from float64 scores of the definitions; scores that differ by rounding alone count as equal."""
    data, weight_PF = planted(seed), tables()[0].double().numpy()
    queries = split_queries(data.test)
    known = KnownAnswers.build(np.concatenate([data.train, data.test]), R)
    each = list(zip(queries.source.tolist(), queries.relation.tolist(), queries.direction.tolist(), strict=True))
    terms = brute_force(data, each)
    real, imaginary = data.z_ED.double().chunk(2, -1)
    z_EC = torch.complex(real, imaginary).numpy()
    ranks = []
    for number, (source, relation, direction) in enumerate(each):
        turned = z_EC[source] * np.exp(1j * (1 - 2 * direction) * data.phase_RC[relation].double().numpy())
        weight_F = weight_PF[2 * relation + direction]
        score = -weight_F[0] * np.abs(turned - z_EC).sum(1)
        for turn, name in enumerate(TERMS):
            score = score + weight_F[1 + turn] * terms[name][number]
        target = queries.target[number]
        competes = np.ones(E, bool)
        competes[known.lookup([source], [relation], [direction])[1]] = False
        difference = (score - score[target])[competes]
        above, equal = (difference > 1e-5).sum(), (np.abs(difference) <= 1e-5).sum()
        ranks.append(1 + above + equal / 2)
    return np.array(ranks)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("compiled", [False, True])
def test_ranks_equal_brute_force_and_the_model_alone_its_own(seed, compiled):
    with communication(30) as comm:
        blended, alone, plain = rank_all(comm, seed, 16, 21, compiled)
    expected = by_hand(seed)
    # A mean of answers that rounds the other way moves a likeness by 1e-4: it may part a near pair.
    assert (blended != expected).mean() <= 0.03
    assert np.abs(blended - expected).max() <= 1
    assert np.array_equal(alone, plain)
    assert (expected % 1 == 0.5).any()
    assert (blended != plain).mean() > 0.5


def test_ranks_are_the_same_bit_for_bit_at_every_world_size(run_ranks):
    for compiled in (False, True):
        ((alone, *_),) = run_ranks(1, rank_all, 0, 16, 21, compiled, 5)
        for world in (2, 3):
            for found in run_ranks(world, rank_all, 0, 16, 21, compiled, 5):
                assert np.array_equal(found[0], alone)


def with_unknown(comm: Comm, compiled: bool) -> list[np.ndarray]:
    """Ranks where the model has no vector of some entities, and features of one of them are missing, too."""
    data = planted()
    data.z_ED[UNKNOWN] = 0
    data.present_E[UNKNOWN] = torch.tensor([True, False, False])
    evidence = evidence_of(data, comm, compiled)
    known = KnownAnswers.build(np.concatenate([data.train, data.test]), R)
    shard = RowShard(data.z_ED[evidence.first : evidence.first + evidence.num_rows], evidence.first)
    phase_of = lambda relation: data.phase_RC[relation]  # noqa: E731
    silent = tables()[0]
    silent[:, 0] = 0
    inputs = BlendInputs(phase_of, shard, known, evidence, [*tables(), silent], Sizes(16, 21, compiled))
    blended, alone, by_evidence = rank_blended(split_queries(data.test), inputs, comm)
    plain = rank_queries(split_queries(data.test), phase_of, shard, known, comm, inputs.sizes)
    assert np.array_equal(plain.without_source, alone.without_source)
    # Nothing is known to the model of these sources, so it has no say; of the others it has.
    same = blended.filtered == by_evidence.filtered
    unknown = np.isin(split_queries(data.test).source, UNKNOWN)
    assert same[unknown].all() and unknown.sum() > 3 and not same[~unknown].all()
    return [blended.filtered, blended.without_source, alone.filtered, plain.filtered]


UNKNOWN = [44, 46, 48]


def test_an_entity_without_vector_ranks_by_its_evidence_and_last_without(run_ranks):
    ((blended, without, alone, plain),) = run_ranks(1, with_unknown, True)
    assert np.array_equal(alone, plain)
    assert np.abs(run_ranks(1, with_unknown, False)[0][0] - blended).max() <= 1
    for found in run_ranks(3, with_unknown, True):
        assert all(np.array_equal(a, b) for a, b in zip(found, (blended, without, alone, plain), strict=True))
    queries = split_queries(planted().test)
    data = planted()
    assert not np.isin([46, 48], data.train[:, [0, 2]]).any()
    offsets, _ = KnownAnswers.build(np.concatenate([data.train, data.test]), R).lookup(*queries[:3])
    competing = E - np.diff(offsets)  # besides the target
    last = queries.target == 46
    assert last.any()
    # 46 and 48 tie behind all others in the blend; 44 joins them where the model is alone.
    assert (blended[last] >= competing[last] - 1).all()
    assert (alone[last] >= competing[last] - 2).all()
    assert (without <= blended).all() and (without < blended).any()


def test_sizes_of_blocks_change_no_rank(monkeypatch):
    from mocme_dist.evaluation import blended

    with communication(30) as comm:
        expected = rank_all(comm, 0, 16, 21, True)[0]
        monkeypatch.setattr(blended, "PASS_QUERIES", 9)
        monkeypatch.setattr(blended, "ROWS", 20)
        for block, tile in ((4, 17), (100, 53), (1, 16)):
            assert np.array_equal(rank_all(comm, 0, block, tile, True)[0], expected)


def test_a_rank_without_rows_takes_part(run_ranks):
    found = run_ranks(3, few_rows)
    assert all(np.array_equal(ranks, found[0]) for ranks in found)


def few_rows(comm: Comm) -> np.ndarray:
    """All entities on the last rank but one, the others hold none."""
    data = planted()
    owner = max(0, comm.world_size - 2)
    part = RowPartition(E, 1).bounds(0) if comm.rank == owner else (0, 0)
    whole = Comm(0, 1, comm.device, comm.ahead)
    evidence = evidence_of(data, whole)
    if comm.rank != owner:
        evidence = empty(evidence, comm)
    evidence.comm = comm
    known = KnownAnswers.build(np.concatenate([data.train, data.test]), R)
    shard = RowShard(data.z_ED[slice(*part)], 0)
    phase_of = lambda relation: data.phase_RC[relation]  # noqa: E731
    inputs = BlendInputs(phase_of, shard, known, evidence, tables(), Sizes(16, 21, False))
    return rank_blended(split_queries(data.test), inputs, comm)[0].filtered


def empty(evidence, comm):
    """The same evidence without a row."""
    from mocme_dist.evidence.shared_facts import SharedFacts
    from mocme_dist.evidence.terms import Evidence

    spaces = [s._replace(unit_rF=s.unit_rF[:0], present_r=s.present_r[:0]) for s in evidence.spaces]
    shared = SharedFacts(evidence.facts, 0, 0, 20, 3)
    return Evidence(evidence.facts, spaces, shared, 0, 0, evidence.neighbours, evidence.facts_beta, comm)
