"""The terms of the blend besides the model's: evidence of neighbours, known answers and other facts.

    votes:SPACE     log(A + 1e-3) - log(1e-3), where A(c) is the sum, over the nearest entities x != s that have the
                    relation, of softmax(beta cosine(s, x)) [(x, r, c) in train], times the cosine of the nearest
    likeness:SPACE  cosine of c to the mean of the known answers of (s, r)
    match:SPACE     cosine of c to s by features, if s has no fact in train and c is not s; a song's name may have
                    its singer's
    rules           log(confidence + 0.01) - log(0.01) of the best rule that leads from a fact of the source to c
    frequency       log(n + 0.02) - log(0.02), where n is the number of training facts that c answers at this place

A term is 0 for candidates without such evidence. The sum of a candidate's terms is taken in the order of the table,
first of the sparse ones, then of the likenesses in dense spaces. Terms depend on train, the features and, in the space
of the model's vectors, on the checkpoint. `prepare` is collective and finds neighbours and means for a pass of queries;
`add` then computes the terms of this rank's entities locally. The terms of an entity have the same bits at every world
size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mocme_dist.evidence.facts import Facts, Integers, ranges
from mocme_dist.evidence.rules import find_rules, rule_entries
from mocme_dist.evidence.shared_facts import SharedFacts
from mocme_dist.evidence.spaces import Space, mean_units, merge, nearest_units
from mocme_dist.evidence.units import SCALE
from mocme_dist.evidence.votes import Asked, Entries, spread, votes
from mocme_dist.kernels.evidence import EvidenceKernels, SparseTerm
from mocme_dist.parallel.comm import Comm

FREQUENCY = "frequency"
RULES = "rules"
FACTS, MODEL = "facts", "model"
_RARE = 0.02
# Units that are added up at once: 64 MB of float64.
_NUMBERS = 1 << 23
# Pairs whose sums are taken at once without kernels.
_PAIRS = 256


def term_names(spaces: Sequence[str]) -> tuple[str, ...]:
    """Names of the terms of some spaces, in the order of a table of weights; rules and frequency are the last."""
    by_features = [name for name in spaces if name not in (FACTS, MODEL)]
    kinds = (("votes", spaces), ("likeness", spaces), ("match", by_features))
    return (*(f"{kind}:{name}" for kind, names in kinds for name in names), RULES, FREQUENCY)


def _is_dense(term: str) -> bool:
    return term.startswith(("likeness:", "match:")) and term != f"likeness:{FACTS}"


def frequencies(counts: Integers) -> NDArray[np.float32]:
    """The term of entities that answer a place so many times."""
    return np.asarray(np.log(counts + _RARE) - np.log(_RARE), np.float32)


class Prepared(NamedTuple):
    """Inputs of the terms of a pass of distinct queries, on one rank.

    Attributes:
        asked: the queries.
        entries: of each sparse term, by name.
        mean_UF: of each dense term, by name, (U, F) float32 units on the device that candidates are compared with.
    """

    asked: Asked
    entries: dict[str, Entries]
    mean_UF: dict[str, Tensor]


class Evidence:
    """Terms of a rank's entities [first, first + rows).

    Args:
        facts: of train.
        spaces: dense spaces, the same on every rank in the same order.
        shared: the space of shared facts, or None without it.
        neighbours: nearest entities that vote.
        facts_beta: of shared facts.
        kernels: of evidence.cpp, or None for numpy and torch; on a CPU only.
    """

    def __init__(
        self,
        facts: Facts,
        spaces: Sequence[Space],
        shared: SharedFacts | None,
        first: int,
        num_rows: int,
        neighbours: int,
        facts_beta: float,
        comm: Comm,
        kernels: EvidenceKernels | None = None,
    ) -> None:
        self.kernels = kernels
        self.facts, self.spaces, self.shared, self.comm = facts, tuple(spaces), shared, comm
        self.first, self.num_rows, self.neighbours, self.facts_beta = first, num_rows, neighbours, facts_beta
        names = [space.name for space in spaces] + ([FACTS] if shared is not None else [])
        self.terms = term_names(names)
        # Positions of the dense terms, whose products with all candidates come after the sparse ones.
        self._dense = [turn for turn, term in enumerate(self.terms) if _is_dense(term)]
        self._sparse = [turn for turn, term in enumerate(self.terms) if not _is_dense(term)]
        self.rules = find_rules(facts)
        ids = np.arange(first, first + num_rows)
        self.known_r = torch.from_numpy(
            np.any([facts.known.has_source(ids), *(s.present_r for s in spaces)], axis=0)
        ).to(comm.device)
        self._kept: tuple[Integers | None, dict[str, Tensor]] = (None, {})

    def prepare(self, asked: Asked, needed_PT: NDArray[np.bool_] | None = None) -> Prepared:
        """Find neighbours, their votes and the means of known answers; collective.

        Args:
            needed_PT: (places, terms) which terms are wanted at which places; None wants all. Others are 0.
        """
        prepared, num_queries = Prepared(asked, {}, {}), len(asked.source_U)
        answers_U = self.facts.known.spans(asked.source_U, asked.place_U // 2, asked.place_U % 2)[1]
        sayable = {"likeness": answers_U > 0, "match": ~self.facts.known.has_source(asked.source_U)}
        for turn, term in enumerate(self.terms[:-1]):
            kind, _, name = term.partition(":")
            needed_U = np.ones(num_queries, bool) if needed_PT is None else needed_PT[asked.place_U, turn]
            at_u = np.flatnonzero(needed_U & sayable.get(kind, True))
            some = Asked(asked.source_U[at_u], asked.place_U[at_u])
            if kind == "votes":
                prepared.entries[term] = spread(self._votes(name, some), at_u, num_queries)
            elif kind == RULES:
                found = rule_entries(self.rules, some, self.facts, self.first, self.first + self.num_rows)
                prepared.entries[term] = spread(found, at_u, num_queries)
            elif name == FACTS and self.shared is not None:
                prepared.entries[term] = spread(self.shared.likeness(*some), at_u, num_queries)
            else:
                space = self._space(name)
                mean_UF = torch.zeros(num_queries, space.width, device=self.comm.device)
                if kind == "match":
                    mean_uF = self.comm.sum(self._own_units(space, some.source_U))
                else:
                    mean_uF = mean_units(self.comm.sum(self._answer_sums(space, some)))
                mean_UF[torch.from_numpy(at_u).to(mean_UF.device)] = mean_uF
                prepared.mean_UF[term] = mean_UF
        return prepared

    def _votes(self, name: str, asked: Asked) -> Entries:
        """Votes in one space for this rank's entities; collective."""
        place = (asked, self.facts, self.first, self.first + self.num_rows)
        if name == FACTS and self.shared is not None:
            keys_Uk = merge(self.shared.nearest(*asked, self.neighbours), self.comm)
            return votes(keys_Uk, self.facts_beta, *place, self.kernels)
        space = self._space(name)
        unit_UF = self.comm.sum(self._own_units(space, asked.source_U))
        keys_Uk = nearest_units(space, unit_UF, asked, self.facts, self.first, self.neighbours, self.kernels)
        return votes(merge(keys_Uk, self.comm), space.beta, *place, self.kernels)

    def _space(self, name: str) -> Space:
        return next(space for space in self.spaces if space.name == name)

    def _own_units(self, space: Space, ids_U: Integers) -> Tensor:
        """(U, F) float32 units of this rank's entities among `ids_U`, zeros for the others."""
        out_UF = torch.zeros(len(ids_U), space.width, device=self.comm.device)
        local_U = ids_U - self.first
        mine_U = np.flatnonzero((local_U >= 0) & (local_U < self.num_rows))
        rows = torch.from_numpy(local_U[mine_U]).to(out_UF.device)
        out_UF[torch.from_numpy(mine_U).to(out_UF.device)] = space.rows(rows)
        return out_UF

    def _answer_sums(self, space: Space, asked: Asked) -> Tensor:
        """(U, F) float64 sums of the units of this rank's entities among the known answers of each query.

        Exact, in any order.
        """
        start, length = self.facts.known.spans(asked.source_U, asked.place_U // 2, asked.place_U % 2)
        sum_UF = torch.zeros(len(length), space.width, dtype=torch.float64, device=self.comm.device)
        step = max(1, _NUMBERS // space.width)
        ends = np.cumsum(length)
        for low in range(0, int(ends[-1]) if len(ends) else 0, step):
            at = np.arange(low, min(low + step, int(ends[-1])))
            query = np.searchsorted(ends, at, side="right")
            local = self.facts.known.targets[start[query] + at - (ends[query] - length[query])] - self.first
            mine = (local >= 0) & (local < self.num_rows)
            rows, query_at = (torch.from_numpy(part[mine]).to(sum_UF.device) for part in (local, query))
            sum_UF.index_add_(0, query_at, space.rows(rows).double())
        return sum_UF

    def add(
        self, out_Qn: Tensor, term: str, weight_Q: Tensor, prepared: Prepared, index_Q: Integers, rows_n: Integers
    ) -> None:
        """Add a term times each query's weight to the sums of some of this rank's entities.

        Args:
            out_Qn: (Q, n) float32 on the device.
            weight_Q: (Q,) float32 there.
            index_Q: which query of `prepared` each is.
            rows_n: local rows, distinct.
        """
        if term in prepared.entries:
            self._add_entries(out_Qn, prepared.entries[term], weight_Q, index_Q, rows_n)
        elif term == FREQUENCY:
            self._add_frequency(out_Qn, weight_Q, prepared.asked.place_U[index_Q], rows_n)
        else:
            self._add_products(out_Qn, term, weight_Q, prepared, index_Q, rows_n)

    def _add_products(
        self, out_Qn: Tensor, term: str, weight_Q: Tensor, prepared: Prepared, index_Q: Integers, rows_n: Integers
    ) -> None:
        """Add a dense term."""
        space = self._space(term.split(":", 1)[1])
        mean_QF = prepared.mean_UF[term][torch.from_numpy(index_Q).to(out_Qn.device)]
        some_q = torch.nonzero((weight_Q != 0) & mean_QF.any(1))[:, 0]  # most have no known answer
        if not len(some_q):
            return
        # Whole numbers times one factor per query: rounded once, so equal wherever a pair is computed.
        part_qn = mean_QF[some_q] @ self._units(space, rows_n).T
        if term.startswith("match:"):
            self._leave_out_sources(part_qn, prepared.asked.source_U[index_Q[some_q.cpu().numpy()]], rows_n)
        factor_q = weight_Q[some_q] * (1.0 / SCALE**2)
        if self.kernels is not None:
            self.kernels.add_products(part_qn, factor_q, some_q, out_Qn)
        else:
            part_qn *= factor_q[:, None]
            out_Qn.index_add_(0, some_q, part_qn)

    def _leave_out_sources(self, part_qn: Tensor, source_q: Integers, rows_n: Integers) -> None:
        """Set the values of sources as their own candidates to 0: that one is like itself says nothing."""
        local_q = source_q - self.first
        mine = np.flatnonzero((local_q >= 0) & (local_q < self.num_rows))
        here, column = self._columns(rows_n, local_q[mine])
        at_query, at_column = (torch.from_numpy(part[here]).to(part_qn.device) for part in (mine, column))
        part_qn[at_query, at_column] = 0

    def _units(self, space: Space, rows_n: Integers) -> Tensor:
        """(n, F) float32 units.

        Those of the last rows are kept, because many blocks of queries pass over the same ones.
        """
        if self._kept[0] is not rows_n:
            self._kept = (rows_n, {})
        if space.name not in self._kept[1]:
            self._kept[1][space.name] = space.rows(torch.from_numpy(rows_n).to(space.unit_rF.device))
        return self._kept[1][space.name]

    def _add_entries(
        self, out_Qn: Tensor, entries: Entries, weight_Q: Tensor, index_Q: Integers, rows_n: Integers
    ) -> None:
        some_q = np.flatnonzero(weight_Q.cpu().numpy())
        start, length = entries.offsets[index_Q[some_q]], np.diff(entries.offsets)[index_Q[some_q]]
        at, query = ranges(start, length), np.repeat(some_q, length)
        here, column = self._columns(rows_n, entries.row[at])
        if not here.all():
            at, query, column = at[here], query[here], column[here]
        flat, value = torch.from_numpy(query * len(rows_n) + column), torch.from_numpy(entries.value[at])
        added = weight_Q[torch.from_numpy(query).to(out_Qn.device)] * value.to(out_Qn.device)
        # Each pair occurs once, so no sum depends on an order of threads.
        out_Qn.view(-1).index_add_(0, flat.to(out_Qn.device), added)

    def _columns(self, rows_n: Integers, row: NDArray[Any]) -> tuple[NDArray[np.bool_], Integers]:
        """Which of some local rows are among `rows_n`, and their positions there."""
        if len(rows_n) and rows_n[-1] - rows_n[0] == len(rows_n) - 1:  # a range, as blocks of candidates are
            column = row.astype(np.int64) - rows_n[0]
            return (column >= 0) & (column < len(rows_n)), column
        column_r = np.full(self.num_rows, -1, np.int64)
        column_r[rows_n] = np.arange(len(rows_n))
        column = column_r[row]
        return column >= 0, column

    def _add_frequency(self, out_Qn: Tensor, weight_Q: Tensor, place_Q: Integers, rows_n: Integers) -> None:
        """Add the term where it is not 0: at the entities that answer each query's place."""
        device = out_Qn.device
        for place in np.unique(place_Q[weight_Q.cpu().numpy() != 0]).tolist():
            ids, counts = self.facts.answers(place)
            mine = (ids >= self.first) & (ids < self.first + self.num_rows)
            here, column = self._columns(rows_n, ids[mine] - self.first)
            value = frequencies(counts[mine][here])
            at = np.flatnonzero(place_Q == place)
            some_q = torch.from_numpy(at).to(device)
            added_qn = weight_Q[some_q][:, None] * torch.from_numpy(value).to(device)
            columns = torch.from_numpy(column[here]).to(device)
            if at[-1] - at[0] == len(at) - 1:
                out_Qn[at[0] : at[-1] + 1].index_add_(1, columns, added_qn)
            else:
                out_Qn[some_q[:, None], columns] += added_qn

    def bias(self, weight_QF: Tensor, prepared: Prepared, index_Q: Integers, rows_n: Integers) -> Tensor:
        """(Q, n) float32 sums of all terms times their weights, term by term in one order.

        Args: see `add`; with kernels, rows_n is a range.
        """
        shape = (len(index_Q), len(rows_n))
        used = torch.as_tensor(weight_QF.any(0)).tolist()
        if self.kernels is not None and len(rows_n):
            out_Qn = torch.empty(shape)
            terms, weight_QT = self._sparse_terms(weight_QF, prepared, index_Q)
            self.kernels.sparse_bias(terms, weight_QT, out_Qn, int(rows_n[0]))
        else:
            out_Qn = torch.zeros(shape, device=weight_QF.device)
            for turn in self._sparse:
                if used[turn]:
                    self.add(out_Qn, self.terms[turn], weight_QF[:, turn], prepared, index_Q, rows_n)
        for turn in self._dense:
            if used[turn]:
                self.add(out_Qn, self.terms[turn], weight_QF[:, turn], prepared, index_Q, rows_n)
        return out_Qn

    def _sparse_terms(
        self, weight_QF: Tensor, prepared: Prepared, index_Q: Integers
    ) -> tuple[list[SparseTerm], Tensor]:
        """The sparse terms as kernels take them, and the weights of each query."""
        index_Q = np.ascontiguousarray(index_Q)
        at_place_Q = prepared.asked.place_U[index_Q] ^ 1  # answers at a place are the sources of its inverse
        terms = []
        for turn in self._sparse:
            entries = self._answers if self.terms[turn] == FREQUENCY else prepared.entries[self.terms[turn]]
            terms.append(SparseTerm(*entries, at_place_Q if self.terms[turn] == FREQUENCY else index_Q))
        return terms, weight_QF[:, self._sparse].contiguous()

    @cached_property
    def _answers(self) -> Entries:
        """The frequency of this rank's entities among the sources of each place."""
        starts, source, count = self.facts.by_place()
        row = source - self.first
        mine = (row >= 0) & (row < self.num_rows)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(mine)])[starts]
        return Entries(offsets, row[mine].astype(np.int32), frequencies(count[mine]))

    def own_bias(self, weight_PF: Tensor, prepared: Prepared, index_P: Integers, row_P: Integers) -> Tensor:
        """(P,) the sums that `bias` has, for one of this rank's entities per query.

        Args:
            weight_PF, index_P: as of `bias`.
            row_P: local rows.
        """
        out_P = torch.zeros(len(row_P), device=weight_PF.device)
        if self.kernels is None:
            for start in range(0, len(row_P), _PAIRS):
                part = slice(start, start + _PAIRS)
                rows_n, column = np.unique(row_P[part], return_inverse=True)
                bias_pn = self.bias(weight_PF[part], prepared, index_P[part], rows_n)
                column_p = torch.from_numpy(column.reshape(-1)).to(out_P.device)
                out_P[part] = bias_pn.gather(1, column_p[:, None])[:, 0]
            return out_P
        terms, weight_PT = self._sparse_terms(weight_PF, prepared, index_P)
        self.kernels.sparse_pairs(terms, weight_PT, row_P.astype(np.int32), out_P)
        for turn in self._dense:
            space, mean_UF = self._space(self.terms[turn].split(":", 1)[1]), prepared.mean_UF[self.terms[turn]]
            for at_p in torch.nonzero(weight_PF[:, turn])[:, 0].split(max(1, _NUMBERS // space.width)):
                mean_pF = mean_UF[torch.from_numpy(index_P[at_p.numpy()])]
                product_p = (mean_pF * space.rows(torch.from_numpy(row_P[at_p.numpy()]))).sum(1)
                if self.terms[turn].startswith("match:"):
                    source_p = prepared.asked.source_U[index_P[at_p.numpy()]] - self.first
                    product_p[torch.from_numpy(source_p == row_P[at_p.numpy()])] = 0
                out_P[at_p] += product_p * (weight_PF[at_p, turn] * (1.0 / SCALE**2))
        return out_P

    def values(self, prepared: Prepared, index_Q: Integers, rows_n: Integers) -> Iterator[tuple[str, Tensor]]:
        """Each term by name with its values (Q, n)."""
        one_Q = torch.ones(len(index_Q), device=self.comm.device)
        for term in self.terms:
            out_Qn = torch.zeros(len(index_Q), len(rows_n), device=self.comm.device)
            self.add(out_Qn, term, one_Q, prepared, index_Q, rows_n)
            yield term, out_Qn
