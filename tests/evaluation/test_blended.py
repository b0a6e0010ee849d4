"""The kernel that counts blended scores against its torch twin and against whole scores, in every form of this CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mocme_dist.evaluation.blended import CountInputs, blended_targets, count_native_blended, count_tiles_blended
from mocme_dist.kernels.counting import block_pair_distances

NOBODY = torch.zeros(0, dtype=torch.int64)


def problem(num_rows: int, C: int, Q: int, blocks: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries near their targets, rows of which some are copies with their biases, targets, biases and weights."""
    gen = torch.Generator().manual_seed(num_rows + C)
    rows_rD, bias_Qr = torch.randn(num_rows, 2 * C, generator=gen), torch.randn(Q, num_rows, generator=gen)
    rows_rD[num_rows // 2 :: 3], bias_Qr[:, num_rows // 2 :: 3] = rows_rD[0].clone(), bias_Qr[:, :1].clone()
    target_Q = torch.randint(num_rows, (Q,), generator=gen)
    target_Q[::2] = 0
    query_QD = rows_rD[target_Q] + 0.6 * torch.randn(Q, 2 * C, generator=gen)
    weight_QP = torch.rand(Q, blocks, generator=gen)
    weight_QP[::3, 0] = 0
    return query_QD, rows_rD, target_Q, bias_Qr, weight_QP


@pytest.mark.parametrize(
    ("num_rows", "C", "Q", "blocks"), [(1, 1, 1, 1), (31, 5, 3, 5), (53, 37, 9, 1), (100, 130, 4, 5), (257, 42, 21, 3)]
)
def test_counts_equal_the_torch_form_and_whole_scores(kernels, num_rows, C, Q, blocks):
    query_QD, rows_rD, target_Q, bias_Qr, weight_QP = problem(num_rows, C, Q, blocks)
    skip_row = torch.arange(0, num_rows, 7)
    skip_query = torch.arange(len(skip_row)) % Q
    every_Q, each = torch.arange(Q), (torch.arange(Q).repeat_interleave(num_rows), torch.arange(num_rows).repeat(Q))
    distance = block_pair_distances(query_QD, rows_rD, *each, blocks, kernels).view(Q, num_rows, blocks)
    total = torch.zeros(Q, num_rows)
    for block in range(blocks):
        total = total + weight_QP[:, block : block + 1] * distance[..., block]
    score_Qr = bias_Qr - total
    bound_Q = score_Qr[every_Q, target_Q]
    skips = (skip_query, skip_row)
    found = count_native_blended(CountInputs(query_QD, weight_QP, bound_Q, rows_rD, bias_Qr, every_Q, *skips), kernels)
    competes = torch.ones(Q, num_rows, dtype=torch.bool)
    competes[skip_query, skip_row] = False
    above, equal = (score_Qr > bound_Q[:, None]) & competes, (score_Qr == bound_Q[:, None]) & competes
    assert torch.equal(found, torch.stack([above.sum(1), equal.sum(1)]))
    bias_Q = bias_Qr[every_Q, target_Q]
    plain_Q = blended_targets(query_QD, weight_QP, rows_rD[target_Q], bias_Q, 64, False)
    plain = count_tiles_blended(CountInputs(query_QD, weight_QP, plain_Q, rows_rD, bias_Qr, every_Q, *skips), 64, False)
    assert torch.equal(found, plain)
    # Biases that some queries share, in another order.
    which_Q = every_Q.flip(0) // 2
    bias_ur = torch.randn(Q, num_rows, generator=torch.Generator().manual_seed(1))
    shared = (query_QD, weight_QP, bound_Q, rows_rD)
    assert torch.equal(
        count_native_blended(CountInputs(*shared, bias_ur, which_Q, *skips), kernels),
        count_native_blended(CountInputs(*shared, bias_ur[which_Q], every_Q, *skips), kernels),
    )
    assert torch.allclose(plain_Q, bound_Q, atol=1e-4)
    if num_rows > 50:
        assert (found[1] > 1).any()


def test_a_block_is_its_own_columns(kernels):
    query_QD, rows_rD, *_ = problem(20, 9, 20, 3)
    each = torch.arange(20)
    found = block_pair_distances(query_QD, rows_rD, each, each, 3, kernels)
    difference = (query_QD - rows_rD).double()
    modulus = torch.hypot(difference[:, :9], difference[:, 9:])
    assert torch.allclose(found.double(), modulus.view(20, 3, 3).sum(2), rtol=1e-5)


def test_one_nan_anywhere_counts_as_above(kernels):
    query_QD, rows_rD, target_Q, bias_Qr, weight_QP = problem(90, 130, 8, 2)
    weight_QP[:] = 1

    def counts() -> Tensor:
        bias_Q = bias_Qr[torch.arange(8), target_Q]
        bound_Q = blended_targets(query_QD, weight_QP, rows_rD[target_Q], bias_Q, 90, True)
        given = CountInputs(query_QD, weight_QP, bound_Q, rows_rD, bias_Qr, torch.arange(8), NOBODY, NOBODY)
        return count_native_blended(given, kernels)

    before = counts()
    rows_rD[17, 64] = float("nan")  # the last real column of the first of two blocks
    after = counts()
    assert (after[0] - before[0]).min() >= 0
    assert (after[0] - before[0]).max() == 1
    query_QD[3, -1] = float("nan")
    assert counts()[:, 3].tolist() == [90, 0]
