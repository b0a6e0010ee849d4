"""Which questions make sense: the entities that may have a relation on one side, by the facts of train."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from mocme_dist.serving.bundle import Bundle

Integers = NDArray[np.int64]
_PLAUSIBLE = 0.1
_MAX_PLACES = 8192  # of the table of which places go together: 0.5 GB


class PlausibleSources:
    """The entities that may have an answer at a place.

    Those that train shows there, and those whose other places go with it.

    An entity is plausible if the share of entities with the place, among those with one of its other places, is at
    least `_PLAUSIBLE`. Above `_MAX_PLACES` places only entities that train shows there are.
    """

    def __init__(self, bundle: Bundle) -> None:
        facts = bundle.facts_of_train
        keys = np.asarray(facts.known.keys)
        self.places = 2 * bundle.num_relations
        self.facts = facts
        self.entity_n, self.place_n = np.divmod(keys, self.places)
        self.share_PP: NDArray[np.float64] | None = None
        if self.places <= _MAX_PLACES:
            both_PP = np.zeros((self.places, self.places))
            first = np.flatnonzero(np.diff(self.entity_n, prepend=-1))
            length = np.diff(first, append=len(keys))
            for size in np.unique(length):  # entities with equally many places together
                rows = self.place_n[first[length == size][:, None] + np.arange(size)]
                for column in range(size):
                    np.add.at(both_PP, (rows[:, column, None], rows), 1)
            self.share_PP = both_PP / np.maximum(np.diag(both_PP)[:, None], 1)
            self._starts = first

    def sources(self, place: int, most: int = 0) -> Integers:
        """Rows of the plausible sources of a place, ascending; with `most`, the most plausible ones."""
        if self.share_PP is None:
            ids = self.facts.sources(place)
            return ids[:most] if most else ids
        share_n = self.share_PP[self.place_n, place]
        best = np.maximum.reduceat(share_n, self._starts) if len(share_n) else share_n
        ids = self.entity_n[self._starts]
        kept = np.flatnonzero(best >= _PLAUSIBLE)
        if most and len(kept) > most:
            kept = np.sort(kept[np.argsort(-best[kept], kind="stable")[:most]])
        return ids[kept]
