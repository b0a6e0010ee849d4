"""The streaming kernel finds what a full sort finds, in both types and all forms, over any cut into parts."""

from __future__ import annotations

import numpy as np
import pytest

from mocme_dist.kernels import builder, scan

COMPILED = [False, True]


def brute(rows: np.ndarray, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances by complex arithmetic in double precision, sorted whole."""
    C = rows.shape[1] // 2
    z = rows[:, :C].astype(np.complex128) + 1j * rows[:, C:]
    q = query[:, :C].astype(np.complex128) + 1j * query[:, C:]
    distance = np.abs(z[None] - q[:, None]).sum(-1)
    order = np.lexsort((np.broadcast_to(np.arange(len(rows)), distance.shape), distance), axis=1)[:, :k]
    return np.take_along_axis(distance, order, 1), order


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    "num_rows, width, k, cuts", [(1, 2, 3, ()), (50, 6, 50, (7, 7, 20)), (40_000, 32, 10, (100,)), (300, 70, 4, ())]
)
def test_the_nearest_rows_are_those_of_a_full_sort(dtype, num_rows, width, k, cuts, compiled):
    gen = np.random.default_rng(1)
    rows = gen.normal(size=(num_rows, width)).astype(dtype)
    query = gen.normal(size=(3, width)).astype(np.float32)
    found = scan.nearest(np.split(rows, list(cuts)), query, k, compiled)
    distance, ids = brute(rows.astype(np.float32), query, k)
    assert np.array_equal(found.id_Qk, ids)
    np.testing.assert_allclose(found.distance_Qk, distance, rtol=2e-6)
    np.testing.assert_allclose(
        scan.distances(rows[ids[0]], query[:1], compiled)[0],
        found.distance_Qk[0],
        rtol=0,
        atol=0 if compiled else 1e-5,
    )


@pytest.mark.parametrize("compiled", COMPILED)
def test_equal_rows_come_by_id_and_rows_that_are_not_finite_never_come(compiled):
    rows = np.ones((20, 4), np.float32)
    rows[[0, 5]] = np.nan
    rows[7] = 0
    found = scan.nearest([rows[:6], rows[6:]], np.zeros((1, 4), np.float32), 20, compiled)
    assert found.id_Qk[0].tolist() == [7, 1, 2, 3, 4, 6, *range(8, 20), -1, -1]
    assert np.isinf(found.distance_Qk[0, -2:]).all()


def test_no_rows_and_no_queries_give_empty_lists():
    assert scan.nearest([], np.zeros((2, 4), np.float32), 5).id_Qk.shape == (2, 0)
    assert scan.nearest([np.zeros((3, 4), np.float32)], np.zeros((0, 4), np.float32), 2).id_Qk.shape == (0, 2)


def test_without_a_compiler_torch_answers(monkeypatch):
    monkeypatch.setattr(scan, "library", lambda source: None)
    assert scan.nearest([np.eye(4, dtype=np.float32)], np.zeros((1, 4), np.float32), 1).id_Qk.tolist() == [[0]]


@pytest.mark.parametrize("instructions", ["AVX512", "AVX2", "DEFAULT"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_every_form_of_the_kernel_computes_the_same_distances(instructions, dtype, monkeypatch):
    """Half-precision numbers of every kind included: subnormal, zero, infinite, not a number."""
    order = ["DEFAULT", "AVX2", "AVX512"]
    if builder.compiler() is None or order.index(instructions) > order.index(builder.instruction_set()):
        pytest.skip(f"no compiler, or this CPU has no {instructions}")
    rows = np.random.default_rng(5).normal(size=(70, 2 * 37)).astype(dtype)
    rows[3] = np.array([6e-8, -5e-5, 0.0, -0.0] * 18 + [1.0, 65504.0], dtype)
    rows[4, 5], rows[5, 70] = np.nan, -np.inf
    query = np.random.default_rng(6).normal(size=(3, 2 * 37)).astype(np.float32)
    plain = scan.distances(rows, query, compiled=False)
    monkeypatch.setattr(scan, "library", lambda source: builder.library(source, instructions))
    found = scan.distances(rows, query)
    finite = np.isfinite(plain)
    assert np.array_equal(np.isfinite(found), finite) and not finite[:, [4, 5]].any()
    np.testing.assert_allclose(found[finite], plain[finite], rtol=2e-6)
    expected = scan.nearest([rows], query, 9, compiled=False)
    assert np.array_equal(scan.nearest([rows], query, 9).id_Qk, expected.id_Qk)


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_what_a_query_leaves_out_never_comes_and_the_others_stand_as_in_a_full_list(dtype, compiled):
    gen = np.random.default_rng(3)
    rows, query = gen.normal(size=(300, 6)).astype(dtype), gen.normal(size=(4, 6)).astype(np.float32)
    everything = scan.nearest([rows], query, 300, compiled)
    # Nobody, the best ones, some in between, all but three.
    picks = [[], everything.id_Qk[1, :40], gen.permutation(300)[:150], everything.id_Qk[3, 3:]]
    left_out = [np.sort(np.asarray(pick, np.int64)) for pick in picks]
    found = scan.nearest(np.split(rows, [7, 100]), query, 5, compiled, left_out)
    for q, out in enumerate(left_out):
        stay = np.flatnonzero(~np.isin(everything.id_Qk[q], out))[:5]
        assert found.id_Qk[q].tolist() == [*everything.id_Qk[q, stay], *[-1] * (5 - len(stay))]
        assert found.distance_Qk[q].tolist() == [*everything.distance_Qk[q, stay], *[np.inf] * (5 - len(stay))]


@pytest.mark.parametrize("compiled", COMPILED)
def test_of_equal_rows_the_last_ones_make_way_for_a_nearer_one(compiled):
    rows = np.ones((30, 4), np.float32)
    rows[[11, 20]] = 0
    assert scan.nearest([rows], np.zeros((1, 4), np.float32), 6, compiled).id_Qk.tolist() == [[11, 20, 0, 1, 2, 3]]
