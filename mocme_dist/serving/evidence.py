"""Evidence of neighbours for questions to a bundle.

The terms of `evidence.terms` in numpy, and the scores of the blend.

Units are whole numbers and their products exact, so the terms equal those of evaluation; nothing here needs torch. An
unseen entity has neighbours by its fused vector and in the spaces that its features give.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mocme_dist.errors import CheckpointError, DataError
from mocme_dist.evidence.blend import FILE, load_blend
from mocme_dist.evidence.facts import Integers, ranges
from mocme_dist.evidence.rules import Rules, find_rules, rule_entries
from mocme_dist.evidence.shared_facts import SharedFacts
from mocme_dist.evidence.units import NOBODY, SCALE, to_keys, to_units
from mocme_dist.evidence.votes import LAST, Asked, Entries, largest, votes
from mocme_dist.kernels.scan import distances
from mocme_dist.serving.bundle_format import part_name

if TYPE_CHECKING:
    from mocme_dist.serving.mapped_bundle import MappedBundle
    from mocme_dist.serving.scorer import Asked as Questions

Floats = NDArray[np.float32]
KIND, MODEL, FACTS, FREQUENCY, RULES = "evidence", "model", "facts", "frequency", "rules"
_RARE = 0.02
# Candidates that are searched at once.
_ROWS = 1 << 15


class Prepared(NamedTuple):
    """Inputs of the terms of some questions.

    Weights of the vectors' blocks and of the terms, and as in `evidence.terms`.

    `nearest` has the keys (Q, count) of the neighbours that vote, by space. A term without a weight for any of the
    questions is left out.
    """

    asked: Asked
    order: Integers
    weight_QP: Floats
    weight_QF: Floats
    entries: dict[str, Entries]
    mean_QF: dict[str, Floats]
    nearest: dict[str, Integers]


class ServedEvidence:
    """The evidence and the blend of a bundle.

    Args:
        bundle: the bundle.
        about: the manifest's `evidence`: settings, and the width of each dense space.

    Raises:
        DataError: a file is missing, damaged, or does not fit the bundle.
    """

    def __init__(self, bundle: MappedBundle, about: dict[str, Any]) -> None:
        self.bundle, self.about = bundle, about
        try:
            self.blend = load_blend(bundle.directory / FILE)
        except CheckpointError as error:
            raise DataError(f"{error}; export again") from None
        self.num_blocks = sum(term.split(":")[0] == MODEL for term in self.blend.terms)
        self.terms = self.blend.terms[self.num_blocks :]
        widths: dict[str, int] = about["spaces"]
        kinds = ("votes", "likeness", "match")
        known = {FREQUENCY, RULES, *(f"{kind}:{name}" for kind in kinds for name in (*widths, FACTS))}
        places = 2 * bundle.num_relations
        if not set(self.terms) <= known or self.num_blocks < 1 or len(self.blend.weight_PF) != places:
            raise DataError(f"{bundle.directory / FILE}: does not fit the bundle; export again")
        self.units: dict[str, list[NDArray[Any]]] = {name: [] for name in widths}
        for part in range(bundle.partition.num_shards):
            first, last = bundle.partition.bounds(part)
            shapes = {name: (last - first, width) for name, width in widths.items()}
            for name, value in zip(shapes, bundle.map(part_name(KIND, part), shapes) if shapes else [], strict=True):
                self.units[name].append(value)
        self.facts = bundle.facts_of_train
        limits = (about["max_holders"], about["max_answers"])
        uses_facts = f"votes:{FACTS}" in self.terms
        self.shared = SharedFacts(self.facts, 0, bundle.num_entities, *limits) if uses_facts else None

    @cached_property
    def rules(self) -> Rules:
        """Rules of the training facts, found at the first question that needs them."""
        return find_rules(self.facts)

    def prepare(self, questions: Questions) -> Prepared:
        """Find the neighbours of some questions, their votes, and the means of known answers."""
        place = 2 * questions.relation + questions.direction
        order = np.argsort(place, kind="stable")
        asked = Asked(questions.source[order], place[order])
        weight_QF = self.blend.weight_PF[asked.place_U]
        prepared = Prepared(asked, order, weight_QF[:, : self.num_blocks], weight_QF[:, self.num_blocks :], {}, {}, {})
        used = {term for term, weight_Q in zip(self.terms, prepared.weight_QF.T, strict=True) if weight_Q.any()}
        E, count = self.bundle.num_entities, self.about["neighbours"]
        for term in used - {FREQUENCY}:
            kind, _, name = term.partition(":")
            if kind == RULES:
                prepared.entries[term] = rule_entries(self.rules, asked, self.facts, 0, E)
            elif kind == "votes":
                keys_Qk = self.nearest(name, questions, prepared, count)
                prepared.nearest[name] = keys_Qk
                prepared.entries[term] = votes(keys_Qk, self.about["betas"][name], asked, self.facts, 0, E)
            elif name == FACTS and self.shared is not None:
                prepared.entries[term] = self.shared.likeness(*asked)
            elif kind == "match":
                unit_QF = self._source_units(name, self.units[name], questions, order)
                has_facts = (asked.source_U >= 0) & self.facts.known.has_source(np.maximum(asked.source_U, 0))
                prepared.mean_QF[term] = np.where(has_facts[:, None], np.float32(0), unit_QF)
            else:
                prepared.mean_QF[term] = self._means(self.units[name], asked)
        return prepared

    def nearest(self, name: str, questions: Questions, prepared: Prepared, count: int) -> Integers:
        """Return (Q, count) keys of the entities nearest in a space that have a fact at the question's place."""
        if name == FACTS and self.shared is not None:
            return self.shared.nearest(*prepared.asked, count)
        unit_QF = self._source_units(name, self.units[name], questions, prepared.order)
        return self._nearest(self.units[name], unit_QF, prepared.asked, count)

    def _source_units(self, name: str, parts: list[NDArray[Any]], questions: Questions, order: Integers) -> Floats:
        source = questions.source[order]
        unit_QF = self.bundle.rows(parts, np.maximum(source, 0))
        new = source < 0
        unit_QF[new] = to_units(questions.vector_QD[order][new]) if name == MODEL else 0
        if name in questions.units:
            unit_QF[new] = questions.units[name][order][new]
        return unit_QF

    def _nearest(self, parts: list[NDArray[Any]], unit_QF: Floats, asked: Asked, count: int) -> Integers:
        """Return (Q, count) keys of neighbours, as `evidence.spaces.nearest_units` does."""
        keys_Qk = np.full((len(unit_QF), count), NOBODY)
        square_Q1 = np.square(unit_QF).sum(1, keepdims=True)
        for place in np.unique(asked.place_U):
            at_q = np.flatnonzero((asked.place_U == place) & (square_Q1[:, 0] > 0))
            sources = self.facts.sources(int(place)) if len(at_q) else np.zeros(0, np.int64)
            for start in range(0, len(sources), _ROWS):
                ids = sources[start : start + _ROWS]
                unit_xF = self.bundle.rows(parts, ids)
                square_x = np.square(unit_xF).sum(1)
                closeness = 2 * (unit_QF[at_q] @ unit_xF.T) - square_Q1[at_q] - square_x
                closeness[:, square_x == 0] = -np.inf
                closeness[asked.source_U[at_q][:, None] == ids] = -np.inf
                some = min(count, len(ids))
                least = np.partition(closeness, len(ids) - some, axis=1)[:, len(ids) - some, None]
                query, column = np.nonzero((closeness >= least) & np.isfinite(closeness))
                keys = to_keys(closeness[query, column].astype(np.int64), ids[column])
                both = np.concatenate([keys_Qk[at_q], largest(query, keys, len(at_q), count)], axis=1)
                keys_Qk[at_q] = np.sort(both, axis=1)[:, ::-1][:, :count]
        return keys_Qk

    def _means(self, parts: list[NDArray[Any]], asked: Asked) -> Floats:
        """Return (Q, F) units of the mean of each question's known answers, as `evidence.spaces.mean_units`."""
        start, length = self.facts.known.spans(asked.source_U, asked.place_U // 2, asked.place_U % 2)
        sums = np.zeros((len(length), parts[0].shape[1]))
        for query in np.flatnonzero(length):
            answers = self.facts.known.targets[start[query] : start[query] + length[query]]
            sums[query] = self.bundle.rows(parts, answers).sum(0, dtype=np.float64)
        size = np.sqrt(np.square(sums).sum(1, keepdims=True))
        return np.rint(sums * (SCALE / np.where(size > 0, size, 1.0))).astype(np.float32)

    def scores(self, prepared: Prepared, query_QD: Floats, part: int, start: int, stop: int) -> Floats:
        """Return (Q, n) blended scores of the rows [start, stop) of a part, in the order of the questions."""
        rows = self.bundle.vector_parts[part][start:stop]
        first = self.bundle.partition.bounds(part)[0] + start
        total_Qn = np.zeros((len(query_QD), len(rows)), np.float32)
        query_QD = query_QD[prepared.order]
        # The model says nothing of a source without a vector; see `evaluation.blended`.
        silent_Q = np.logical_not(query_QD.any(1)) & prepared.weight_QF.any(1)
        weight_QP = np.where(silent_Q[:, None], np.float32(0), prepared.weight_QP)
        for block in range(self.num_blocks):
            distance_Qn = distances(self.block_of(rows, block), self.block_of(query_QD, block))
            total_Qn += weight_QP[:, block, None] * distance_Qn
        bias_Qn = self._bias(prepared, part, start, first, len(rows))
        unknown_n: NDArray[np.bool_] = ~np.any(rows, axis=1)
        if unknown_n.any():  # the model knows nothing of these; only evidence can keep them from the last place
            known_n = self.facts.known.has_source(np.arange(first, first + len(rows)))
            for parts in self.units.values():
                known_n |= np.any(parts[part][start:stop], axis=1)
            bias_Qn[unknown_n & ~(known_n & prepared.weight_QF.any(1, keepdims=True))] = LAST
        out = np.empty_like(total_Qn)
        out[prepared.order] = bias_Qn - total_Qn
        return out

    def block_of(self, vectors: NDArray[Any], block: int) -> NDArray[Any]:
        """Return the columns of one block of vectors (n, D)."""
        if self.num_blocks == 1:
            return vectors
        real, imaginary = np.split(vectors, 2, axis=1)
        size = real.shape[1] // self.num_blocks
        at = slice(block * size, (block + 1) * size)
        return np.concatenate([real[:, at], imaginary[:, at]], axis=1)

    def _bias(self, prepared: Prepared, part: int, start: int, first: int, count: int) -> Floats:
        """Return the (Q, n) sums of weighted terms, in the order of `Evidence.bias`."""
        out = np.zeros((len(prepared.weight_QF), count), np.float32)
        # The sort is stable: likenesses in dense spaces come after the sparse terms.
        for turn, term in sorted(enumerate(self.terms), key=lambda one: one[1] in prepared.mean_QF):
            weight_Q = prepared.weight_QF[:, turn]
            if not weight_Q.any():
                continue
            if term in prepared.entries:
                _add_entries(out, prepared.entries[term], weight_Q, first)
            elif term == FREQUENCY:
                out += weight_Q[:, None] * self._frequency(prepared.asked.place_U, first, count)
            else:
                mean_QF = prepared.mean_QF[term]
                some = (weight_Q != 0) & mean_QF.any(1)
                unit_nF = self.units[term.split(":", 1)[1]][part][start : start + count].astype(np.float32)
                value_qn = (mean_QF[some] @ unit_nF.T) * np.float32(1.0 / SCALE**2)
                if term.startswith("match:"):  # as in evaluation, a source does not match itself
                    row_q = prepared.asked.source_U[some] - first
                    here = np.flatnonzero((prepared.asked.source_U[some] >= 0) & (row_q >= 0) & (row_q < count))
                    value_qn[here, row_q[here]] = 0
                out[some] += weight_Q[some, None] * value_qn
        return out

    def _frequency(self, place_Q: Integers, first: int, count: int) -> Floats:
        places, which = np.unique(place_Q, return_inverse=True)
        value = np.zeros((len(places), count), np.float32)
        for turn, place in enumerate(places):
            ids, counts = self.facts.answers(int(place))
            mine = (ids >= first) & (ids < first + count)
            value[turn, ids[mine] - first] = frequency_of(counts[mine])
        return np.asarray(value[which.reshape(-1)])


def frequency_of(counts: Integers) -> NDArray[np.float64]:
    """Return the frequency term of answers with these counts at a place; 0 for an answer that never occurs."""
    return np.asarray(np.log(counts + _RARE) - np.log(_RARE))


def _add_entries(out: Floats, entries: Entries, weight_Q: Floats, first: int) -> None:
    length = np.diff(entries.offsets)
    query = np.repeat(np.arange(len(out)), length)
    row = entries.row[ranges(entries.offsets[:-1], length)] - first
    here = (row >= 0) & (row < out.shape[1])
    out[query[here], row[here]] += weight_Q[query[here]] * entries.value[here]


def top_scores(score_Qn: Floats, first: int, score_Qk: Floats, id_Qk: Integers) -> None:
    """Merge the scores of more rows into the lists of the best ones, in place; ties are in order of ids."""
    k = score_Qk.shape[1]
    for q, score_n in enumerate(score_Qn):
        if len(score_n) > k:
            row = np.flatnonzero(score_n >= np.partition(score_n, len(score_n) - k)[len(score_n) - k])
        else:
            row = np.arange(len(score_n))
        row = row[score_n[row] > -np.inf]
        score = np.concatenate([score_Qk[q], score_n[row]])
        ids = np.concatenate([id_Qk[q], row + first])
        order = np.lexsort((ids, -score))[:k]
        score_Qk[q], id_Qk[q] = score[order], ids[order]


def leave_out(score_Qn: Floats, left_out: Sequence[Integers], first: int) -> None:
    """Set the scores of ids that do not compete to minus infinity, in place; ids ascend."""
    for score_n, ids in zip(score_Qn, left_out, strict=True):
        low, high = np.searchsorted(ids, [first, first + len(score_n)])
        score_n[ids[low:high] - first] = -np.inf


def keep_only(score_Qn: Floats, candidates: Sequence[Integers], first: int) -> None:
    """Set the scores of all ids but the candidates to minus infinity, in place; ids ascend."""
    for score_n, ids in zip(score_Qn, candidates, strict=True):
        low, high = np.searchsorted(ids, [first, first + len(score_n)])
        kept = ids[low:high] - first
        values = score_n[kept]
        score_n.fill(-np.inf)
        score_n[kept] = values
