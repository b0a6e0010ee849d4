"""Known answers of every query as a compressed sparse table, for filtered ranking and masked negatives.

A query is (source, relation, direction): direction 0 asks for tails of a head, direction 1 for heads of a tail.
The table consists of three memory-mapped int64 arrays, so processes on one machine share its pages.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mocme_dist.data.files import atomic_path
from mocme_dist.data.tensors import map_array
from mocme_dist.errors import DataError, ShapeError

Integers = NDArray[np.int64]
ARRAYS = ("keys", "offsets", "targets")
# Numbers checked at a time: 32 MiB.
_CHECKED = 1 << 22


def query_keys(source_Q: ArrayLike, relation_Q: ArrayLike, direction_Q: ArrayLike, num_relations: int) -> Integers:
    """Return (Q,) int64 keys of queries: (source * num_relations + relation) * 2 + direction."""
    source, relation, direction = (np.asarray(part, dtype=np.int64) for part in (source_Q, relation_Q, direction_Q))
    return (source * num_relations + relation) * 2 + direction


class KnownAnswers:
    """Known true targets per query.

    Attributes:
        keys: (n,) keys of the queries with an answer, ascending and unique.
        offsets: (n + 1,) start of each query's targets in `targets`.
        targets: (answers,) entity ids, ascending within a query.
        num_relations: number of relations, which the keys depend on.
    """

    def __init__(self, keys: Integers, offsets: Integers, targets: Integers, num_relations: int) -> None:
        self.keys = keys
        self.offsets = offsets
        self.targets = targets
        self.num_relations = num_relations

    @classmethod
    def build(cls, triples_T3: Integers, num_relations: int) -> KnownAnswers:
        """Return the answers of both directions of every triple; duplicate triples count once.

        Args:
            triples_T3: (T, 3) head, relation, tail.
            num_relations: greater than the largest relation id.
        """
        head, relation, tail = (np.ascontiguousarray(triples_T3[:, column], dtype=np.int64) for column in range(3))
        key = np.concatenate(
            [query_keys(head, relation, 0, num_relations), query_keys(tail, relation, 1, num_relations)]
        )
        target = np.concatenate([tail, head])
        key, target = _sorted_pairs(key, target)
        starts = np.flatnonzero(np.concatenate([np.ones(min(len(key), 1), bool), key[1:] != key[:-1]]))
        return cls(key[starts], np.append(starts, len(key)).astype(np.int64), target, num_relations)

    def save(self, directory: Path, name: str) -> None:
        """Write known_NAME_{keys,offsets,targets}.npy into `directory`."""
        for array in ARRAYS:
            with atomic_path(directory / f"known_{name}_{array}.npy") as temporary, temporary.open("wb") as file:
                np.save(file, getattr(self, array), allow_pickle=False)

    @classmethod
    def load(cls, directory: Path, name: str, num_relations: int) -> KnownAnswers:
        """Memory-map the table that `save` wrote.

        Raises:
            DataError: a file is missing or not an array of integers, or the three do not fit together.
        """
        keys, offsets, targets = (load_integers(directory / f"known_{name}_{array}.npy") for array in ARRAYS)
        if (
            keys.ndim != 1
            or targets.ndim != 1
            or offsets.shape != (len(keys) + 1,)
            or offsets[0] != 0
            or offsets[-1] != len(targets)
        ):
            raise DataError(
                f"{directory / f'known_{name}_*.npy'}: keys {keys.shape}, offsets {offsets.shape} and targets "
                f"{targets.shape} do not fit"
            )
        return cls(keys, offsets, targets, num_relations)

    def check(self, num_entities: int, where: Path, again: str) -> None:
        """Verify every number, because the kernels that use this table do not.

        Args:
            num_entities: ids run from 0 to this.
            where: path for messages.
            again: advice for messages.

        Raises:
            DataError: an id or an offset is out of range, or keys or offsets do not ascend.
        """
        bounds = {
            "keys": num_entities * self.num_relations * 2,
            "offsets": len(self.targets) + 1,
            "targets": num_entities,
        }
        for name, limit in bounds.items():
            check_range(getattr(self, name), limit, where, f"known answers, {name}", again)
        for name in ("keys", "offsets"):
            array = getattr(self, name)
            for start in range(0, len(array) - 1, _CHECKED):
                piece = array[start : start + _CHECKED + 1]
                if (piece[1:] <= piece[:-1]).any():
                    raise DataError(f"{where.absolute()}: known answers: {name} do not ascend; {again}")

    @property
    def num_bytes(self) -> int:
        """Return the size of the three arrays in bytes."""
        return self.keys.nbytes + self.offsets.nbytes + self.targets.nbytes

    def lookup(self, source_Q: ArrayLike, relation_Q: ArrayLike, direction_Q: ArrayLike) -> tuple[Integers, Integers]:
        """Return the known targets of Q queries.

        Args: see `spans`.

        Returns:
            offsets (Q + 1,) and targets: those of query q are targets[offsets[q]:offsets[q + 1]], ascending; none
            when the query is unknown.

        Raises:
            ShapeError: see `spans`.
        """
        start, length = self.spans(source_Q, relation_Q, direction_Q)
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(length)]), self.gather(start, length)

    def spans(self, source_Q: ArrayLike, relation_Q: ArrayLike, direction_Q: ArrayLike) -> tuple[Integers, Integers]:
        """Return start and number of the answers of Q queries in `targets`.

        A hub may have as many as there are entities.

        Args:
            source_Q: (Q,) entity ids; numbers or CPU tensors.
            relation_Q: (Q,) relation ids.
            direction_Q: (Q,) 0 for tail queries, 1 for head queries.

        Raises:
            ShapeError: a relation or direction is out of range, so that two queries would share a key.
        """
        relation = np.asarray(relation_Q, dtype=np.int64)
        direction = np.asarray(direction_Q, dtype=np.int64)
        if np.any((relation < 0) | (relation >= self.num_relations)) or np.any((direction < 0) | (direction > 1)):
            raise ShapeError(f"KnownAnswers: expected relations in [0, {self.num_relations}) and directions 0 or 1")
        wanted = query_keys(source_Q, relation, direction, self.num_relations)
        if len(wanted) == 0 or len(self.keys) == 0:
            return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), np.int64)
        place = _places(self.keys, wanted)
        start = np.asarray(self.offsets[place])
        return start, np.where(self.keys[place] == wanted, self.offsets[place + 1] - start, 0)

    def has_source(self, ids: ArrayLike) -> NDArray[np.bool_]:
        """Return whether each entity occurs in the triples that the table was built from."""
        wanted = np.asarray(ids, dtype=np.int64) * (2 * self.num_relations)
        if len(wanted) == 0 or len(self.keys) == 0:
            return np.zeros(len(wanted), dtype=bool)
        # Every triple is a query from both of its ends, so an entity's keys lie in a range of 2 R numbers.
        after = np.asarray(self.keys[_places(self.keys, wanted)]) - wanted
        return np.asarray((after >= 0) & (after < 2 * self.num_relations))

    def gather(self, start_Q: Integers, length_Q: Integers) -> Integers:
        """Return the concatenated targets of these spans."""
        # One flat gather: the j-th answer of query q is at start[q] + j.
        before = np.cumsum(length_Q) - length_Q
        return np.asarray(self.targets[np.repeat(start_Q - before, length_Q) + np.arange(length_Q.sum())])


def _places(ascending: Integers, wanted: Integers) -> Integers:
    """Return the (Q,) insertion points of `wanted` in `ascending`, at most the last place.

    np.searchsorted waits for memory at each step of each search; here all searches advance together and their waits
    overlap, which is several times as fast for a large table.
    """
    place = np.zeros(len(wanted), dtype=np.int64)
    left = len(ascending)
    while left > 1:
        half = left // 2
        place += half * (ascending[place + (half - 1)] < wanted)
        left -= half
    return place + ((ascending[place] < wanted) & (place < len(ascending) - 1))


def load_integers(path: Path) -> Integers:
    """Return a memory-mapped int64 array.

    Raises:
        DataError: the file is missing, torn, pickled, or holds another type.
    """
    try:
        array = map_array(path)
    except FileNotFoundError:
        raise DataError(f"{path.absolute()}: file not found; pack the data set again") from None
    except (ValueError, OSError) as error:
        raise DataError(
            f"{path.absolute()}: not a whole .npy file of numbers ({error}); pack the data set again"
        ) from None
    if array.dtype != np.int64:
        raise DataError(f"{path.absolute()}: expected an int64 array; pack the data set again")
    return np.asarray(array)  # a plain array on the same map: indexing a memmap takes microseconds longer


def check_range(array: Integers, limit: int, where: Path, what: str, again: str) -> None:
    """Verify that every number of an array is in [0, limit).

    Raises:
        DataError: one is not; the message has `where`, `what` and the advice `again`.
    """
    flat = array.reshape(-1)
    for start in range(0, len(flat), _CHECKED):
        piece = flat[start : start + _CHECKED]
        low = int(piece.min())
        high = int(piece.max())
        if low < 0 or high >= limit:
            found = low if low < 0 else high
            raise DataError(
                f"{where.absolute()}: {what}: {found:,} found, expected numbers from 0 to {limit - 1:,}; {again}"
            )


def _sorted_pairs(key: Integers, target: Integers) -> tuple[Integers, Integers]:
    """Return distinct (key, target) pairs in ascending order."""
    if len(key) == 0:
        return key, target
    width = int(target.max()) + 1
    if int(key.max()) < np.iinfo(np.int64).max // width:
        # A sort of fused numbers takes a third of the time and memory of a sort by two columns; np.unique would hash
        # first, which is slower.
        fused = key * width + target
        fused.sort()
        fused = fused[np.concatenate([[True], fused[1:] != fused[:-1]])]
        return fused // width, fused % width
    order = np.lexsort((target, key))
    key = key[order]
    target = target[order]
    first = np.concatenate([[True], (key[1:] != key[:-1]) | (target[1:] != target[:-1])])
    return key[first], target[first]
