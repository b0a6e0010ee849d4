"""The tensors of one rank's share of a global batch.

A global batch is cut into chunks of `chunk_size` queries that share a pool of N negatives; chunk c goes to rank
c % world_size. Chunks, pools and masks do not depend on the world size, so neither does the global batch. Short
chunks and ranks without a chunk are padded with queries of weight 0, so shapes are the same at every step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mocme_dist.batching.sampler import QuerySampler, negative_pool

# A query with more than this many answers per entity of its pool belongs to a hub: searching each entity costs less.
_HUB = 16


class KnownSpans(Protocol):
    """Known answers as the masks read them; data/known.py implements it."""

    targets: np.ndarray

    def spans(self, source: np.ndarray, relation: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where the ascending answers of Q queries start in `targets`, and how many there are."""

    def gather(self, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        """Return the targets of spans, concatenated."""


@dataclass(frozen=True)
class Batch:
    """One rank's chunks: G chunks of b queries, N negatives per chunk, U unique entities.

    Attributes:
        step: the global step.
        ids_U: (U,) ascending unique entity ids that this rank scores.
        source_Gb, target_Gb, pool_GN: positions in ids_U.
        relation_Gb, sign_Gb: relation ids, and +1 for tail queries, -1 for head queries.
        weight_Gb: 1 for a query, 0 for padding.
        allowed_GbN: False where a pool entry is a known answer of the query, and so no negative.
        total: number of real queries in the whole global batch, the loss's normaliser.
    """

    step: int
    ids_U: np.ndarray
    source_Gb: Tensor
    target_Gb: Tensor
    pool_GN: Tensor
    relation_Gb: Tensor
    sign_Gb: Tensor
    weight_Gb: Tensor
    allowed_GbN: Tensor
    total: int

    def moved(self, send: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with its tensors moved by `send`."""
        tensors = {name: send(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Batch(**{**vars(self), **tensors})


class BatchMaker:
    """Makes the batch of any step for one rank.

    Args:
        triples_T3: (T, 3) int64 training triples, memory-mapped or not.
        known: training answers; their pool entries are masked.
        num_entities: E.
        sampler: order of the queries.
        chunk_size: queries that share a pool.
        num_negatives: N; 0 makes every entity a candidate (one_vs_all).
        rank, world_size: the rank whose share is made, and their number.
        num_micro_batches: number of batches that a rank's share of a step is cut into.
    """

    def __init__(
        self,
        triples_T3: np.ndarray,
        known: KnownSpans,
        num_entities: int,
        sampler: QuerySampler,
        chunk_size: int,
        num_negatives: int,
        rank: int,
        world_size: int,
        num_micro_batches: int = 1,
    ) -> None:
        self.triples_T3, self.known, self.num_entities, self.sampler = triples_T3, known, num_entities, sampler
        self.chunk_size, self.num_negatives, self.rank, self.world_size = chunk_size, num_negatives, rank, world_size
        chunks = -(-min(sampler.batch_size, sampler.num_queries) // chunk_size)
        self.num_micro_batches = num_micro_batches
        self.chunks_per_micro_batch = -(-chunks // (world_size * num_micro_batches))
        self._slots = np.full(num_entities, -1, dtype=np.int32)

    @property
    def most_ids(self) -> int:
        """The most unique entities that a batch can have, unless the graph has fewer."""
        G, b = self.chunks_per_micro_batch, self.chunk_size
        return 2 * G * b + (G * self.num_negatives if self.num_negatives else self.num_entities)

    def make(self, step: int, number: int = 0) -> Batch:
        """Return a micro-batch of this rank's share of the batch of `step`.

        Shapes are the same for all steps, micro-batches and ranks.
        """
        queries = self.sampler.queries(step)
        G, b = self.chunks_per_micro_batch, self.chunk_size
        chunk_G = np.arange(number * G, (number + 1) * G) * self.world_size + self.rank
        index_Gb = chunk_G[:, None] * b + np.arange(b)[None]
        real_Gb = index_Gb < len(queries)
        query_Gb = queries[np.where(real_Gb, index_Gb, 0)]
        direction_Gb = query_Gb % 2
        triple_Gb3 = np.asarray(self.triples_T3[query_Gb // 2])
        head_Gb, relation_Gb, tail_Gb = triple_Gb3[..., 0], triple_Gb3[..., 1], triple_Gb3[..., 2]
        source_Gb = np.where(direction_Gb == 0, head_Gb, tail_Gb)
        target_Gb = np.where(direction_Gb == 0, tail_Gb, head_Gb)
        if self.num_negatives == 0:  # one pool for all queries of the rank: every entity, held once
            source_Gb, relation_Gb, direction_Gb, target_Gb, real_Gb = (
                a.reshape(1, -1) for a in (source_Gb, relation_Gb, direction_Gb, target_Gb, real_Gb)
            )
        G, b = source_Gb.shape
        # A chunk of padding only uses the first chunk's pool. Rows that no query needs must not be requested, because
        # the table's optimizer moves every row of a step, by its momentum if not by a gradient.
        pool_GN = self._pools(step, np.where(chunk_G * self.chunk_size < len(queries), chunk_G, 0))
        allowed_GbN = ~self._known_in_pool(source_Gb, relation_Gb, direction_Gb, pool_GN)
        ids_U, index = np.unique(
            np.concatenate([source_Gb.ravel(), target_Gb.ravel(), pool_GN.ravel()]), return_inverse=True
        )
        source, target, pool = np.split(index, [G * b, 2 * G * b])
        return Batch(
            step=step,
            ids_U=ids_U,
            source_Gb=torch.from_numpy(source.reshape(G, b)),
            target_Gb=torch.from_numpy(target.reshape(G, b)),
            pool_GN=torch.from_numpy(pool.reshape(pool_GN.shape)),
            relation_Gb=torch.from_numpy(relation_Gb),
            sign_Gb=torch.from_numpy(1.0 - 2.0 * direction_Gb.astype(np.float32)),
            weight_Gb=torch.from_numpy(real_Gb.astype(np.float32)),
            allowed_GbN=torch.from_numpy(allowed_GbN),
            total=len(queries),
        )

    def _pools(self, step: int, chunk_G: np.ndarray) -> np.ndarray:
        if self.num_negatives == 0:
            return np.arange(self.num_entities)[None]
        return np.stack(
            [negative_pool(self.sampler.seed, step, int(c), self.num_negatives, self.num_entities) for c in chunk_G]
        )

    def _known_in_pool(
        self, source_Gb: np.ndarray, relation_Gb: np.ndarray, direction_Gb: np.ndarray, pool_GN: np.ndarray
    ) -> np.ndarray:
        """Return (G, b, N), True where the pool's entity is a known answer of the query, its own target included."""
        G, b = source_Gb.shape
        known_GbN = np.zeros((G, b, pool_GN.shape[1]), dtype=bool)
        spans = self.known.spans(source_Gb.ravel(), relation_Gb.ravel(), direction_Gb.ravel())
        start_Gb, length_Gb = (span.reshape(G, b) for span in spans)
        # For a hub's query each entity of the pool is searched in its answers: listing those could fill the memory.
        hub_Gb = length_Gb > _HUB * pool_GN.shape[1]
        short_Gb = np.where(hub_Gb, 0, length_Gb)
        for g in range(G):  # one chunk at a time, for the same reason
            pool = pool_GN[g]
            # A table of the pool's places serves all queries of the chunk in one pass; ids drawn twice share a place.
            self._slots[pool] = np.arange(len(pool))
            slot = self._slots[self.known.gather(start_Gb[g], short_Gb[g])]
            hit = slot >= 0
            query = np.repeat(np.arange(b), short_Gb[g])
            known_GbN[g, query[hit], slot[hit]] = True
            known_GbN[g] = known_GbN[g][:, self._slots[pool]]
            self._slots[pool] = -1
            for q in np.flatnonzero(hub_Gb[g]):
                answers = self.known.targets[start_Gb[g, q] : start_Gb[g, q] + length_Gb[g, q]]
                known_GbN[g, q] = answers[np.minimum(np.searchsorted(answers, pool), len(answers) - 1)] == pool
        return known_GbN
