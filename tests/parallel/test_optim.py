"""Row optimizers.

Rounding at random is unbiased and the same at every world size, state is zero pages, blocks do not show.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from mocme_dist.parallel import optim
from mocme_dist.parallel.optim import ADAM_LIMIT, choose_optimizer, lazy_zeros, random_bits, round_at_random
from mocme_dist.parallel.table import EntityTable, coalesce
from mocme_dist.partition import RowPartition


def make(
    partition: RowPartition, rank: int, dtype: torch.dtype = torch.bfloat16, width: int = 6, **settings: object
) -> EntityTable:
    return EntityTable(partition, rank, width, learning_rate=0.01, seed=3, dtype=dtype, **settings)  # type: ignore[arg-type]


def test_random_bits_are_uniform_and_a_function_of_seed_step_id_and_column():
    ids = torch.arange(20_000)
    bits = random_bits(ids, 10, seed=1, step=2)
    assert bits.dtype == torch.int32 and bits.min() >= 0 and bits.max() < 65536
    # 200,000 draws: the mean deviates by 65536 / sqrt(12 * 200,000) = 42, a bit's share by 0.0011.
    assert abs(bits.double().mean().item() - 32767.5) < 5 * 42
    for bit in range(16):
        assert abs(((bits >> bit) & 1).double().mean().item() - 0.5) < 5 * 0.0011
    # Columns, neighbouring ids, steps and seeds are independent: correlations deviate by 1 / sqrt(n).
    for other in (bits.roll(1, 1), bits.roll(1, 0), random_bits(ids, 10, 1, 3), random_bits(ids, 10, 2, 2)):
        correlation = torch.corrcoef(torch.stack([bits.flatten(), other.flatten()]).double())[0, 1].item()
        assert abs(correlation) < 5 / math.sqrt(bits.numel())
    picked = torch.tensor([5, 19_999, 0])
    assert torch.equal(random_bits(picked, 10, 1, 2), bits[picked])
    assert torch.equal(random_bits(picked, 7, 1, 2), bits[picked, :7])


@pytest.mark.parametrize("value", [1.0009765, -0.3333333, 3.1415927e-5, 12345.678, 1e-39])
def test_rounding_at_random_is_unbiased_between_the_two_neighbours(value):
    exact = torch.full((4000, 8), value)
    rounded = round_at_random(exact, torch.arange(4000), seed=0, step=7)
    below, above = sorted(rounded.float().unique().tolist())
    assert below < exact[0, 0].item() < above
    assert (rounded.view(torch.int16).max() - rounded.view(torch.int16).min()).item() == 1  # neighbours
    share = (exact[0, 0].item() - below) / (above - below)
    found = (rounded.float() == above).double().mean().item()
    assert abs(found - share) < 5 * math.sqrt(share * (1 - share) / exact.numel())


def test_what_bfloat16_holds_is_not_rounded():
    exact = torch.tensor([[0.0, -0.0, 1.0, -2.5, 2.0**-20, 1.9921875]]).repeat(500, 1)
    assert torch.equal(round_at_random(exact, torch.arange(500), 0, 1).float(), exact)


@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
def test_bfloat16_rows_are_the_same_bits_at_every_world_size(optimizer):
    whole = make(RowPartition(50, 1), 0, optimizer=optimizer)
    assert whole.rows_rD.dtype == torch.bfloat16 and {value.dtype for value in whole.state.values()} == {torch.float32}
    parts = {
        world: [make(RowPartition(50, world), rank, optimizer=optimizer) for rank in range(world)] for world in (2, 3)
    }
    for step in range(4):
        gen = torch.Generator().manual_seed(step)
        ids, grad = torch.randperm(50, generator=gen)[:30], torch.randn(30, 6, generator=gen)
        whole.update(ids, grad)
        for tables in parts.values():
            for table in tables:
                mine = (ids >= table.first) & (ids < table.last)
                table.update(ids[mine] - table.first, grad[mine])
    for tables in parts.values():
        assert torch.equal(torch.cat([table.rows_rD for table in tables]), whole.rows_rD)
    leaf = whole.gather(torch.tensor([4, 2]))
    assert leaf.dtype == torch.float32 and leaf.is_leaf and leaf.requires_grad


def test_updates_below_a_digit_of_bfloat16_count_on_average():
    """Each is a twentieth of a digit: rounded to nearest they would all be lost."""
    table = EntityTable(RowPartition(200, 1), 0, 6, optimizer="adagrad", learning_rate=100.0, dtype=torch.bfloat16)
    table.rows_rD.fill_(1.0)
    table.state["square_sum"].fill_(1.0)  # so large that these gradients do not move it
    digit = 2.0**-7
    grad = torch.full((200, 6), -digit / 20 / 100)
    assert (torch.tensor(1.0) + digit / 20).bfloat16() == 1.0
    for _ in range(400):
        table.update(torch.arange(200), grad)
    moved = table.rows_rD.float() - 1.0
    # 20 digits in all; one row's walk of 400 steps deviates by about sqrt(400 * 0.05) = 4.4 digits, the mean of 1,200
    # by 0.13.
    assert moved.mean().item() / digit == pytest.approx(20, abs=0.7)
    assert torch.equal(table.rows_rD.float(), (table.rows_rD.float() / digit).round() * digit)


@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updating_in_blocks_does_not_show(monkeypatch, optimizer, dtype):
    tables = [make(RowPartition(23, 1), 0, dtype, optimizer=optimizer, weight_decay=0.1) for _ in range(2)]
    for table, block in zip(tables, (10**6, 4), strict=True):
        monkeypatch.setattr(optim, "_BLOCK", block)
        for step in range(3):
            gen = torch.Generator().manual_seed(step)
            table.update(torch.randperm(23, generator=gen)[:17], torch.randn(17, 6, generator=gen))
    assert torch.equal(tables[0].rows_rD, tables[1].rows_rD)
    assert all(torch.equal(tables[0].state[name], tables[1].state[name]) for name in tables[0].state)


def test_state_takes_memory_only_where_rows_were_touched():
    def resident_mb() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

    before = resident_mb()
    state = lazy_zeros(2_000_000, 128, "cpu")  # 976 MB
    assert state.shape == (2_000_000, 128) and state.dtype == torch.float32
    state[torch.arange(0, 2_000_000, 400_000)] += 1  # five pages, of 2 MB where the system has such
    assert resident_mb() - before < 50
    assert state[400_000, 5] == 1 and state[400_001].abs().sum() == 0


def test_auto_is_adam_for_small_graphs_and_one_number_a_row_for_large_ones():
    assert [choose_optimizer("auto", size) for size in (1, ADAM_LIMIT, ADAM_LIMIT + 1)] == ["adam", "adam", "adagrad"]
    assert [choose_optimizer(name, 10**9) for name in ("adam", "adagrad")] == ["adam", "adagrad"]


def test_rows_of_several_parts_are_added_once_each():
    gen = torch.Generator().manual_seed(0)
    touched = [
        (torch.tensor(rows), torch.randn(len(rows), 3, generator=gen, dtype=torch.float64))
        for rows in ([4, 1], [1, 7, 4], [9])
    ]
    rows, grad = coalesce(touched)
    plain = torch.zeros(10, 3, dtype=torch.float64)
    for part, value in touched:
        for row, one in zip(part.tolist(), value, strict=True):
            plain[row] += one
    assert rows.tolist() == [1, 4, 7, 9]
    torch.testing.assert_close(grad, plain[rows], rtol=1e-15, atol=0)
    alone = coalesce(touched[:1])
    assert alone[0].tolist() == [4, 1] and torch.equal(alone[1], touched[0][1])
