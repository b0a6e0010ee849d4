"""Python's side of evidence.cpp: nearest entities, votes, shared facts and sums of terms on a CPU.

Numpy arrays go in and out; this module does not import torch. Everything here has a plain twin in `evidence`, whose
bits it gives.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mocme_dist.kernels.builder import FOLDER, call, library

Integers = NDArray[np.int64]
# Entries of the queries: offsets (U + 1,), local rows, values in float64.
Found = tuple[Integers, NDArray[np.int32], NDArray[np.float64]]


class FactTable(NamedTuple):
    """The arrays of a table of known answers, with the first key of each entity, and the local rows of a rank.

    Rows are `rows` entities from the id `first`.
    """

    keys: Integers
    offsets: Integers
    targets: Integers
    first_key_E: Integers
    places: int
    first: int
    rows: int

    @property
    def arrays(self) -> tuple[Integers, ...]:
        """All arrays."""
        return self.keys, self.offsets, self.targets, self.first_key_E

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The number of places, the first id and the number of rows."""
        return self.places, self.first, self.rows


class SparseTerm(NamedTuple):
    """A term that is 0 for most candidates: entries by query, and which of them each query has."""

    offsets: Integers
    row: NDArray[np.int32]
    value: NDArray[np.float32]
    index_Q: Integers


def _addresses(terms: Sequence[SparseTerm]) -> Integers:
    """(T, 4) addresses at which the arrays of the terms begin."""
    return np.array([[array.ctypes.data for array in term] for term in terms], np.int64).reshape(-1, 4)


class EvidenceKernels(NamedTuple):
    """The library, and how many threads it runs."""

    library: ctypes.CDLL
    threads: int

    def _call(self, name: str, arrays: Sequence[Any], sizes: Sequence[int]) -> None:
        call(self.library, name, arrays, sizes, threads=self.threads)

    def _find(self, num_queries: int, run: Callable[[Integers, Integers], None]) -> Found:
        """Let `run` fill offsets and a handle, and take what it found."""
        offsets_U, handle = np.zeros(num_queries + 1, np.int64), np.zeros(1, np.int64)
        run(offsets_U, handle)
        row, value = np.empty(offsets_U[-1], np.int32), np.empty(offsets_U[-1])
        self._call("mocme_take", (row, value), (int(handle[0]),))
        return offsets_U, row, value

    def nearest(
        self,
        unit_UF: NDArray[np.int16],
        unit_rF: NDArray[np.int16],
        source_U: Integers,
        queries: Integers,
        groups: Integers,
        candidate: Integers,
        count: int,
        first: int,
    ) -> Integers:
        """(U, count) keys of the nearest candidates of each query.

        Args:
            unit_UF, unit_rF: of the sources, and of the local rows.
            queries: (G + 1,) where the queries of each group begin. groups: (G + 1,) where its candidates begin.
            candidate: local rows, group by group.
        """
        keys_Uk = np.empty((len(unit_UF), count), np.int64)
        arrays = (unit_UF, unit_rF, source_U, queries, groups, candidate, keys_Uk)
        self._call("mocme_nearest", arrays, (len(groups) - 1, unit_rF.shape[1], count, first))
        return keys_Uk

    def votes(self, table: FactTable, place_U: Integers, ids_Uk: Integers, weight_Uk: NDArray[np.float64]) -> Found:
        """Sums of the weights of each query's neighbours (U, k) over their answers at the query's place."""
        U, k = ids_Uk.shape

        def run(offsets_U: Integers, handle: Integers) -> None:
            arrays = (*table.arrays, place_U, ids_Uk, weight_Uk, offsets_U, handle)
            self._call("mocme_votes", arrays, (*table.sizes, U, k))

        return self._find(U, run)

    def shared_nearest(
        self,
        table: FactTable,
        idf_h: NDArray[np.float64],
        length_r: NDArray[np.float64],
        source_U: Integers,
        place_U: Integers,
        max_holders: int,
        count: int,
    ) -> Integers:
        """(U, count) keys of the nearest entities by shared facts; see `SharedFacts.nearest`."""
        keys_Uk = np.empty((len(source_U), count), np.int64)
        arrays = (*table.arrays, idf_h, length_r, source_U, place_U, keys_Uk)
        self._call("mocme_shared_nearest", arrays, (*table.sizes, max_holders, len(source_U), count))
        return keys_Uk

    def shared_likeness(
        self,
        table: FactTable,
        idf_h: NDArray[np.float64],
        length_r: NDArray[np.float64],
        source_U: Integers,
        place_U: Integers,
        max_holders: int,
        max_answers: int,
    ) -> Found:
        """Cosines to the mean of each query's known answers; see `SharedFacts.likeness`."""

        def run(offsets_U: Integers, handle: Integers) -> None:
            arrays = (*table.arrays, idf_h, length_r, source_U, place_U, offsets_U, handle)
            sizes = (*table.sizes, max_holders, max_answers, len(source_U))
            self._call("mocme_shared_likeness", arrays, sizes)

        return self._find(len(source_U), run)

    def sparse_bias(self, terms: Sequence[SparseTerm], weight_QT: Any, out_Qn: Any, low: int) -> None:
        """Set (Q, n) float32 to the sums of the terms times their weights (Q, T), for the local rows from `low` on."""
        self._call("mocme_sparse_bias", (_addresses(terms), weight_QT, out_Qn), (len(terms), *out_Qn.shape, low))

    def sparse_pairs(self, terms: Sequence[SparseTerm], weight_PT: Any, row_P: NDArray[np.int32], out_P: Any) -> None:
        """Add the same for one local row of each query to (P,) float32."""
        self._call("mocme_sparse_pairs", (_addresses(terms), weight_PT, row_P, out_P), (len(terms), len(row_P)))

    def add_products(self, product_pn: Any, factor_p: Any, query_p: Any, out_Qn: Any) -> None:
        """Add the rows of a product (p, n), times a factor each, to the rows `query_p` of `out_Qn`."""
        self._call("mocme_add_products", (product_pn, factor_p, query_p, out_Qn), product_pn.shape)


def evidence_kernels(threads: int, instructions: str | None = None) -> EvidenceKernels | None:
    """The kernels, or None without a compiler. `instructions`: see `library`."""
    found = library(FOLDER / "evidence.cpp", instructions)
    return None if found is None else EvidenceKernels(found, threads)
