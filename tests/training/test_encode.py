"""Vectors that are made piece by piece rank as those that are held whole do, bit for bit, at every world size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from plain_settings import MODEL
from tiny_run import tiny_config

from mocme_dist.evaluation.ranking import RowShard, Sizes, rank_queries, split_queries
from mocme_dist.parallel.comm import Comm
from mocme_dist.training.build import build_worker, open_dataset
from mocme_dist.training.encode import EntityEncoder


def rank_both(comm: Comm, dataset: Path, run_dir: Path, block_rows: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Body of one rank.

    Ranks from vectors held whole, ranks from pieces of one block, and how many pieces there were.
    """
    config = tiny_config(dataset, run_dir, f"evaluation.encode_rows={block_rows}", "modalities=[structure, numeric]")
    worker = build_worker(config, open_dataset(config.data), comm)
    worker.model.eval()
    queries, known = split_queries(worker.dataset.triples("test")), worker.dataset.known("all")
    inputs = lambda rows: worker.with_rows(worker.features(rows), worker.table.rows_rD[rows])  # noqa: E731

    def encoder() -> EntityEncoder:
        return EntityEncoder(worker.model, inputs, worker.partition, comm.rank, block_rows, block_rows, comm.device)

    lazy, whole = encoder(), encoder().whole()
    assert torch.equal(whole.z_rD, worker.encode_rows().z_rD)
    assert torch.equal(torch.cat([piece.z_rD.clone() for piece in lazy.pieces()]), whole.z_rD)
    assert lazy.finite and len(lazy.weights_rM) == whole.num_rows
    ids = np.arange(worker.dataset.num_entities)
    assert torch.equal(lazy.pick(ids), whole.pick(ids))
    ranks = [
        rank_queries(queries, worker.model.relations, vectors, known, comm, Sizes(16, 24)).filtered
        for vectors in (whole, encoder())
    ]
    return ranks[0], ranks[1], lazy.num_pieces


@pytest.mark.parametrize("block_rows", [16, 7])
def test_pieces_rank_as_the_whole_does(run_ranks, featured_dataset, tmp_path, block_rows):
    expected = None
    for world in (1, 2, 3):
        for whole, pieces, num_pieces in run_ranks(world, rank_both, featured_dataset, tmp_path / "run", block_rows):
            assert num_pieces > 1
            assert np.array_equal(whole, pieces)
            expected = whole if expected is None else expected
            assert np.array_equal(whole, expected)


def test_a_rank_without_rows_has_as_many_pieces(run_ranks, featured_dataset):
    """Pieces are made together under ZeRO-3: every rank must come to each."""
    assert run_ranks(3, count_pieces) == [2, 2, 2]


def count_pieces(comm: Comm) -> int:
    from mocme_dist.model.mocme import MoCME
    from mocme_dist.partition import RowPartition
    from mocme_dist.training.step import EntityInput

    model = MoCME({"structure": 4}, 1, MODEL._replace(width=4, num_experts=1)).eval()
    rows_rD = torch.ones(5, 4)

    def inputs(rows):
        return EntityInput({"structure": rows_rD[rows]}, torch.ones(1, len(rows), dtype=torch.bool), rows % 2 == 1)

    # Two rows on the first two ranks, one on the last; blocks of one row.
    encoder = EntityEncoder(model, inputs, RowPartition(5, comm.world_size), comm.rank, 1, 1, comm.device)
    pieces = list(encoder.pieces())
    assert all(isinstance(piece, RowShard) for piece in pieces)
    assert sum(piece.num_rows for piece in pieces) == encoder.num_rows == (1 if comm.rank == 2 else 2)
    assert len(pieces) == encoder.num_pieces
    return len(pieces)
