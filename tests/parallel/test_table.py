"""The row shard: rows by id alone, optimizers against dense twins, untouched rows bit for bit."""

from __future__ import annotations

import pytest
import torch

from mocme_dist.parallel import table as table_module
from mocme_dist.parallel.table import EntityTable, initial_rows
from mocme_dist.partition import RowPartition


@pytest.mark.parametrize("num_rows", [1, 2, 5, 4096, 4097, 9000])
def test_initial_rows_depend_on_seed_and_id_alone(num_rows):
    whole = initial_rows(0, num_rows, 3, 0.5, seed=4)
    for world in (1, 2, 3):
        partition = RowPartition(num_rows, world)
        parts = [initial_rows(*partition.bounds(rank), 3, 0.5, seed=4) for rank in range(world)]
        assert torch.equal(torch.cat(parts), whole)
    assert whole.dtype == torch.float32
    assert whole.abs().max() <= 0.5
    assert len(whole.unique(dim=0)) == num_rows
    assert not torch.equal(whole, initial_rows(0, num_rows, 3, 0.5, seed=5))


def test_initial_rows_are_uniform():
    values = initial_rows(0, 9000, 4, 2.0, seed=0)
    # Mean 0 with deviation 4 / sqrt(12 * 36000) = 0.006; variance 4 / 3.
    assert abs(values.mean().item()) < 0.03
    assert values.var().item() == pytest.approx(4 / 3, rel=0.03)
    assert values.abs().max() > 1.99


def test_an_empty_shard_has_no_rows_and_updates_nothing():
    table = EntityTable(RowPartition(2, 3), 2, 4)
    assert table.rows_rD.shape == (0, 4)
    rows_V = torch.zeros(0, dtype=torch.long)
    leaf_VD = table.gather(rows_V)
    leaf_VD.sum().backward()
    table.update(rows_V, leaf_VD.grad)
    assert table.num_updates == 1


def make(optimizer: str, num_rows: int = 9, **settings: float) -> EntityTable:
    return EntityTable(RowPartition(num_rows, 1), 0, 4, optimizer=optimizer, learning_rate=0.03, seed=1, **settings)


def loss_of(value: torch.Tensor, step: int) -> torch.Tensor:
    slope = torch.sin(torch.arange(value.numel(), dtype=value.dtype) + step).view_as(value)
    return (slope * value + 0.1 * value.square()).sum()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_equals_torch_adam_where_all_rows_are_touched(weight_decay):
    table = make("adam", weight_decay=weight_decay)
    plain = torch.nn.Parameter(table.rows_rD.double().clone())
    adam = torch.optim.Adam([plain], lr=0.03, weight_decay=weight_decay)
    order = torch.tensor([3, 1, 0, 2, 8, 7, 6, 5, 4])
    for step in range(30):
        leaf = table.gather(order)
        loss_of(leaf[order.argsort()], step).backward()
        table.update(order, leaf.grad)
        adam.zero_grad()
        loss_of(plain, step).backward()
        adam.step()
    torch.testing.assert_close(table.rows_rD.double(), plain.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(table.state["first_moment"].double(), adam.state[plain]["exp_avg"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        table.state["second_moment"].double(), adam.state[plain]["exp_avg_sq"], rtol=1e-4, atol=1e-6
    )


def test_adagrad_equals_its_formula_with_one_number_a_row():
    """Row-wise Adagrad: each row's step is its gradient over the root of the sum of its mean squared gradients."""
    table = make("adagrad")
    plain, square = table.rows_rD.double().clone(), [0.0] * 9
    rows = torch.arange(9)
    for step in range(20):
        leaf = table.gather(rows)
        loss_of(leaf, step).backward()
        table.update(rows, leaf.grad)
        twin = plain.clone().requires_grad_()
        loss_of(twin, step).backward()
        for row in range(9):
            square[row] += float((twin.grad[row] ** 2).mean())
            plain[row] -= 0.03 * twin.grad[row] / (square[row] ** 0.5 + 1e-10)
    torch.testing.assert_close(table.rows_rD.double(), plain, rtol=1e-5, atol=1e-6)
    assert table.state["square_sum"].shape == (9, 1)


def test_adagrad_of_width_one_equals_torch_adagrad():
    table = EntityTable(RowPartition(6, 1), 0, 1, optimizer="adagrad", learning_rate=0.05)
    plain = torch.nn.Parameter(table.rows_rD.clone())
    adagrad = torch.optim.Adagrad([plain], lr=0.05)
    rows = torch.arange(6)
    for step in range(15):
        leaf = table.gather(rows)
        loss_of(leaf, step).backward()
        table.update(rows, leaf.grad)
        adagrad.zero_grad()
        loss_of(plain, step).backward()
        adagrad.step()
    torch.testing.assert_close(table.rows_rD, plain.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
def test_rows_that_nobody_asked_for_stay_bit_for_bit(optimizer):
    table = make(optimizer)
    everyone = torch.arange(9)
    for _ in range(2):  # all rows have momentum
        table.update(everyone, torch.randn(9, 4, generator=torch.Generator().manual_seed(0)))
    rows, state = table.rows_rD.clone(), {name: value.clone() for name, value in table.state.items()}
    touched = torch.tensor([6, 2])
    table.update(touched, torch.ones(2, 4))
    others = torch.tensor([0, 1, 3, 4, 5, 7, 8])
    assert torch.equal(table.rows_rD[others], rows[others])
    assert (table.rows_rD[touched] != rows[touched]).all()
    for name, value in table.state.items():
        assert torch.equal(value[others], state[name][others])
        assert (value[touched] != state[name][touched]).all()


def test_gather_gives_copies():
    table = make("adam")
    before = table.rows_rD.clone()
    leaf = table.gather(torch.tensor([1, 3]))
    assert leaf.is_leaf
    assert leaf.requires_grad
    leaf.data.zero_()
    assert torch.equal(table.rows_rD, before)


def test_a_block_boundary_does_not_show(monkeypatch):
    """Cutting inside, at and across blocks gives the same rows."""
    monkeypatch.setattr(table_module, "_INIT_BLOCK", 8)
    whole = initial_rows(0, 30, 2, 1.0, seed=0)
    for first in range(30):
        for last in range(first, 31):
            assert torch.equal(initial_rows(first, last, 2, 1.0, seed=0), whole[first:last])
