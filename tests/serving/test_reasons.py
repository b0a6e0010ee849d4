"""Reasons agree with what they explain.

Terms with scores, votes with a plain count, ranks and influence with the model itself.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from tiny_bundle import rows_of

from mocme_dist.data.known import KnownAnswers
from mocme_dist.evidence.facts import Facts
from mocme_dist.evidence.shared_facts import SharedFacts
from mocme_dist.serving.counterfactual import fused_without
from mocme_dist.serving.influence import influence, learning_rate
from mocme_dist.serving.predict import UnseenEntity
from mocme_dist.serving.reasons import Reasons, explain, known_answers_of, question_of
from mocme_dist.serving.scorer import Asked, best_answers, not_competing, place, rotated

ASKED = [(5, 0, 0), (7, 1, 1), (12, 2, 0), (3, 3, 1), (0, 0, 1)]


def of_vectors(
    vector_nD: np.ndarray, phase_C: np.ndarray, source_D: np.ndarray, direction: int, gamma: float
) -> np.ndarray:
    """Plain scores by complex numbers."""
    C = vector_nD.shape[1] // 2
    turned = (source_D[:C] + 1j * source_D[C:]) * np.exp(1j * phase_C * (1 - 2 * direction))
    return gamma - np.abs(turned - (vector_nD[:, :C] + 1j * vector_nD[:, C:])).sum(1)


@pytest.fixture(params=["blended", "model"])
def any_bundle(request, blended_bundle, bundle):
    return blended_bundle if request.param == "blended" else bundle


@pytest.mark.parametrize("asked", ASKED)
def test_contributions_add_up_to_the_score_and_the_rank_is_that_of_queries(any_bundle, asked):
    one = question_of(any_bundle, *asked)
    left_out = not_competing(any_bundle, one)[0]
    best = best_answers(any_bundle, one, [left_out], 60)
    for answer in best.id_Qk[0][[0, 1, 20]].tolist():
        found = explain(any_bundle, *asked, answer)
        score, rank, _ = place(any_bundle, one, answer, left_out)
        assert sum(term["contribution"] for term in found["terms"]) == pytest.approx(score, abs=1e-4)
        assert found["score"] == pytest.approx(score, abs=1e-4)
        assert found["rank"] == pytest.approx(rank, abs=1)
        for term in found["terms"]:
            assert term["value"] * term["weight"] == pytest.approx(term["contribution"], abs=1e-4)
        assert set(found["rank_without"]) == set(any_bundle.modalities)
        assert any_bundle.label(answer) in found["text"]


@pytest.mark.parametrize("asked", ASKED)
def test_votes_are_those_of_the_nearest_entities_with_the_relation(blended_bundle, asked):
    source, relation, direction = asked
    facts = blended_bundle.facts_of_train.known
    unit_EF = np.concatenate(blended_bundle.evidence.units["text"]).astype(np.float64)
    sources = [
        entity
        for entity in range(blended_bundle.num_entities)
        if entity != source and len(facts.lookup([entity], [relation], [direction])[1]) and unit_EF[entity].any()
    ]
    far = np.square(unit_EF[sources] - unit_EF[source]).sum(1)
    nearest = np.array(sources)[np.lexsort((sources, far))][: blended_bundle.evidence.about["neighbours"]]
    for answer in (1, 8, 30):
        [vote] = [vote for vote in explain(blended_bundle, *asked, answer)["votes"] if vote["space"] == "text"]
        if not unit_EF[source].any():
            assert vote["neighbours"] == vote["agreeing"] == 0
            continue
        agreeing = [one for one in nearest if answer in facts.lookup([one], [relation], [direction])[1]]
        assert (vote["neighbours"], vote["agreeing"]) == (len(nearest), len(agreeing))
        assert [fact["id"] for fact in vote["facts"]] == blended_bundle.entities.take(np.array(agreeing, np.int64))
        assert all(-1 <= fact["similarity"] <= 1.001 for fact in vote["facts"])


def test_vectors_without_a_modality_are_those_of_the_model_without_it(answered_run, bundle):
    """Weights of the other modalities keep their proportions, which is what uniform fusion does, and MINE nearly."""
    rows = rows_of(answered_run)
    for m, modality in enumerate(bundle.modalities):
        hidden = torch.cat([block.z_nD for block in rows.blocks(0, bundle.num_entities, hide=modality)]).numpy()
        found, there = fused_without(bundle, np.arange(bundle.num_entities), m)
        off = np.linalg.norm(found[there] - hidden[there], axis=1) / np.linalg.norm(hidden[there], axis=1)
        assert there.sum() > 10 and np.median(off) < 0.05


def test_the_rank_without_a_modality_is_that_of_entities_that_never_had_it(answered_run, bundle):
    rows, off = rows_of(answered_run), []
    for modality in bundle.modalities:
        blocks = list(rows.blocks(0, bundle.num_entities, hide=modality))
        hidden = torch.cat([block.z_nD for block in blocks]).numpy().astype(np.float64)
        there = torch.cat([block.weight_nM for block in blocks]).numpy().sum(1) > 0
        for asked in ASKED:
            source, relation, direction = asked
            if not there[source]:
                continue
            score = of_vectors(hidden, bundle.phase_RC[relation], hidden[source], direction, bundle.gamma)
            left_out = not_competing(bundle, question_of(bundle, *asked))[0]
            for answer in (4, 9, 33):
                said = explain(bundle, *asked, answer)["rank_without"][modality]
                if not there[answer]:
                    assert said is None
                    continue
                others = np.setdiff1d(np.flatnonzero(there), np.append(left_out, answer))
                off.append(abs(said - 1 - (score[others] > score[answer]).sum()))
    assert np.mean(off) < 1.5 and np.median(off) <= 1, off


def unlearned(bundle, vector_D: np.ndarray, source: int, facts, answer: int, asked: Asked, step: float) -> np.ndarray:
    """Change of the answer's score after one step of gradient ascent on the loss of each fact, by autograd."""
    vectors = torch.from_numpy(np.concatenate(bundle.vector_parts)).double()
    phases = torch.from_numpy(np.array(bundle.phase_RC)).double()

    def score(z_D: torch.Tensor, place: int, other: int) -> torch.Tensor:
        C = len(z_D) // 2
        turned = torch.complex(z_D[:C], z_D[C:]) * torch.exp(1j * phases[place // 2] * (1 - 2 * (place % 2)))
        return bundle.gamma - (turned - torch.complex(vectors[other][:C], vectors[other][C:])).abs().sum()

    target = (2 * int(asked.relation[0]) + int(asked.direction[0]), answer)
    before = float(score(vectors[source], *target))
    changes = []
    for where, other in zip(facts.place.tolist(), facts.neighbour.tolist(), strict=True):
        z_D = vectors[source].clone().requires_grad_()
        loss = -torch.nn.functional.logsigmoid(score(z_D, where, other))
        [gradient_D] = torch.autograd.grad(loss, z_D)
        changes.append((float(score(vectors[source] + step * gradient_D, *target)) - before) / step)
    return np.array(changes)


@pytest.mark.parametrize("asked", ASKED)
def test_influence_is_the_change_after_one_step_of_unlearning(bundle, asked):
    one = question_of(bundle, *asked)
    for answer in (4, 33):
        found = influence(bundle, one, answer)
        plain = unlearned(bundle, bundle.vector_parts[0], asked[0], found, answer, one, 1e-5)
        assert len(found.effect) >= 5
        step = learning_rate(bundle)
        assert found.model == pytest.approx(step * plain, abs=step * 1e-3) and not found.evidence.any()
        shown = explain(bundle, *asked, answer)["influence"]
        worst = step * np.sort(plain)[:5]
        assert [fact["effect"] for fact in shown] == pytest.approx(worst[worst < 0][: len(shown)].tolist(), abs=1e-3)


def really_left_out(bundle, asked: Asked, answer: int, place: int, neighbour: int) -> float:
    """The evidence's part of an answer's score with a fact of the source really taken from train."""
    evidence, source = bundle.evidence, int(asked.source[0])
    head, tail = (source, neighbour) if place % 2 == 0 else (neighbour, source)
    entity, where, other = evidence.facts.all()
    triples = np.stack([entity, where // 2, other], 1)[where % 2 == 0]
    gone = (triples == np.array([head, place // 2, tail])).all(1)
    known = KnownAnswers.build(triples[~gone], bundle.num_relations)
    less = copy.copy(evidence)
    less.__dict__.pop("rules", None)
    less.facts = Facts(known, bundle.num_entities)
    limits = (evidence.about["max_holders"], evidence.about["max_answers"])
    less.shared = SharedFacts(less.facts, 0, bundle.num_entities, *limits)
    return evidence_part(less, bundle, asked, answer)


def evidence_part(evidence, bundle, asked: Asked, answer: int) -> float:
    """An answer's score without the model's part."""
    prepared = evidence.prepare(asked)
    prepared = prepared._replace(weight_QP=np.zeros_like(prepared.weight_QP))
    query_QD = rotated(bundle, asked)
    scores = [
        evidence.scores(prepared, query_QD, part, 0, len(rows))[0] for part, rows in enumerate(bundle.vector_parts)
    ]
    return float(np.concatenate(scores)[answer])


def test_the_evidences_influence_is_that_of_really_leaving_the_fact_out(blended_bundle):
    """The rarity of facts and the confidence of rules change a little, too, which `influence` leaves as they are."""
    off, size, agree = [], [], []
    for source, relation, direction in ASKED:
        one = question_of(blended_bundle, source, relation, direction)
        for answer in (4, 33, *known_answers_of(blended_bundle.facts_of_train, source, relation, direction)[:1]):
            found = influence(blended_bundle, one, answer)
            before = evidence_part(blended_bundle.evidence, blended_bundle, one, answer)
            facts = zip(found.place.tolist(), found.neighbour.tolist(), strict=True)
            true = np.array([really_left_out(blended_bundle, one, answer, *fact) for fact in facts]) - before
            off.append(np.abs(found.evidence - true))
            size.append(np.abs(true))
            agree.append(true[np.argsort(found.evidence)[:5]].sum() - np.sort(true)[:5].sum())
    off, size = np.concatenate(off), np.concatenate(size)
    assert size.mean() > 0.1 and off.mean() < 0.02 * size.mean() and off.max() < 0.1
    assert max(agree) < 0.05  # the five facts that are chosen take as much from the answer as the five worst do


def test_the_models_influence_is_weighted_by_block(blended_bundle):
    """Each block of a model has its own loss; the blend weighs their distances."""
    one, answer = question_of(blended_bundle, 7, 1, 1), 12
    evidence, found = blended_bundle.evidence, influence(blended_bundle, one, answer)
    rows = torch.from_numpy(np.concatenate(blended_bundle.vector_parts)).double()
    parts, C = evidence.num_blocks, blended_bundle.phase_RC.shape[1]
    assert parts > 1
    weight_P = evidence.blend.weight_PF[3, :parts].tolist()

    def scores(z_D: torch.Tensor, place: int, other: int) -> torch.Tensor:
        phase_C = torch.from_numpy(np.array(blended_bundle.phase_RC)).double()[place // 2]
        turned = torch.complex(z_D[:C], z_D[C:]) * torch.exp(1j * phase_C * (1 - 2 * (place % 2)))
        off_C = (turned - torch.complex(rows[other][:C], rows[other][C:])).abs()
        return blended_bundle.gamma - off_C.reshape(parts, -1).sum(1)

    def blended(z_D: torch.Tensor) -> float:
        return float(sum(w * s for w, s in zip(weight_P, scores(z_D, 3, answer), strict=True)))

    true = []
    for where, other in zip(found.place.tolist(), found.neighbour.tolist(), strict=True):
        z_D = rows[7].clone().requires_grad_()
        [gradient_D] = torch.autograd.grad(-torch.nn.functional.logsigmoid(scores(z_D, where, other)).sum(), z_D)
        true.append((blended(rows[7] + 1e-5 * gradient_D) - blended(rows[7])) / 1e-5)
    assert found.model == pytest.approx(learning_rate(blended_bundle) * np.array(true), abs=1e-4)


def test_influence_points_at_the_rows_that_training_would_move(answered_run, bundle):
    """Of what unlearning the five worst facts on the source's row takes from the answer, the chosen five take most.

    A row reaches the vector through the projection and the fusion, here without a residual path, which `influence`
    leaves out.
    """
    rows = rows_of(answered_run)
    model, agree = rows.model, []
    raw, present = _inputs(rows)
    z_ED = model.encode(raw, present).z_VD.detach()
    phases = model.relations.phase_RC.detach()
    for source, relation, direction in ASKED:
        one, answer = question_of(bundle, source, relation, direction), 4
        found = influence(bundle, one, answer)

        def encoded(row_D: torch.Tensor, source: int = source) -> torch.Tensor:
            mine = {name: value[source : source + 1].clone() for name, value in raw.items()}
            mine["structure"] = row_D[None]
            return model.encode(mine, present[:, source : source + 1]).z_VD[0]

        def score(z_D: torch.Tensor, place: int, other: int) -> torch.Tensor:
            C = len(z_D) // 2
            turned = torch.complex(z_D[:C], z_D[C:]) * torch.exp(1j * phases[place // 2] * (1 - 2 * (place % 2)))
            return bundle.gamma - (turned - torch.complex(z_ED[other][:C], z_ED[other][C:])).abs().sum()

        row_D, target = raw["structure"][source], (2 * relation + direction, answer)
        before = float(score(encoded(row_D), *target))
        true = []
        for where, other in zip(found.place.tolist(), found.neighbour.tolist(), strict=True):
            moved_D = row_D.clone().requires_grad_()
            loss = -torch.nn.functional.logsigmoid(score(encoded(moved_D), where, other))
            [gradient_D] = torch.autograd.grad(loss, moved_D)
            true.append(float(score(encoded(row_D + 1e-2 * gradient_D), *target)) - before)
        chosen = np.argsort(found.effect)[:5]
        agree.append(np.array(true)[chosen].sum() / np.sort(true)[:5].sum())
    assert np.mean(agree) > 0.6, agree


def _inputs(rows) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Raw inputs of all entities, and who has which modality."""
    from mocme_dist.training.checkpoint import read_rows

    E, raw, present = rows.dataset.num_entities, {}, []
    for name in rows.modalities:
        if name == "structure":
            raw[name], there = read_rows(rows.saved, 0, E), torch.ones(E, dtype=torch.bool)
        else:
            raw[name], there = rows.store(name, 0, E).gather(torch.arange(E))
        raw[name] = raw[name].float()
        present.append(there)
    return raw, torch.stack(present)


def test_large_graphs_are_explained_by_a_sample(blended_bundle):
    one = question_of(blended_bundle, 5, 0, 0)
    whole = Reasons(blended_bundle, one)
    some = Reasons(blended_bundle, one, candidates=40, best=10)
    answer = int(best_answers(blended_bundle, one, [whole.left_out], 1).id_Qk[0, 0])
    exact, estimate = whole.explain(answer), some.explain(answer)
    assert not exact["rank_is_estimated"] and estimate["rank_is_estimated"]
    assert estimate["rank"] == exact["rank"] == 1
    assert estimate["votes"] == exact["votes"] and estimate["influence"] == exact["influence"]
    for name, rank in exact["rank_without"].items():
        assert rank is None or abs(estimate["rank_without"][name] - rank) < 20
    assert some.candidates.weight.sum() == pytest.approx(60)
    assert blended_bundle.label(answer) in some.short(answer) or "known answer" in some.short(answer)


def test_a_new_entity_is_explained_by_its_vector(blended_bundle):
    vector = blended_bundle.rows(blended_bundle.vector_parts, np.array([5]))[0]
    text = blended_bundle.rows(blended_bundle.evidence.units["text"], np.array([5]))[0]
    unseen = UnseenEntity("new", vector, {"text": text})
    found = blended_bundle.explain(unseen, "near", 9)
    assert found == explain(blended_bundle, -1, blended_bundle.find_relation("near"), 0, 9, unseen)
    by_text = [vote for vote in found["votes"] if vote["space"] == "text"]
    assert bool(by_text) and by_text[0]["neighbours"] > 0
    assert found["influence"] == [] and found["likeness"] == []
    assert all(math.isfinite(term["contribution"]) for term in found["terms"])
