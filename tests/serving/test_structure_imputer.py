"""The map that places new entities: a ridge regression that finds a linear law, and is used only where it helps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_bundle import PART_BYTES, rows_of

from mocme_dist.serving import structure_imputer
from mocme_dist.serving.bundle import Bundle
from mocme_dist.serving.export import export_bundle
from mocme_dist.serving.structure_imputer import fit_imputer, inputs_of
from mocme_dist.serving.unseen import UnseenEntityEncoder


def test_inputs_hold_what_is_there_and_nothing_of_structure():
    modal = np.arange(24, dtype=np.float32).reshape(3, 2, 4) + 1
    present = np.array([[True, True], [True, False], [False, True]])
    x = inputs_of(modal, present, structure=0)
    assert x.tolist() == [[9, 10, 11, 12, 0, 0, 0, 0, 1, 0, 1], [0, 0, 0, 0, 21, 22, 23, 24, 0, 1, 1]]


def test_a_linear_law_is_found():
    gen = np.random.default_rng(0)
    x, law = gen.normal(size=(400, 9)), gen.normal(size=(9, 4))
    np.testing.assert_allclose(structure_imputer._ridge(x, (x @ law).astype(np.float32), 1e-6), law, atol=1e-3)


def test_the_map_is_kept_only_where_it_ranks_better(answered_run, bundle, monkeypatch):
    rows = rows_of(answered_run)
    matrix, report = fit_imputer(rows, bundle)
    assert report["used"] == (matrix is not None) == (report["map_mrr"] > report["plain_mrr"])
    assert 0 < report["plain_mrr"] < 1 and 0 < report["map_mrr"] < 1 and report["entities"] > 40
    monkeypatch.setattr(
        structure_imputer,
        "_reciprocal_rank",
        lambda bundle, triples, ids, vectors: float(not np.allclose(vectors.std(0), 0)),
    )
    assert fit_imputer(rows, bundle)[0] is None  # a tie keeps the plain vectors


def test_a_kept_map_is_what_a_new_entity_passes(answered_run, tmp_path, monkeypatch):
    calls = iter([0.1, 0.2])
    monkeypatch.setattr(structure_imputer, "_reciprocal_rank", lambda *_: next(calls))
    rows = rows_of(answered_run)
    export_bundle(rows, tmp_path / "bundle", part_bytes=PART_BYTES)
    bundle = Bundle.open(tmp_path / "bundle")
    assert (
        bundle.manifest["structure_imputer"]["used"]
        and (tmp_path / "bundle" / "structure_imputer.safetensors").is_file()
    )
    encoder = UnseenEntityEncoder(bundle, trust_encoders=True)
    values = np.linspace(-1, 1, bundle.manifest["raw_widths"]["text"]).astype(np.float32)
    z, weights = encoder.encode([{"text": values}])
    plain, _ = encoder.encode([{"text": values}], correct=False)
    M, D = len(bundle.modalities), bundle.width
    absent = {name: torch.zeros(1, bundle.manifest["raw_widths"][name]) for name in bundle.modalities}
    present = torch.tensor([[name == "text"] for name in bundle.modalities])
    fused = encoder.model.encode({**absent, "text": torch.from_numpy(values[None])}, present)
    x = np.concatenate([fused.modal_MVD[1, 0].numpy(), np.zeros((M - 2) * D), [1, 0, 0, 1]])
    assert encoder.matrix is not None and encoder.matrix.shape == ((M - 1) * (D + 1) + 1, D)
    np.testing.assert_allclose(z[0], x @ encoder.matrix, rtol=1e-4, atol=1e-5)
    assert not np.allclose(z, plain) and weights[0].tolist() == [0, 1, 0, 0]
    assert float(torch.dist(fused.z_VD[0], torch.from_numpy(plain[0]))) < 1e-6


def test_the_mapped_vectors_lie_nearer_to_the_whole_ones(answered_run, bundle):
    _, report = fit_imputer(rows_of(answered_run), bundle)
    assert report["map_distance"] == pytest.approx(min(report["map_distance"], report["plain_distance"]))
