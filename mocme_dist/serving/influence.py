"""What an answer's score would lose without a training fact of its source: the model's part and the evidence's.

The model's part is one step of unlearning. The evidence's part is the change of its terms if the source no longer had
the fact. What the whole graph counts stays as it is: how rare a fact is, how sure a rule is, and the likeness of other
entities to each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mocme_dist.evidence.rules import FLOOR as RULES_FLOOR
from mocme_dist.evidence.rules import look_up
from mocme_dist.evidence.shared_facts import SharedFacts
from mocme_dist.evidence.units import NOBODY, SCALE, closeness_of, from_keys, to_keys
from mocme_dist.evidence.votes import FLOOR, vote_weights
from mocme_dist.serving.counterfactual import rotate
from mocme_dist.serving.evidence import FACTS, FREQUENCY, RULES, Prepared, ServedEvidence, frequency_of
from mocme_dist.serving.scorer import Asked

if TYPE_CHECKING:
    from mocme_dist.serving.bundle import Bundle

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
# Facts of a source that are tried: a hub may have a million.
MOST_FACTS = 1024
_STEP = 0.05  # of bundles whose configuration leaves the learning rate of the entities to the optimizer


class Influence(NamedTuple):
    """Facts of a source, and the change of an answer's score without each of them; negative lowers it.

    Attributes:
        place, neighbour: the facts, as 2 * relation + direction and the other entity.
        model: change of the model's part after one step of unlearning at the training's learning rate.
        evidence: change of the evidence's terms.
    """

    place: Integers
    neighbour: Integers
    model: Floats
    evidence: Floats

    @property
    def effect(self) -> Floats:
        """(F,) changes of the score."""
        return self.model + self.evidence


def influence(bundle: Bundle, asked: Asked, answer: int, prepared: Prepared | None = None) -> Influence:
    """Return the effect that leaving out each training fact of the source has on the score of an answer.

    Args:
        bundle: an opened bundle.
        asked: one question about an entity of the bundle.
        answer: row.
        prepared: the evidence of the question; None prepares it.
    """
    _, place_f, neighbour_f = bundle.facts_of_train.facts_of(asked.source[:1])
    place_f, neighbour_f = place_f[:MOST_FACTS], neighbour_f[:MOST_FACTS]
    model_f = learning_rate(bundle) * unlearned(bundle, asked, answer, place_f, neighbour_f)
    evidence_f = np.zeros(len(place_f))
    if bundle.evidence is not None and len(place_f):
        prepared = bundle.evidence.prepare(asked) if prepared is None else prepared
        evidence_f = _Evidence(bundle.evidence, prepared, asked, answer, place_f, neighbour_f).change()
    return Influence(place_f, neighbour_f, model_f, evidence_f)


def learning_rate(bundle: Bundle) -> float:
    """Return the learning rate that the entities of a bundle were trained with."""
    return float(bundle.manifest["config"]["entities"].get("learning_rate") or _STEP)


# -- the model


def unlearned(bundle: Bundle, asked: Asked, answer: int, place_f: Integers, neighbour_f: Integers) -> Floats:
    """Return (F,) changes of the model's part of an answer's score per unit of step if a fact is unlearned.

    One step of unlearning fact f adds the gradient of its loss to the source's vector, so the score of the answer
    changes by the step times -(1 - sigmoid(s_f)) grad s_f . grad s_answer, with gradients by the source's vector.
    With a form of several blocks each block has its own loss and its own weight in the score.
    """
    vector_1D = bundle.rows(bundle.vector_parts, asked.source[:1])
    place = 2 * int(asked.relation[0]) + int(asked.direction[0])
    rows_nD = bundle.rows(bundle.vector_parts, np.append(neighbour_f, answer))
    place_n = np.append(place_f, place)
    evidence = bundle.evidence
    num_blocks = evidence.num_blocks if evidence is not None else 1
    weight_P = evidence.blend.weight_PF[place, :num_blocks] if evidence is not None else np.ones(1)
    change_f = np.zeros(len(place_f))
    width = bundle.phase_RC.shape[1] // num_blocks
    for block, weight in enumerate(weight_P.tolist()):
        if weight == 0:
            continue
        source_1d, rows_nd = (
            (evidence.block_of(vectors, block) if evidence is not None else vectors) for vectors in (vector_1D, rows_nD)
        )
        phase_nC = bundle.phase_RC[place_n // 2, block * width : (block + 1) * width]
        score_n, gradient_nd = _gradients(bundle.gamma, source_1d, phase_nC, place_n % 2, rows_nd)
        doubt_f = np.exp(-np.logaddexp(0, score_n[:-1]))
        change_f -= weight * doubt_f * (gradient_nd[:-1] @ gradient_nd[-1])
    return change_f


def _gradients(
    gamma: float, source_1D: NDArray[Any], phase_nC: NDArray[Any], direction_n: Integers, rows_nD: NDArray[Any]
) -> tuple[Floats, Floats]:
    """(n,) scores of facts of one source, and (n, D) their gradients by the source's vector."""
    difference_nD = rotate(np.broadcast_to(source_1D, rows_nD.shape), phase_nC, direction_n) - rows_nD
    real, imaginary = np.split(difference_nD, 2, axis=1)
    modulus_nC = np.sqrt(real**2 + imaginary**2)
    length_nC = np.maximum(modulus_nC, 1e-12)
    unit_nD = np.concatenate([real / length_nC, imaginary / length_nC], axis=1)
    # The transpose of a rotation turns back.
    gradient_nD = -rotate(unit_nD, phase_nC, 1 - direction_n)
    return np.asarray(gamma - modulus_nC.sum(1), np.float64), np.asarray(gradient_nD, np.float64)


