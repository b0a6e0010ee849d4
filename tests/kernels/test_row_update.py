"""The table's updates by C++ kernels against torch's: rows, state, and what is left alone."""

from __future__ import annotations

import pytest
import torch

from mocme_dist.kernels.row_update import row_update
from mocme_dist.parallel.table import EntityTable
from mocme_dist.partition import RowPartition

pytestmark = pytest.mark.skipif(row_update("cpu") is None, reason="no C++ compiler: nothing builds the kernels")


def table(optimizer: str, width: int, decay: float, fused: bool, dtype: torch.dtype = torch.float32) -> EntityTable:
    how = {"optimizer": optimizer, "learning_rate": 0.01, "weight_decay": decay, "seed": 3, "dtype": dtype}
    return EntityTable(RowPartition(50, 3), 1, width, **how, fused=row_update("cpu") if fused else None)  # type: ignore[arg-type]


def run(chosen: EntityTable, steps: int = 6) -> EntityTable:
    for step in range(steps):
        gen = torch.Generator().manual_seed(step)
        count = (9, 0, 1)[step % 3]
        grad_VD = torch.randn(count, chosen.width, generator=gen) * 10.0 ** (step - 3)
        chosen.update(torch.randperm(len(chosen.rows_rD), generator=gen)[:count], grad_VD)
    return chosen


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("width", [2, 16, 38])
@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
def test_kernels_move_rows_and_state_as_torch_does(optimizer, width, decay):
    plain, fused = (run(table(optimizer, width, decay, how)) for how in (False, True))
    torch.testing.assert_close(fused.rows_rD, plain.rows_rD, rtol=1e-5, atol=1e-6)
    for name, value in plain.state.items():
        torch.testing.assert_close(fused.state[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
def test_rows_that_nobody_asked_for_stay_bit_for_bit_and_threads_do_not_show(optimizer):
    found = {}
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            chosen = table(optimizer, 20, 0.1, True)
            before = chosen.rows_rD.clone()
            rows_V = torch.tensor([3, 0, 11])
            chosen.update(rows_V, torch.ones(3, 20))
            left = torch.ones(len(before), dtype=torch.bool).index_fill(0, rows_V, False)
            assert torch.equal(chosen.rows_rD[left], before[left])
            assert (chosen.rows_rD[rows_V] != before[rows_V]).all()
            assert all((value[left] == 0).all() for value in chosen.state.values())
            found[threads] = chosen.rows_rD
    finally:
        torch.set_num_threads(1)
    assert torch.equal(found[1], found[3])


def test_bfloat16_rows_are_left_to_torch_which_rounds_at_random():
    plain, fused = (run(table("adam", 8, 0.0, how, torch.bfloat16)) for how in (False, True))
    assert torch.equal(plain.rows_rD, fused.rows_rD)
