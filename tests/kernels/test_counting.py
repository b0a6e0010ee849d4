"""The counting kernel against its torch twins and against whole distances, in every form that this CPU can run."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from mocme_dist.kernels import builder, counting
from mocme_dist.kernels.builder import library_folder
from mocme_dist.kernels.counting import count_native, count_tiles, pair_distances, target_distances

NOBODY = torch.zeros(0, dtype=torch.int64)


def problem(num_rows: int, C: int, Q: int, noise: float = 0.7) -> tuple[Tensor, Tensor, Tensor]:
    """Queries near their targets, rows with copies of others, and the targets' rows."""
    gen = torch.Generator().manual_seed(num_rows + C)
    rows_rD = torch.randn(num_rows, 2 * C, generator=gen)
    rows_rD[num_rows // 2 :: 3] = rows_rD[0].clone()
    target_Q = torch.randint(num_rows, (Q,), generator=gen)
    return rows_rD[target_Q] + noise * torch.randn(Q, 2 * C, generator=gen), rows_rD, target_Q


@pytest.mark.parametrize(("num_rows", "C", "Q"), [(1, 1, 1), (31, 5, 3), (53, 37, 9), (100, 128, 4), (257, 33, 21)])
def test_counts_equal_the_plain_form(kernels, num_rows, C, Q):
    query_QD, rows_rD, target_Q = problem(num_rows, C, Q)
    skip_row = torch.arange(0, num_rows, 7)
    skip_query = torch.arange(len(skip_row)) % Q
    bound_Q = pair_distances(query_QD, rows_rD[target_Q], torch.arange(Q), torch.arange(Q), kernels)
    plain_Q = target_distances(query_QD, rows_rD[target_Q], 64, False)
    found = count_native(query_QD, bound_Q, rows_rD, skip_query, skip_row, kernels)
    assert torch.equal(found, count_tiles(query_QD, plain_Q, rows_rD, skip_query, skip_row, 64, False))


@pytest.mark.parametrize("noise", [0.1, 0.7, 3.0])
def test_sums_that_stop_early_change_no_count(kernels, noise):
    """Against counts of the whole sums, bit for bit: near targets stop nearly every sum, far ones hardly any."""
    query_QD, rows_rD, target_Q = problem(517, 150, 24, noise)
    every_Q, every_r = torch.arange(24), torch.arange(517)
    pairs = every_Q.repeat_interleave(517), every_r.repeat(24)
    distance_Qr = pair_distances(query_QD, rows_rD, *pairs, kernels).view(24, 517)
    bound_Q = distance_Qr[every_Q, target_Q]
    expected = torch.stack([(distance_Qr < bound_Q[:, None]).sum(1), (distance_Qr == bound_Q[:, None]).sum(1)])
    assert torch.equal(count_native(query_QD, bound_Q, rows_rD, NOBODY, NOBODY, kernels), expected)
    assert (expected[1] > 1).any()


def test_distances_are_right_to_the_last_digits(kernels):
    query_QD, rows_rD, _ = problem(64, 128, 64)
    query_QD[0], rows_rD[0] = 0, 0  # squares of 0, and of numbers whose squares are denormal
    query_QD[1], rows_rD[1] = 1e-18, 0
    pairs = torch.arange(64), torch.arange(64)
    found = pair_distances(query_QD, rows_rD, *pairs, kernels)
    difference = (query_QD - rows_rD).double()
    expected = torch.hypot(difference[:, :128], difference[:, 128:]).sum(1)
    assert torch.allclose(found[2:].double(), expected[2:], rtol=1e-6, atol=0)
    assert found[:2].abs().max() < 1e-9


def test_one_nan_anywhere_counts_as_nearer(kernels):
    _, rows_rD, _ = problem(90, 130, 8)
    target_Q, every_Q = torch.full((8,), 5), torch.arange(8)
    query_QD = rows_rD[target_Q] + 0.05

    def counts() -> Tensor:
        bound_Q = pair_distances(query_QD, rows_rD, every_Q, target_Q, kernels)
        return count_native(query_QD, bound_Q, rows_rD, NOBODY, NOBODY, kernels)

    before = counts()
    rows_rD[17, 129] = float("nan")  # the last real part, long after the sum is beyond the target
    assert torch.equal(counts()[0], before[0] + 1)
    query_QD[3, -1] = float("nan")
    assert counts()[:, 3].tolist() == [90, 0]


def test_without_a_compiler_the_torch_form_runs(monkeypatch):
    query_QD, rows_rD, _ = problem(53, 8, 4)
    monkeypatch.setattr(counting, "native_kernels", lambda: None)
    called = []
    monkeypatch.setattr(counting, "count_tiles", lambda *args: called.append(args[-1]))
    counting.count(query_QD, torch.zeros(4), rows_rD, NOBODY, NOBODY, 64, True)
    assert called == [True]


def test_what_cannot_be_built_is_said_and_gives_nothing(tmp_path, caplog, monkeypatch):
    source = tmp_path / "broken.cpp"
    source.write_text("this is no C++\n")
    if builder.compiler() is not None:
        with caplog.at_level(logging.WARNING):
            assert builder.library(source) is None
        assert "cannot build the C++ kernels" in caplog.text
        assert "broken.cpp:1:" in caplog.text and "error:" in caplog.text  # the compiler's own words
        assert not list(library_folder().glob("broken*"))
    monkeypatch.setattr(builder, "compiler", lambda: None)
    assert builder.library(tmp_path / "none.cpp") is None


@pytest.mark.slow
def test_compiled_tiles_equal_plain_ones():
    query_QD, rows_rD, target_Q = problem(53, 16, 8)
    skip_query, skip_row = torch.tensor([0, 3, 3]), torch.tensor([2, 20, 52])
    counts = [
        count_tiles(
            query_QD, _tile_targets(query_QD, rows_rD[target_Q], compiled), rows_rD, skip_query, skip_row, 21, compiled
        )
        for compiled in (True, False)
    ]
    assert torch.equal(*counts)


def _tile_targets(query_QD: Tensor, target_QD: Tensor, compiled: bool) -> Tensor:
    """The torch form's, whether or not there is a kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "native_kernels", lambda: None)
        return target_distances(query_QD, target_QD, 21, compiled)


def test_where_a_library_cannot_be_written_or_loaded_the_torch_form_runs(tmp_path, caplog, monkeypatch):
    if builder.compiler() is None:
        pytest.skip("no C++ compiler")
    for name, patch, reason in (
        ("absent", ("library_folder", lambda: tmp_path / "absent"), "[Errno 2] No such file or directory"),
        ("noexec", ("ctypes.CDLL", _refuse), ""),
    ):
        source = tmp_path / f"{name}.cpp"
        source.write_text('extern "C" int one() { return 1; }\n')
        monkeypatch.setattr(f"mocme_dist.kernels.builder.{patch[0]}", patch[1])
        with caplog.at_level(logging.WARNING):
            assert builder.library(source) is None
        assert f"or they cannot be loaded ({reason}" in caplog.text
        monkeypatch.undo()


def _refuse(path: str) -> None:
    raise OSError(f"{path}: failed to map segment from shared object: Operation not permitted")
