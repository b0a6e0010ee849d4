"""Reasons for an answer.

The terms of its score, the facts that voted, what each modality is worth, and influential facts.

Everything is read from the bundle in numpy. The score is a sum, so its terms are exact. The rank without a modality is
a rank among at most `CANDIDATES` random entities and the best answers, scaled to the graph: exact up to that size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mocme_dist.evidence.facts import Facts
from mocme_dist.evidence.units import NOBODY, SCALE, cosine_of, from_keys
from mocme_dist.kernels.scan import distances
from mocme_dist.serving.counterfactual import CANDIDATES, fused_without, rotate
from mocme_dist.serving.evidence import FACTS, FREQUENCY, MODEL, RULES, Prepared, ServedEvidence, frequency_of
from mocme_dist.serving.influence import MOST_FACTS, Influence, influence
from mocme_dist.serving.reason_words import in_a_line, in_words, term_in_words
from mocme_dist.serving.scorer import Asked, best_answers, not_competing, place, rotated

if TYPE_CHECKING:
    from mocme_dist.serving.bundle import Bundle
    from mocme_dist.serving.predict import UnseenEntity

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
_BEST = 1000
_INFLUENTIAL = 5
_SHOWN = 5


class _Candidates(NamedTuple):
    """Entities whose scores are taken apart, and how many entities of the graph each of them stands for."""

    ids: Integers
    weight: NDArray[np.float64]


class Reasons:
    """Explains the answers of one question; what they share is computed once.

    Args:
        bundle: an opened bundle.
        asked: one question.
        candidates: entities whose scores are taken apart, where the graph has more.
        best: of these, the best answers.

    Attributes:
        names: the terms of the score.
        part_Tn: (T, n) contribution of each term to the score of each candidate.
    """

    def __init__(self, bundle: Bundle, asked: Asked, candidates: int = CANDIDATES, best: int = _BEST) -> None:
        self.bundle, self.asked, self.sample = bundle, asked, (candidates, best)
        self.source, self.relation = int(asked.source[0]), int(asked.relation[0])
        self.direction = int(asked.direction[0])
        self.place = 2 * self.relation + self.direction
        self.left_out = not_competing(bundle, asked)[0]
        self.candidates = self._candidates()
        self.prepared: Prepared | None = bundle.evidence.prepare(asked) if bundle.evidence is not None else None
        self.names, self.weight_T = self._terms()
        self.part_Tn = self._parts(self.candidates.ids)
        self.competes_n = ~np.isin(self.candidates.ids, self.left_out)
        if bundle.evidence is not None:  # an entity that nothing is known of ranks last
            known_n = bundle.rows(bundle.vector_parts, self.candidates.ids).any(1)
            self.competes_n &= known_n | bundle.evidence.facts.known.has_source(self.candidates.ids)

    def _candidates(self) -> _Candidates:
        E, (count, top) = self.bundle.num_entities, self.sample
        if count >= E:
            return _Candidates(np.arange(E), np.ones(E))
        best = np.zeros(0, np.int64)
        if top:
            best = best_answers(self.bundle, self.asked, [self.left_out], top).id_Qk[0]
            best = np.unique(best[best >= 0])
        others = np.setdiff1d(np.arange(count), best)
        ids = np.concatenate([best, others])
        share = (E - len(best)) / len(others)
        return _Candidates(ids, np.concatenate([np.ones(len(best)), np.full(len(others), share)]))

    def _terms(self) -> tuple[list[str], Floats]:
        """Names and weights of the terms that count for this question."""
        evidence = self.bundle.evidence
        if evidence is None:
            return [MODEL], np.ones(1, np.float32)
        weight_T = evidence.blend.weight_PF[self.place]
        kept = np.flatnonzero(weight_T > 0)
        return [evidence.blend.terms[at] for at in kept], weight_T[kept]

    def _parts(self, ids: Integers) -> Floats:
        """(T, n) contributions of the terms to the scores of some entities."""
        query_1D = rotated(self.bundle, self.asked)
        rows_nD = self.bundle.rows(self.bundle.vector_parts, ids)
        evidence, prepared = self.bundle.evidence, self.prepared
        if evidence is None or prepared is None:
            return self.bundle.gamma - distances(rows_nD, query_1D)
        out_Tn = np.empty((len(self.names), len(ids)), np.float32)
        blocks = [term for term in evidence.blend.terms if term.split(":")[0] == MODEL]
        silent = not query_1D.any() and len(set(self.names) - set(blocks)) > 0  # see `ServedEvidence.scores`
        for turn, (name, weight) in enumerate(zip(self.names, self.weight_T, strict=True)):
            if name in blocks:
                value_n = -_block_distance(evidence, rows_nD, query_1D, blocks.index(name)) * (not silent)
            else:
                value_n = _evidence_term(evidence, prepared, name, self.place, ids)
            out_Tn[turn] = weight * value_n
        return out_Tn

    def explain(self, answer: int) -> dict[str, Any]:
        """Return the reasons for one answer; see `explain`."""
        own_T1 = self._own(answer)
        reasons: dict[str, Any] = {"score": float(own_T1.sum()), "terms": self._as_terms(own_T1)}
        reasons["votes"] = self._votes(answer)
        reasons["likeness"] = self._likeness(answer)
        reasons["rank"] = self._rank(answer, own_T1)
        modalities = self.bundle.modalities if len(self.bundle.modalities) > 1 else []
        reasons["rank_without"] = {name: self._rank_without(name, answer, own_T1) for name in modalities}
        reasons["rank_is_estimated"] = self.bundle.num_entities > self.sample[0]
        reasons["influence"] = self._influence(answer)
        name, relation = self.bundle.label(answer), self.bundle.relation_label(self.relation)
        reasons["sentences"] = in_words(name, relation, self.direction, reasons)
        reasons["text"] = " ".join(reasons["sentences"])
        return reasons

    def short(self, answer: int) -> str:
        """Return the two strongest terms and the strongest votes in one line."""
        name, relation = self.bundle.label(answer), self.bundle.relation_label(self.relation)
        terms = self._as_terms(self._own(answer))
        return in_a_line(name, relation, self.direction, terms, self._votes(answer), self._likeness(answer))

    def _own(self, answer: int) -> Floats:
        """(T, 1) contributions to the score of an answer."""
        at = np.flatnonzero(self.candidates.ids == answer)
        return self.part_Tn[:, at[:1]] if len(at) else self._parts(np.array([answer]))

    def _as_terms(self, own_T1: Floats) -> list[dict[str, Any]]:
        mean_T = self.part_Tn[:, self.competes_n].mean(1) if self.competes_n.any() else np.zeros(len(self.names))
        return [
            {
                "name": name,
                "label": term_in_words(name),
                "value": float(own_T1[turn, 0] / self.weight_T[turn]),
                "weight": float(self.weight_T[turn]),
                "contribution": float(own_T1[turn, 0]),
                "advantage": float(own_T1[turn, 0] - mean_T[turn]),
            }
            for turn, name in enumerate(self.names)
        ]

    # -- ranks

    def _rank(self, answer: int, own_T1: Floats) -> float:
        if self.bundle.num_entities > self.sample[0]:
            return place(self.bundle, self.asked, answer, self.left_out)[1]
        return self._place_in(self.part_Tn.sum(0), float(own_T1.sum()), answer)

    def _place_in(self, score_n: Floats, own: float, answer: int) -> float:
        ids, weight_n = self.candidates
        competes_n = self.competes_n & (ids != answer) & np.isfinite(score_n)
        better = weight_n[competes_n & (score_n > own)].sum()
        equal = weight_n[competes_n & (score_n == own)].sum()
        return float(1 + better + equal / 2)

    def _rank_without(self, modality: str, answer: int, own_T1: Floats) -> float | None:
        """Rank of the answer if no entity had the modality; None if the answer then has no vector."""
        kept_T = np.array([modality not in _modalities_of(name) for name in self.names])
        score_n = self.part_Tn[kept_T].sum(0) if kept_T.any() else np.zeros(len(self.candidates.ids), np.float32)
        own = float(own_T1[kept_T].sum())
        fused = [turn for turn, name in enumerate(self.names) if name in (MODEL, f"{MODEL}:fused")]
        if fused and self.bundle.view_parts and self.source >= 0:
            ids = self.candidates.ids
            at = np.flatnonzero(ids == answer)
            model_n = self._model_without(modality, ids)
            model_1 = model_n[at] if len(at) else self._model_without(modality, np.array([answer]))
            score_n = score_n - self.part_Tn[fused[0]] + model_n * self.weight_T[fused[0]]
            own = own - float(own_T1[fused[0], 0]) + float(model_1[0]) * float(self.weight_T[fused[0]])
        if not np.isfinite(own):
            return None
        return self._place_in(score_n, own, answer)

    def _model_without(self, modality: str, ids: Integers) -> Floats:
        """(n,) the fused term of some entities with a modality taken from them and from the source.

        -inf without another one.
        """
        bundle, m = self.bundle, self.bundle.modalities.index(modality)
        rows_nd, there_n = fused_without(bundle, ids, m)
        source_1d, source_there = fused_without(bundle, self.asked.source, m)
        if not source_there[0]:
            return np.zeros(len(ids), np.float32)  # nothing of the source is left, so the model says nothing
        C = bundle.view_width // 2
        phase_RC = bundle.phase_RC[:, -C:]  # the fused block is the last one
        query_1d = rotate(source_1d, phase_RC[self.asked.relation], self.asked.direction)
        score_n = -distances(rows_nd, query_1d)[0] + (bundle.gamma if bundle.evidence is None else 0.0)
        return np.where(there_n, score_n, -np.inf).astype(np.float32)

    # -- votes and likeness

    def _votes(self, answer: int) -> list[dict[str, Any]]:
        """The nearest entities that have the relation, and those of them that have this answer."""
        if self.prepared is None or self.bundle.evidence is None:
            return []
        known = self.bundle.evidence.facts.known
        found = []
        for name in _spaces(self.names, "votes"):
            keys = self.prepared.nearest[name][0]
            closeness, ids = from_keys(keys[keys != NOBODY])
            offsets, targets = known.lookup(ids, np.full(len(ids), self.relation), np.full(len(ids), self.direction))
            agrees = np.array([answer in targets[offsets[at] : offsets[at + 1]] for at in range(len(ids))], bool)
            found.append(
                {
                    "space": name,
                    "neighbours": len(ids),
                    "agreeing": int(agrees.sum()),
                    "facts": self._shown(ids[agrees], cosine_of(closeness[agrees])),
                }
            )
        return found

    def _likeness(self, answer: int) -> list[dict[str, Any]]:
        """The known answers of the question that are most like this one, by space."""
        if self.prepared is None or self.bundle.evidence is None or self.source < 0:
            return []
        evidence = self.bundle.evidence
        known = known_answers_of(evidence.facts, self.source, self.relation, self.direction)
        known = known[known != answer][:MOST_FACTS]
        found = []
        for name in _spaces(self.names, "likeness"):
            if not len(known):
                continue
            if name == FACTS:
                found.append({"space": name, "answers": len(known), "facts": []})
                continue
            own_1F = self.bundle.rows(evidence.units[name], np.array([answer]))
            cosine = (self.bundle.rows(evidence.units[name], known) @ own_1F[0]) / SCALE**2
            order = np.argsort(-cosine, kind="stable")[:_SHOWN]
            order = order[cosine[order] > 0]
            found.append({"space": name, "answers": len(known), "facts": self._shown(known[order], cosine[order])})
        return found

    def _shown(self, ids: Integers, similarity: NDArray[Any]) -> list[dict[str, Any]]:
        names = self.bundle.entities.take(ids)
        return [
            {"id": name, "label": self.bundle.label(int(entity)), "similarity": round(float(value), 4)}
            for name, entity, value in zip(names, ids, similarity, strict=True)
        ]

    # -- influence

    def _influence(self, answer: int) -> list[dict[str, Any]]:
        """The training facts of the source whose removal would lower the score of the answer most."""
        if self.source < 0:
            return []
        facts = influence(self.bundle, self.asked, answer, self.prepared)
        effect_f = facts.effect
        order = np.argsort(effect_f, kind="stable")[:_INFLUENTIAL]
        return [self._fact(facts, at) for at in order if effect_f[at] < 0]

    def _fact(self, facts: Influence, at: int) -> dict[str, Any]:
        relation, direction = divmod(int(facts.place[at]), 2)
        ends = [self.source, int(facts.neighbour[at])]
        head, tail = ends[::-1] if direction else ends
        names = self.bundle.entities.take(np.array([head, tail]))
        labels = {
            "head": self.bundle.label(head),
            "relation": self.bundle.relation_label(relation),
            "tail": self.bundle.label(tail),
        }
        ids = {"head": names[0], "relation": self.bundle.relations.take(np.array([relation]))[0], "tail": names[1]}
        parts = {"model": float(facts.model[at]), "evidence": float(facts.evidence[at])}
        return {**ids, "labels": labels, "effect": float(facts.effect[at]), **parts}


def explain(
    bundle: Bundle, source: int, relation: int, direction: int, answer: int, unseen: UnseenEntity | None = None
) -> dict[str, Any]:
    """Return the reasons for one answer.

    Args:
        bundle: an opened bundle.
        source: row of the entity that is asked about; -1 for an unseen entity.
        relation, answer: rows.
        direction: 0 if the answer is a tail, 1 if it is a head.
        unseen: the unseen entity.

    Returns:
        score: of the answer, the sum of the contributions.
        terms: name, label, value, weight, contribution (value times weight) and advantage (this minus its mean over
            all candidates) of each term that has a weight for this relation and direction.
        votes: by space, how many of the nearest entities with the relation (`neighbours`) have this answer
            (`agreeing`), and those (`facts`: id, label, similarity).
        likeness: by space, the known answers of the question that are most like this one.
        rank, rank_without: rank of the answer, and its rank if no entity had one modality (None: the answer has no
            other).
        rank_is_estimated: whether `rank_without` is an estimate, because the graph is large.
        influence: up to five training facts of the source whose removal would lower the answer most: head, relation,
            tail, labels, and effect, the change of the score: the sum of model, after one step of unlearning at the
            training's learning rate, and evidence, the change of its terms.
        sentences, text: the reasons in words.
    """
    return Reasons(bundle, question_of(bundle, source, relation, direction, unseen)).explain(answer)


def question_of(
    bundle: Bundle, source: int, relation: int, direction: int, unseen: UnseenEntity | None = None
) -> Asked:
    """Return one question by rows; see `explain`."""
    rows = (np.array([value], np.int64) for value in (source, relation, direction))
    if unseen is None:
        return Asked.of(bundle, *rows)
    units = {name: unit_F[None] for name, unit_F in unseen.units.items()}
    return Asked(*rows, np.asarray(unseen.vector_D, np.float32)[None], units)  # type: ignore[arg-type, call-arg]


def known_answers_of(facts: Facts, source: int, relation: int, direction: int) -> Integers:
    """Answers of one question in a table of facts."""
    return facts.known.lookup([source], [relation], [direction])[1]


def _spaces(names: Sequence[str], kind: str) -> list[str]:
    return [name.split(":", 1)[1] for name in names if name.startswith(f"{kind}:")]


def _modalities_of(term: str) -> set[str]:
    """The modalities that a term needs; empty for what is made of all of them."""
    space = term.split(":", 1)[-1]
    if space == "coordinates":
        return {"numeric"}
    if space in (FACTS, RULES):
        return {"structure"}
    return set() if space in (MODEL, "fused", FREQUENCY) else {space}


def _block_distance(evidence: ServedEvidence, rows_nD: Floats, query_1D: Floats, block: int) -> Floats:
    return distances(evidence.block_of(rows_nD, block), evidence.block_of(query_1D, block))[0]


def _evidence_term(evidence: ServedEvidence, prepared: Prepared, term: str, at: int, ids: Integers) -> Floats:
    """(n,) one term of evidence for some entities."""
    if term in prepared.entries:
        entries = prepared.entries[term]
        return _looked_up(entries.row.astype(np.int64), entries.value, ids)
    if term == FREQUENCY:
        answers, counts = evidence.facts.answers(at)
        return _looked_up(answers, frequency_of(counts), ids)
    name = term.split(":", 1)[1]
    unit_nF = evidence.bundle.rows(evidence.units[name], ids)
    value_n = (unit_nF @ prepared.mean_QF[term][0]) * np.float32(1.0 / SCALE**2)
    return np.where(ids == prepared.asked.source_U[0], np.float32(0), value_n) if term.startswith("match:") else value_n


def _looked_up(ascending: Integers, value: NDArray[Any], ids: Integers) -> Floats:
    """(n,) values of ids in a sparse list; 0 where an id is not in it."""
    if not len(ascending):
        return np.zeros(len(ids), np.float32)
    at = np.minimum(np.searchsorted(ascending, ids), len(ascending) - 1)
    return np.where(ascending[at] == ids, value[at], 0).astype(np.float32)
