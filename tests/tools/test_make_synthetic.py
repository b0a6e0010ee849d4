"""The planted graph is what it says it is, both writers write the same one, and training finds what was planted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mocme_dist.config.load import load_config
from mocme_dist.config.schema import DataConfig
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.packing import pack_folder
from mocme_dist.train import resolve_paths, train
from tools.synthetic import planted
from tools.synthetic.packed import write_packed
from tools.synthetic.planted import SPLITS, Modality, Planted
from tools.synthetic.raw import write_raw
from tools.synthetic.truth import achievable_mrr

GRAPH = Planted(200, 900, 5, (4, 5), valid=0.06, test=0.08, seed=3)


def all_lines(graph: Planted) -> tuple[np.ndarray, np.ndarray]:
    triples, splits = zip(*graph.chunks(), strict=True)
    return np.concatenate(triples), np.concatenate(splits)


def named(dataset: Dataset, split: str) -> set[tuple[str, str, str]]:
    entities, relations = dataset.entity_names(), dataset.relation_names()
    return {(entities[h], relations[r], entities[t]) for h, r, t in dataset.triples(split).tolist()}


def test_every_line_follows_the_law_and_no_triple_is_in_two_splits(monkeypatch):
    whole, split = all_lines(GRAPH)
    monkeypatch.setattr(planted, "CHUNK", 70)
    assert all(np.array_equal(a, b) for a, b in zip(all_lines(GRAPH), (whole, split), strict=True))
    head, relation, tail = whole.T
    a, b = GRAPH.codes(head).T
    shifted = (a + GRAPH.shifts_R2[relation, 0]) % 4 * 5 + (b + GRAPH.shifts_R2[relation, 1]) % 5
    assert np.array_equal(GRAPH.group_of(tail), shifted)
    assert np.array_equal(GRAPH.target_group(GRAPH.group_of(tail), relation, inverse=True), GRAPH.group_of(head))
    parts = [{tuple(triple) for triple in whole[split == number].tolist()} for number in range(3)]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert all(len(part) > 20 for part in parts)
    assert set(whole[split == 0, 0]) == set(range(200))


def test_popularities_are_zipf_inside_a_group():
    graph = Planted(20_000, 400_000, 4, (2, 2), exponent=0.5)
    place = graph.lines(np.arange(20_000, 400_000))[:, 2] // 4
    assert place.max() < 5000
    # Weights (j + 1) ** -0.5: a quarter of the members, the most popular, have half of the mass.
    assert (place < 1250).mean() == pytest.approx(0.5, abs=0.01)
    low, high = (place < 10).mean(), ((place >= 4000) & (place < 4010)).mean()
    assert low / high == pytest.approx((11**0.5 - 1) / (4011**0.5 - 4001**0.5), rel=0.2)


def test_modalities_show_their_factor_and_noise_shows_nothing():
    entity = np.arange(GRAPH.num_entities)
    for modality, share in zip(GRAPH.modalities, (1.0, 1.0, 0.0), strict=True):
        values = GRAPH.features(modality, entity, 0).astype(float)
        assert GRAPH.present(modality, entity).mean() == pytest.approx(modality.share, abs=0.1)
        factor = GRAPH.codes(entity)[:, modality.factor or 0]
        means = np.stack([values[factor == code].mean(0) for code in range(factor.max() + 1)])
        nearest = np.linalg.norm(values[:, None] - means[None], axis=2).argmin(1)
        right = (nearest == factor).mean()
        assert right > 0.95 if share else right < 0.6, modality.name


def test_the_raw_folder_and_the_packed_data_set_are_one_graph(tmp_path):
    write_raw(tmp_path / "raw", GRAPH)
    from_raw = pack_folder(tmp_path / "raw", tmp_path / "dataset", DataConfig(shard_rows=64))
    packed = write_packed(tmp_path / "packed", GRAPH, 64)
    for split in SPLITS:
        assert named(from_raw, split) == named(packed, split)
    truth = json.loads((tmp_path / "raw" / "truth" / "truth.json").read_text())
    assert truth == json.loads((tmp_path / "packed" / "truth" / "truth.json").read_text())
    factors = np.load(tmp_path / "packed" / "truth" / "factors.npy")
    assert np.array_equal(factors, GRAPH.codes(np.array([int(name[1:]) for name in packed.entity_names()])))
    for modality in GRAPH.modalities:
        values = np.load(tmp_path / "raw" / "features" / f"{modality.name}.npy", allow_pickle=False)
        names = (tmp_path / "raw" / "features" / f"{modality.name}.ids").read_text().split()
        assert values.shape == (len(names), modality.width) and packed.modalities[modality.name] == {
            "entities": len(names)
        }


def test_the_achievable_mrr_is_that_of_ranking_by_the_truth():
    whole, split = all_lines(GRAPH)
    everything = {tuple(triple) for triple in whole.tolist()}
    reciprocal = []
    entity = np.arange(GRAPH.num_entities)
    for h, r, t in np.unique(whole[split == 2], axis=0).tolist():
        for source, target, inverse in ((h, t, False), (t, h, True)):
            group = GRAPH.target_group(np.array([source % 20]), np.array([r]), inverse)[0]
            score = np.where(entity % 20 == group, -(entity // 20), -(10**6))
            known = [e for e in entity if e != target and ((h, r, e) if not inverse else (e, r, t)) in everything]
            score[known] = -(10**9)
            reciprocal.append(1 / (1 + (score > score[target]).sum()))
    found = achievable_mrr(GRAPH, 10**6)
    assert found["mrr"] == pytest.approx(np.mean(reciprocal)) and 2 * found["test_triples"] == len(reciprocal)


def test_too_few_triples_and_a_folder_in_use_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected as many triples as entities"):
        Planted(100, 99)
    (tmp_path / "mine").write_text("")
    command = [sys.executable, "-m", "tools.make_synthetic", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2])
    assert result.returncode == 1 and "not empty; choose a new folder" in result.stderr


@pytest.mark.slow
def test_training_finds_what_was_planted(tmp_path):
    """Three triples an entity say little about its group; two modalities name the two factors, the third is noise."""
    shown = Modality("text", 0, 16, 0.9, 0.5), Modality("image", 1, 16, 0.9, 0.5), Modality("numeric", None, 16, 0.9)
    write_packed(tmp_path / "data", Planted(500, 1500, 4, (5, 5), valid=0.08, test=0.15, modalities=shown), 256)
    settings = [
        *("launch.mode=local", "deepspeed.engine=torch", "compile=off", "experts.width=32", "experts.num_experts=1"),
        *("experts.residual=true", "projection.structure=identity", "fusion.estimator=uniform", "rotate.gamma=4"),
        *(
            "train.batch_size=128",
            "negatives.count=64",
            "negatives.chunk_size=64",
            "negatives.weighting=self_adversarial",
        ),
        "evidence.spaces=[]",  # it is the model that is to find what was planted
        *("train.epochs=15", "train.eval_every=15", "train.checkpoint_every=15", "train.log_every=1000"),
        *(
            "entities.learning_rate=0.02",
            "train.learning_rate=0.005",
            "evaluation.encode_rows=512",
            "evaluation.tile_rows=512",
        ),
    ]
    mrr = {}
    for modalities in ("structure", "structure, text, image", "structure, numeric"):
        run = [
            f"data.dataset={json.dumps(str(tmp_path / 'data'))}",
            f"run.dir={json.dumps(str(tmp_path / modalities))}",
        ]
        mrr[modalities] = train(resolve_paths(load_config([], [*settings, *run, f"modalities=[{modalities}]"])))["mrr"]
    informed = mrr["structure, text, image"]
    assert informed > 2 * mrr["structure"] and informed > 2 * mrr["structure, numeric"], mrr
    achievable = json.loads((tmp_path / "data" / "truth" / "truth.json").read_text())["achievable"]["mrr"]
    assert achievable / 2 < informed < achievable, (mrr, achievable)
