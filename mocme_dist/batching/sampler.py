"""Chooses the queries of a step: a pure function of (seed, step), without state or a stored permutation.

An epoch visits every query once. Query q of a training set of T triples is triple q // 2 in direction q % 2
(0 asks for the tail, 1 for the head). The order is a keyed permutation of [0, 2T) that is computed, not stored, so
any rank can start at any step, and resuming is arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_ROUNDS = 6
_BLOCK_STEPS = 8


def mix64(value: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser on uint64: a bijection whose output bits depend on all input bits."""
    with np.errstate(over="ignore"):
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


def key64(*numbers: int) -> np.uint64:
    """Return one 64-bit key for several integers; their order matters."""
    key = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        key = mix64(key ^ np.uint64(number & 0xFFFFFFFFFFFFFFFF))
    return key[0]


def permute(positions: np.ndarray, size: int, key: np.uint64) -> np.ndarray:
    """Return the images of `positions` under a keyed permutation of [0, size).

    A balanced Feistel network over the next power of four, walked until the image falls inside: bijective for
    every size and key, at most four steps on average, O(1) memory.

    Args:
        positions: (n,) integers in [0, size).
        size: count of numbers that are permuted.
        key: selects the permutation.

    Returns:
        (n,) int64, distinct if `positions` are.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    keys = mix64(np.arange(_ROUNDS, dtype=np.uint64) ^ key)
    out = positions.astype(np.uint64)
    outside = np.arange(len(out))
    while len(outside):
        left, right = out[outside] >> shift, out[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (mix64(right ^ round_key) & mask)
        out[outside] = (left << shift) | right
        outside = outside[out[outside] >= size]
    return out.astype(np.int64)


@dataclass(frozen=True)
class QuerySampler:
    """Order of the queries of a training set, epoch by epoch, in steps of `batch_size`."""

    num_triples: int
    batch_size: int
    seed: int

    @property
    def num_queries(self) -> int:
        """Queries per epoch: two per triple."""
        return 2 * self.num_triples

    @property
    def steps_per_epoch(self) -> int:
        """Steps per epoch; the last one may have fewer queries."""
        return -(-self.num_queries // self.batch_size)

    def queries(self, step: int) -> np.ndarray:
        """Return the (n,) query numbers of `step`, n <= batch_size; an epoch of steps has each number once."""
        epoch, within = divmod(step, self.steps_per_epoch)
        block, place = divmod(within, _BLOCK_STEPS)
        return _block(self, epoch, block)[place * self.batch_size : (place + 1) * self.batch_size]


@lru_cache(maxsize=2)
def _block(sampler: QuerySampler, epoch: int, block: int) -> np.ndarray:
    """Return the queries of _BLOCK_STEPS steps: permuting few numbers takes as long as permuting many."""
    size = _BLOCK_STEPS * sampler.batch_size
    positions = np.arange(block * size, min((block + 1) * size, sampler.num_queries))
    queries = permute(positions, sampler.num_queries, key64(sampler.seed, 1, epoch))
    queries.flags.writeable = False
    return queries


def negative_pool(seed: int, step: int, chunk: int, count: int, num_entities: int) -> np.ndarray:
    """Return (count,) entity ids drawn uniformly with replacement for one chunk, a pure function of the arguments."""
    counters = np.arange(count, dtype=np.uint64) ^ key64(seed, 2, step, chunk)
    return (mix64(counters) % np.uint64(num_entities)).astype(np.int64)
