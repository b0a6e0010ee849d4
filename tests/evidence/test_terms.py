"""Terms of the evidence against their definitions, and the same bits at every world size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted import E, Planted, R, brute_force, evidence_of, planted

from mocme_dist.evidence.spaces import merge
from mocme_dist.evidence.votes import Asked
from mocme_dist.kernels import builder
from mocme_dist.kernels.evidence import evidence_kernels
from mocme_dist.parallel.comm import Comm, communication

SETS = ("DEFAULT", "AVX2", "AVX512")
DENSE = ("likeness:text", "likeness:model")


def asked_of(data: Planted) -> Asked:
    head, relation, tail = data.test.T
    asked, _ = Asked.distinct(np.append(head, tail), np.append(relation, relation), np.repeat([0, 1], len(head)))
    return asked


def all_values(comm: Comm, seed: int, compiled: bool = True) -> dict[str, np.ndarray]:
    """Each term of this rank's entities, in place of all entities' and zeros elsewhere."""
    data = planted(seed)
    evidence, asked = evidence_of(data, comm, compiled), asked_of(data)
    prepared, index = evidence.prepare(asked), np.arange(len(asked.source_U))
    out = {}
    for name, value in evidence.values(prepared, index, np.arange(evidence.num_rows)):
        full = np.zeros((len(index), E), np.float32)
        full[:, evidence.first : evidence.first + evidence.num_rows] = value.numpy()
        out[name] = full
    return out


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_terms_equal_their_definitions(seed, compiled):
    data = planted(seed)
    asked = asked_of(data)
    queries = [(int(s), int(p) // 2, int(p) % 2) for s, p in zip(*asked, strict=True)]
    expected = brute_force(data, queries)
    with communication(30) as comm:
        found = all_values(comm, seed, compiled)
    assert set(found) == set(expected)
    for name, value in expected.items():
        # a mean is rounded to whole numbers: one may go the other way, and moves the cosine by its part of it
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=6e-4 if name in DENSE else 2e-5, err_msg=name)
        assert np.abs(value).max() > 0.1, name


@pytest.mark.parametrize("world", [2, 3])
def test_terms_are_the_same_bits_at_every_world_size(run_ranks, world):
    (alone,) = run_ranks(1, all_values, 0)
    parts = run_ranks(world, all_values, 0)
    for name, value in alone.items():
        assert np.array_equal(sum(part[name] for part in parts), value), name


@pytest.mark.parametrize("compiled", [False, True])
def test_a_sum_is_the_same_for_any_rows_and_any_weight(compiled):
    data = planted()
    with communication(30) as comm:
        evidence, asked = evidence_of(data, comm, compiled), asked_of(data)
        prepared = evidence.prepare(asked)
        index = np.array([4, 0, 4, 9])
        weight_QF = torch.rand(4, len(evidence.terms), generator=torch.Generator().manual_seed(0))
        weight_QF[:, 2] = 0
        whole = evidence.bias(weight_QF, prepared, index, np.arange(E))
        assert torch.equal(evidence.bias(weight_QF, prepared, index, np.arange(9, 40)), whole[:, 9:40])
        for rows in (np.array([50, 3, 17, 8]), np.array([30, 30, 0, 52])):
            own = evidence.own_bias(weight_QF, prepared, index, rows)
            assert torch.equal(own, whole[torch.arange(4), torch.from_numpy(rows)])
        one = evidence.bias(weight_QF[2:3], prepared, index[2:3], np.arange(E))
        assert torch.equal(one[0], whole[2])
        assert not torch.equal(whole[0], whole[2])


@pytest.mark.parametrize("instructions", ["AVX512", "AVX2", "DEFAULT"])
def test_kernels_give_the_bits_of_numpy_and_torch(instructions):
    if builder.compiler() is None or SETS.index(instructions) > SETS.index(builder.instruction_set()):
        pytest.skip(f"no compiler, or this CPU has no {instructions}")
    kernels = evidence_kernels(2, instructions)
    data, generator = planted(), torch.Generator().manual_seed(0)
    asked = asked_of(data)
    with communication(30) as comm:
        plain, fast = evidence_of(data, comm), evidence_of(data, comm)
        fast.kernels = fast.shared.kernels = kernels
        needed_PT = torch.rand(2 * R, len(plain.terms), generator=generator).numpy() < 0.8
        for needed in (None, needed_PT):
            expected, found = plain.prepare(asked, needed), fast.prepare(asked, needed)
            assert expected.entries.keys() == found.entries.keys()
            for name, entries in expected.entries.items():
                assert len(entries.value)
                assert all(np.array_equal(*pair) for pair in zip(entries, found.entries[name], strict=True)), name
            weight_QF = torch.rand(len(asked.source_U), len(plain.terms), generator=generator)
            arguments = (weight_QF, expected, np.arange(len(asked.source_U)), np.arange(E))
            assert torch.equal(fast.bias(*arguments), plain.bias(*arguments))


def merged_nothing(comm: Comm) -> tuple[int, ...]:
    return merge(np.zeros((0, 5), dtype=np.int64), comm).shape


def test_ranks_that_found_no_neighbours_to_merge_go_on(run_ranks):
    assert run_ranks(2, merged_nothing) == [(0, 5), (0, 5)]