# -- the evidence


class _Evidence:
    """The terms of one answer without each of some facts of the source."""

    def __init__(
        self,
        evidence: ServedEvidence,
        prepared: Prepared,
        asked: Asked,
        answer: int,
        place_f: Integers,
        neighbour_f: Integers,
    ) -> None:
        self.evidence, self.prepared, self.answer, self.questions = evidence, prepared, answer, asked
        self.place_f, self.neighbour_f, self.facts = place_f, neighbour_f, evidence.facts
        self.source, self.relation, self.direction = (int(column[0]) for column in asked[:3])
        self.place = 2 * self.relation + self.direction
        # A fact that the question itself asks for, from either end.
        self.own_f = place_f == self.place
        self.back_f = place_f == self.place ^ 1

    def change(self) -> Floats:
        """(F,) changes of the sum of the weighted terms."""
        total_f = np.zeros(len(self.place_f))
        for term, weight in zip(self.evidence.terms, self.prepared.weight_QF[0].tolist(), strict=True):
            if weight == 0:
                continue
            kind, _, space = term.partition(":")
            if kind == FREQUENCY:
                change_f = self._frequency()
            elif kind == RULES:
                change_f = self._rules()
            elif kind == "votes":
                change_f = self._votes(space)
            elif kind == "match":
                change_f = self._match(space)
            else:
                change_f = self._likeness_of_facts() if space == FACTS else self._likeness(space)
            total_f += weight * change_f
        return total_f

    def _frequency(self) -> Floats:
        answers, counts = self.facts.answers(self.place)
        count = counts[answers == self.answer]
        counted_f = (self.own_f & (self.neighbour_f == self.answer)) | (self.back_f & (self.answer == self.source))
        if not len(count) or not counted_f.any():
            return np.zeros(len(self.place_f))
        before, after = frequency_of(count), frequency_of(count - 1)
        return np.where(counted_f, after[0] - before[0], 0.0)

    def _rules(self) -> Floats:
        """The term has the best rule that leads from a fact of the source to the answer; without the fact, the next."""
        rules, places = self.evidence.rules, 2 * self.facts.num_relations
        score_f = look_up(rules.code, rules.cautious, self.place_f * places + self.place)
        score_f = np.where(self.neighbour_f == self.answer, score_f, 0.0)
        best = int(np.argmax(score_f))
        rest_f = np.full(len(score_f), score_f[best])
        rest_f[best] = np.delete(score_f, best).max(initial=0.0)
        return np.log(np.where(rest_f > 0, rest_f, 0) + RULES_FLOOR) - np.log(score_f[best] + RULES_FLOOR)

    # -- votes

    def _votes(self, space: str) -> Floats:
        """A fact of the source counts among the facts of the other entity, and in the likeness by shared facts."""
        evidence, beta = self.evidence, self.evidence.about["betas"][space]
        if space == FACTS and evidence.shared is not None:
            return self._votes_of_facts(evidence.shared, beta)
        keys_k = self.prepared.nearest[space][0]
        change_f = np.zeros(len(self.place_f))
        moved = np.flatnonzero(self.back_f & np.isin(self.neighbour_f, from_keys(keys_k[keys_k != NOBODY])[1]))
        if len(moved):  # one more neighbour, which comes up if one no longer has the relation
            [keys_k] = evidence.nearest(space, self.questions, self.prepared, len(keys_k) + 1)
        before = self._vote(keys_k, beta, len(keys_k) - 1) if len(moved) else 0.0
        for f in moved:
            change_f[f] = self._vote(keys_k, beta, len(keys_k) - 1, int(self.neighbour_f[f])) - before
        return change_f

    def _vote(self, keys_k: Integers, beta: float, count: int, without: int = -1) -> float:
        """The term of votes of the nearest `count` entities; `without` lacks the fact that leads to the source."""
        keys_k = keys_k[keys_k != NOBODY]
        _, ids = from_keys(keys_k)
        targets = self._targets(ids)
        left = [
            own[own != self.source] if one == without else own for one, own in zip(ids.tolist(), targets, strict=True)
        ]
        kept = np.array([len(own) > 0 for own in left], bool)
        if not kept.any():
            return 0.0
        agrees = np.array([self.answer in own for own in left], bool)[kept][:count]
        weight_k = vote_weights(keys_k[kept][None, :count], beta)[0]
        return float(np.log(weight_k[agrees].sum() + FLOOR) - np.log(FLOOR))

    def _targets(self, ids: Integers) -> list[Integers]:
        """The answers that some entities have at the question's place."""
        columns = (ids, np.full(len(ids), self.relation), np.full(len(ids), self.direction))
        offsets, targets = self.facts.known.lookup(*columns)
        return np.split(targets, offsets[1:-1]) if len(ids) else []

    def _votes_of_facts(self, shared: SharedFacts, beta: float) -> Floats:
        """Likenesses without a fact: less in common with the entities that have it, and a shorter vector
        of the source.
        """
        columns = shared.columns(np.array([self.source]))
        idf2_c, length2 = np.square(columns.idf), float(np.square(columns.idf).sum())
        here = self.facts.sources(self.place)
        here = here[here != self.source]
        common_n = np.zeros(len(here))
        holders = []
        for start, count, idf2 in zip(columns.start, columns.holders, idf2_c, strict=True):
            at = _positions(here, self.facts.known.targets[start : start + count])
            holders.append(at)
            common_n[at] += idf2
        length_n = shared.length_r[here]
        count = len(self.prepared.nearest[FACTS][0])
        scale_n = np.where(length_n > 0, 1 / np.where(length_n > 0, length_n, 1), 0)
        top = np.argsort(-common_n * scale_n, kind="stable")
        column_of = {
            pair: at for at, pair in enumerate(zip(columns.place.tolist(), columns.neighbour.tolist(), strict=True))
        }

        def term(f: int | None) -> float:
            """The term of votes without fact f; with all facts if it is None."""
            column = None if f is None else column_of.get((int(self.place_f[f]), int(self.neighbour_f[f])))
            changed = holders[column] if column is not None else np.zeros(0, np.int64)
            some = np.union1d(top[: count + len(changed) + 1], changed)
            common = common_n[some] - (idf2_c[column] * np.isin(some, changed) if column is not None else 0.0)
            own = length2 - (idf2_c[column] if column is not None else 0.0)
            cosine = np.minimum(common * scale_n[some] / np.sqrt(max(own, 1e-12)), 1.0)
            kept = cosine > 1e-9
            keys = np.sort(to_keys(closeness_of(cosine[kept]), here[some[kept]]))[::-1][: count + 1]
            without = int(self.neighbour_f[f]) if f is not None and self.back_f[f] else -1
            return self._vote(keys, beta, count, without)

        before = term(None)
        return np.array([term(f) - before for f in range(len(self.place_f))])

    def _match(self, space: str) -> Floats:
        """A source without a fact is matched by its own features, and loses its only fact here."""
        if len(self.place_f) > 1 or self.source == self.answer:
            return np.zeros(len(self.place_f))
        bundle, parts = self.evidence.bundle, self.evidence.units[space]
        source_F, answer_F = bundle.rows(parts, np.array([self.source, self.answer])).astype(np.float64)
        return np.array([source_F @ answer_F / SCALE**2])

    # -- likeness to known answers

    def _likeness(self, space: str) -> Floats:
        """A known answer less in the mean."""
        change_f, mine = np.zeros(len(self.place_f)), np.flatnonzero(self.own_f)
        if not len(mine):
            return change_f
        bundle, parts = self.evidence.bundle, self.evidence.units[space]
        known = self._targets(np.array([self.source]))[0]
        sum_F = bundle.rows(parts, known).sum(0, dtype=np.float64)
        own_F = bundle.rows(parts, np.array([self.answer]))[0].astype(np.float64)

        def cosines(sum_nF: Floats) -> Floats:
            size_n1 = np.sqrt(np.square(sum_nF).sum(1, keepdims=True))
            return np.rint(sum_nF * (SCALE / np.where(size_n1 > 0, size_n1, 1.0))) @ own_F / SCALE**2

        change_f[mine] = cosines(sum_F - bundle.rows(parts, self.neighbour_f[mine])) - cosines(sum_F[None])
        return change_f

    def _likeness_of_facts(self) -> Floats:
        """The same with the sparse vectors of shared facts, without the column that makes the answers answers."""
        change_f, mine, shared = np.zeros(len(self.place_f)), np.flatnonzero(self.own_f), self.evidence.shared
        if not len(mine) or shared is None:
            return change_f
        known = self._targets(np.array([self.source]))[0][: shared.max_answers + 1]
        columns = shared.columns(np.append(known, self.answer))
        length = np.sqrt(np.bincount(columns.row, np.square(columns.idf), minlength=len(known) + 1))
        weight = columns.idf / np.where(length > 0, length, 1.0)[columns.row]
        asked = (columns.place == self.place ^ 1) & (columns.neighbour == self.source) & (columns.row < len(known))
        code = columns.place * self.facts.num_entities + columns.neighbour
        _, column = np.unique(code, return_inverse=True)
        width = int(column.max(initial=-1)) + 1
        of_answer = columns.row == len(known)
        own_c = np.bincount(column[of_answer], weight[of_answer], minlength=width)
        kept = ~of_answer & ~asked
        row, column, weight = columns.row[kept], column[kept], weight[kept]

        def cosine(left_out: int) -> float:
            here = (row != left_out) & (row < (shared.max_answers + (left_out >= 0) * (left_out < shared.max_answers)))
            sum_c = np.bincount(column[here], weight[here], minlength=width)
            size = np.sqrt(np.square(sum_c).sum())
            return float(sum_c @ own_c / size) if size > 0 else 0.0

        before = cosine(-1)
        for f in mine:
            change_f[f] = cosine(int(np.searchsorted(known, self.neighbour_f[f]))) - before
        return change_f


def _positions(ascending: Integers, wanted: Integers) -> Integers:
    """Where some ids are in an ascending list; those that are not in it are left out."""
    at = np.minimum(np.searchsorted(ascending, wanted), max(0, len(ascending) - 1))
    return at[ascending[at] == wanted] if len(ascending) else at[:0]
