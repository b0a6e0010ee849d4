"""A bundle with evidence answers as evaluation ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_bundle import PART_BYTES, config_of, rows_of

from mocme_dist.errors import DataError
from mocme_dist.evaluation.ranking import split_queries
from mocme_dist.evidence.blend import load_blend, save_blend
from mocme_dist.evidence.units import SCALE
from mocme_dist.parallel.comm import communication
from mocme_dist.runs.directory import RunDirectory
from mocme_dist.runs.task import find
from mocme_dist.serving.bundle import Bundle
from mocme_dist.serving.export import export_bundle
from mocme_dist.serving.predict import Question, UnseenEntity, predict
from mocme_dist.serving.reasons import _evidence_term
from mocme_dist.serving.scorer import Asked, answers_in, best_answers, not_competing, place
from mocme_dist.training.blending import Blender
from mocme_dist.training.build import build_worker, open_dataset
from mocme_dist.training.loop import restore


def test_places_of_facts_are_the_ranks_of_evaluation(blended_run, blended_bundle):
    config = config_of(blended_run)
    blend = load_blend(blended_run / "blend.safetensors")
    with communication(30) as comm:
        worker = build_worker(config, open_dataset(config.data), comm)
        saved = find(RunDirectory(blended_run), worker, "auto", best=True)
        assert saved is not None
        restore(worker, saved)
        blender = Blender(worker)
        queries = split_queries(worker.dataset.triples("test"))
        ranks = blender._rank(queries, [torch.from_numpy(blend.weight_PF)])[0].filtered
    assert blended_bundle.evidence is not None
    assert blended_bundle.evidence.terms == blender.evidence.terms
    asked = Asked.of(blended_bundle, queries.source, queries.relation, queries.direction)
    found = []
    for at, target in enumerate(queries.target.tolist()):
        one = asked.take(np.array([at]))
        found.append(place(blended_bundle, one, target, answers_in(blended_bundle.known, one)[0])[1])
    # Two kernels of distances round apart: a near pair may part.
    assert np.abs(np.array(found) - ranks).max() <= 1
    assert (found == ranks).mean() > 0.95
    top = best_answers(blended_bundle, asked, [np.zeros(0, np.int64)] * len(ranks), 60)
    for at, target in enumerate(queries.target.tolist()):
        score, *_ = place(blended_bundle, asked.take(np.array([at])), target, np.zeros(0, np.int64))
        assert top.score_Qk[at][list(top.id_Qk[at]).index(target)] == pytest.approx(score, abs=1e-5)
    assert (np.diff(top.score_Qk, axis=1) <= 0).all()


def test_answers_are_the_best_and_a_new_entity_is_asked_by_its_vector(blended_bundle):
    name, relation = blended_bundle.entities.take(np.array([5]))[0], "near"
    answers = predict(blended_bundle, [Question(name, relation, None)], k=7)
    vector = blended_bundle.rows(blended_bundle.vector_parts, np.array([5]))[0]
    new = predict(
        blended_bundle, [Question(UnseenEntity("new", vector), relation, None), Question(None, relation, name)], k=7
    )
    assert len(answers.answer) == 7 and len(new.answer) == 14
    assert np.isfinite(new.score).all() and (np.diff(answers.score) <= 0).all()


def test_a_bundle_without_a_blend_of_its_checkpoint_answers_by_the_model(blended_run, tmp_path, caplog):
    run = Path(shutil.copytree(blended_run, tmp_path / "run"))
    blend = load_blend(run / "blend.safetensors")
    save_blend(run / "blend.safetensors", blend._replace(step=blend.step + 1))
    export_bundle(rows_of(run), tmp_path / "bundle", part_bytes=PART_BYTES)
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.evidence is None and not (tmp_path / "bundle" / "blend.safetensors").exists()
    assert "answers by the model alone" in caplog.text


def test_a_blend_that_does_not_fit_is_refused(blended_bundle, tmp_path):
    folder = Path(shutil.copytree(blended_bundle.directory, tmp_path / "bundle"))
    blend = load_blend(folder / "blend.safetensors")
    tables = [table[:-1] for table in (blend.weight_PF, blend.without_frequency_PF)]
    save_blend(folder / "blend.safetensors", blend._replace(weight_PF=tables[0], without_frequency_PF=tables[1]))
    with pytest.raises(DataError, match=r"blend\.safetensors"):
        Bundle.open(folder)
    manifest = json.loads((folder / "bundle.json").read_text())
    with pytest.raises(DataError, match="does not fit the bundle"):
        Bundle(folder, manifest)


def test_candidates_of_a_blend_are_those_of_the_whole_list(blended_bundle):
    asked = Asked.of(blended_bundle, [5, 7, 11], [2, 2, 1], [0, 1, 0])
    left_out = not_competing(blended_bundle, asked)
    few = [np.array([1, 8, 30, 44])] * 3
    whole = best_answers(blended_bundle, asked, left_out, 60)
    some = best_answers(blended_bundle, asked, left_out, 60, few)
    for q in range(3):
        kept = np.isin(whole.id_Qk[q], few[q])
        assert some.id_Qk[q][: kept.sum()].tolist() == whole.id_Qk[q][kept].tolist()
        assert some.score_Qk[q][: kept.sum()].tolist() == whole.score_Qk[q][kept].tolist()


def test_an_unseen_entity_has_the_units_of_its_features_and_they_vote(blended_run, blended_bundle):
    encoder = blended_bundle.unseen_encoder(trust_encoders=True)
    spaces = {name for name in blended_bundle.evidence.about["spaces"] if name != "model"}
    stores = {
        name: rows_of(blended_run).store(name, 0, 60) for name in blended_bundle.modalities if name != "structure"
    }
    full = np.flatnonzero(np.logical_and.reduce([store.present().numpy() for store in stores.values()]))[:5]
    assert len(full) and spaces >= {"text", "numeric"}
    for row in full.tolist():
        features = {name: store.gather(torch.tensor([row]))[0][0].numpy() for name, store in stores.items()}
        units = encoder.units(features)
        assert set(units) == spaces
        for name, unit_F in units.items():  # the mean is stored as float32, so a unit may round the other way
            stored = blended_bundle.rows(blended_bundle.evidence.units[name], np.array([row]))[0]
            assert np.abs(unit_F - stored).max() <= 1, name
        vector = blended_bundle.vectors([row])[0]
        alike, bare = (
            predict(blended_bundle, [Question(UnseenEntity("copy", vector, given), "near", None)], k=60)
            for given in (units, {})
        )
        assert alike.answer.tolist() != bare.answer.tolist() or alike.score.tolist() != bare.score.tolist()


def test_a_source_without_facts_does_not_match_itself(blended_bundle, monkeypatch):
    """As in `Evidence`: the candidate that is the source has no value, all others their cosines."""
    evidence, source = blended_bundle.evidence, 7
    name = next(name for name in evidence.about["spaces"] if name not in ("model", "coordinates"))
    asked = Asked.of(blended_bundle, [source], [0], [0])
    monkeypatch.setattr(evidence.facts.known, "has_source", lambda ids: np.zeros(np.shape(ids), bool))
    turn = evidence.terms.index(f"match:{name}")
    weight_PF = np.zeros_like(evidence.blend.weight_PF)
    weight_PF[:, evidence.num_blocks + turn] = 1
    monkeypatch.setattr(evidence, "blend", evidence.blend._replace(weight_PF=weight_PF))
    prepared = evidence.prepare(asked)
    unit_EF = blended_bundle.rows(evidence.units[name], np.arange(blended_bundle.num_entities)).astype(np.float64)
    expected = unit_EF @ unit_EF[source] / SCALE**2
    assert expected[source] > 0.9
    expected[source] = 0
    found = []
    for part in range(blended_bundle.partition.num_shards):
        first, last = blended_bundle.partition.bounds(part)
        half = (last - first) // 2
        for start, stop in ((0, half), (half, last - first)):
            found += evidence._bias(prepared, part, start, first + start, stop - start)[0].tolist()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    ids = np.array([source, 3, 20])
    np.testing.assert_allclose(_evidence_term(evidence, prepared, f"match:{name}", 0, ids), expected[ids], atol=1e-6)
