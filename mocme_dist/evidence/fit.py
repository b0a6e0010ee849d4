"""Fits the blend: s(c | q) = sum over terms of w[place, term] term(q, c), with weights from held-out facts.

Weights that are learned on train would trust terms that memorise train. The objective is the reciprocal rank with
smoothed steps; likelihood as the objective makes ranks worse. The weights of a place are those of its direction plus a
difference of its own, which a penalty keeps small where the place has few held-out facts.

The candidates of a query are the best of each term and a random few, so that a weight that raises a wrong candidate is
noticed. Candidates and values are the same at every world size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mocme_dist.evidence.facts import Integers
from mocme_dist.evidence.spaces import merge
from mocme_dist.evidence.terms import Evidence, Prepared
from mocme_dist.evidence.units import NOBODY
from mocme_dist.evidence.votes import largest
from mocme_dist.parallel.comm import Comm

BEST_OF_TERM, BEST_OF_MODEL, BY_CHANCE = 40, 150, 50
# Values of all terms of all of a rank's entities that are held at once: 128 MB.
VALUES = 1 << 25
# Up to this multiple of the wanted number, candidates with a value are sorted directly.
_FEW = 4
_ID_BITS = 31
_ID_MASK = (1 << _ID_BITS) - 1

# Places of some queries to the model's terms (B, q, r) of all of a rank's entities.
ModelValues = Callable[[Integers], Tensor]


class Sample(NamedTuple):
    """Q queries with their candidates, the target first.

    Attributes:
        value_QKF: terms of each candidate, float32 on the CPU.
        there_QK: bool, False where a query has fewer candidates.
        place_Q: 2 * relation + direction.
    """

    value_QKF: Tensor
    there_QK: Tensor
    place_Q: Tensor

    def take(self, at: Tensor) -> Sample:
        """Some of the queries, by position or by mask."""
        return Sample(self.value_QKF[at], self.there_QK[at], self.place_Q[at])


class Wanted(NamedTuple):
    """Held-out queries.

    Which of the prepared ones each is, its target, and the answers that do not compete, flat by query.
    """

    index_Q: Integers
    target_Q: Integers
    known_offsets: Integers
    known: Integers


def collect(
    evidence: Evidence, prepared: Prepared, wanted: Wanted, model_values: ModelValues, num_entities: int, seed: int
) -> Sample:
    """The sample of a pass of queries; collective, the same on every rank.

    Args:
        model_values: of places among the Q queries.
    """
    chance_QN = np.random.default_rng(seed).integers(num_entities, size=(len(wanted.index_Q), BY_CHANCE))
    parts = []
    most_rows = comm_max(evidence.comm, evidence.num_rows)
    size = max(1, VALUES // max(1, most_rows * (len(evidence.terms) + 1)))
    for start in range(0, len(wanted.index_Q), size):
        at_q = np.arange(start, min(start + size, len(wanted.index_Q)))
        parts.append(
            _collect_block(evidence, prepared, wanted, at_q, model_values(at_q), chance_QN[at_q], num_entities)
        )
    width = max(value.shape[1] for value, _ in parts)
    value_QKF = torch.cat([torch.nn.functional.pad(value, (0, 0, 0, width - value.shape[1])) for value, _ in parts])
    there_QK = torch.cat([torch.nn.functional.pad(there, (0, width - there.shape[1])) for _, there in parts])
    return Sample(value_QKF, there_QK, torch.from_numpy(prepared.asked.place_U[wanted.index_Q]))


def comm_max(comm: Comm, value: int) -> int:
    """Return the largest value of all ranks; collective."""
    slots_W = torch.zeros(comm.world_size, dtype=torch.int64, device=comm.device)
    slots_W[comm.rank] = value
    return int(comm.sum(slots_W).max())


def _collect_block(
    evidence: Evidence,
    prepared: Prepared,
    wanted: Wanted,
    at_q: Integers,
    model_Bqr: Tensor,
    chance_qN: Integers,
    num_entities: int,
) -> tuple[Tensor, Tensor]:
    """Return values (q, K, F) and presence (q, K) of the candidates of a block of queries."""
    rows, comm = np.arange(evidence.num_rows), evidence.comm
    terms = dict(evidence.values(prepared, wanted.index_Q[at_q], rows))
    value_Fqr = torch.cat([model_Bqr, torch.stack([*terms.values()])])
    left_out = _pairs_left_out(wanted, at_q)
    barred_qr = torch.zeros(value_Fqr.shape[1:], dtype=torch.bool, device=comm.device)
    _mark(barred_qr, left_out, evidence.first)
    lists = [_best(model_Bqr.sum(0), barred_qr, evidence.first, BEST_OF_MODEL, comm)]
    lists += [
        _best(value_qr, barred_qr | (value_qr <= 0), evidence.first, BEST_OF_TERM, comm) for value_qr in terms.values()
    ]
    ids_qK, there_qK = _distinct(np.concatenate([*lists, chance_qN], 1), wanted.target_Q[at_q], left_out, num_entities)
    local_qK = torch.from_numpy(ids_qK - evidence.first).to(comm.device)
    mine_qK = (local_qK >= 0) & (local_qK < evidence.num_rows)
    own_Fqk = torch.zeros((len(value_Fqr), *local_qK.shape), device=comm.device)
    if evidence.num_rows:
        index = local_qK.clamp(0, evidence.num_rows - 1).expand(len(value_Fqr), -1, -1)
        own_Fqk = value_Fqr.gather(2, index) * mine_qK
    value_qKF = comm.sum(own_Fqk.permute(1, 2, 0).contiguous()).cpu()
    return value_qKF * torch.from_numpy(there_qK[..., None]), torch.from_numpy(there_qK)


def _pairs_left_out(wanted: Wanted, at_q: Integers) -> tuple[Integers, Integers]:
    """Pairs (query of the block, entity) that do not compete: known answers, the target among them or not."""
    low, high = wanted.known_offsets[at_q], wanted.known_offsets[at_q + 1]
    ids = wanted.known[low[0] : high[-1]]
    return np.repeat(np.arange(len(at_q)), high - low), ids


def _mark(barred_qr: Tensor, pairs: tuple[Integers, Integers], first: int) -> None:
    local = pairs[1] - first
    mine = (local >= 0) & (local < barred_qr.shape[1])
    query, row = (torch.from_numpy(part[mine]).to(barred_qr.device) for part in (pairs[0], local))
    barred_qr[query, row] = True


def _best(value_qr: Tensor, barred_qr: Tensor, first: int, count: int, comm: Comm) -> Integers:
    """(q, count) ids of the largest values over all ranks, ties by ascending id, -1 where there are fewer.

    Collective.
    """
    value_qr = value_qr.masked_fill(barred_qr, -torch.inf)
    kept_qr = value_qr > -torch.inf
    if int(kept_qr.sum()) > _FEW * count * len(value_qr) and value_qr.shape[1] > count:
        kept_qr &= value_qr >= value_qr.topk(count, dim=1).values[:, -1:]
    query, row = torch.nonzero(kept_qr, as_tuple=True)
    bits = value_qr[query, row].view(torch.int32).long()
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # whole numbers in the order of the floats
    keys = (bits << _ID_BITS) + (_ID_MASK - (row + first))
    keys_qk = merge(largest(query.cpu().numpy(), keys.cpu().numpy(), len(value_qr), count), comm)
    return np.where(keys_qk == NOBODY, -1, _ID_MASK - (keys_qk & _ID_MASK))


def _distinct(
    ids_qK: Integers, target_q: Integers, left_out: tuple[Integers, Integers], num_entities: int
) -> tuple[Integers, NDArray[np.bool_]]:
    """Each query's competing candidates once, the target first and the others by id, and a mask of their presence."""
    pairs = np.sort(left_out[0] * num_entities + left_out[1])
    key_qK = np.arange(len(ids_qK))[:, None] * num_entities + ids_qK
    place = np.minimum(np.searchsorted(pairs, key_qK), max(len(pairs) - 1, 0))
    known_qK = pairs[place] == key_qK if len(pairs) else np.zeros(ids_qK.shape, bool)
    gone = num_entities  # behind all ids
    sorted_qK = np.sort(np.where((ids_qK < 0) | known_qK | (ids_qK == target_q[:, None]), gone, ids_qK), axis=1)
    sorted_qK[:, 1:][sorted_qK[:, 1:] == sorted_qK[:, :-1]] = gone
    sorted_qK.sort(axis=1)
    kept = sorted_qK[:, : max(1, int((sorted_qK < gone).sum(1).max(initial=0)))]
    ids_qK = np.concatenate([target_q[:, None], np.minimum(kept, gone - 1)], axis=1)
    return ids_qK, np.concatenate([np.ones((len(kept), 1), bool), kept < gone], axis=1)


# Weights are whole multiples of this: the same on machines whose sums differ in the last digits.
STEP = 2.0**-10
# Share of the steps after which terms that say little are dropped; the others adapt in the rest.
_PRUNE_AT = 0.6


class FitSettings(NamedTuple):
    """See the `blend` section of the configuration."""

    steps: int = 250
    learning_rate: float = 0.1
    tau_first: float = 1.5
    tau_last: float = 0.3
    penalty: float = 0.5
    batch_queries: int = 512
    seed: int = 0
    prune_below: float = 0.05


def smooth_reciprocal_ranks(score_QK: Tensor, there_QK: Tensor, tau: float) -> Tensor:
    """(Q,) 1 / (1 + sum over the candidates of sigmoid((s - s_target) / tau)); the target is the first."""
    above_Qk = torch.sigmoid((score_QK[:, 1:] - score_QK[:, :1]) / tau) * there_QK[:, 1:]
    return 1.0 / (1.0 + above_Qk.sum(1))


def fit_weights(
    sample: Sample, num_places: int, num_model_terms: int, allowed_F: Tensor, settings: FitSettings
) -> Tensor:
    """(places, F) weights >= 0, multiples of `STEP`; the same for the same sample and seed.

    Args:
        num_model_terms: the first terms, which start with weight 1 and the others with 0.
        allowed_F: bool, terms that may have a weight.
    """
    Q, _, F = sample.value_QKF.shape
    if Q == 0:  # half of a development set of one fact may be empty
        return model_alone(num_places, F, num_model_terms)
    scale_F = _spreads(sample, num_model_terms)
    start_F = (torch.arange(F) < num_model_terms) / scale_F
    base_2F = start_F.repeat(2, 1).requires_grad_()
    own_PF = torch.zeros(num_places, F, requires_grad=True)
    optimizer = torch.optim.Adam([base_2F, own_PF], lr=settings.learning_rate)
    generator = torch.Generator().manual_seed(settings.seed)
    factor_F = scale_F * allowed_F
    kept_PF = torch.ones(num_places, F)
    for step in range(settings.steps):
        if step == int(_PRUNE_AT * settings.steps):
            kept_PF = _worth_keeping(base_2F, own_PF, factor_F > 0, settings.prune_below)
        ratio = step / max(settings.steps - 1, 1)
        tau = settings.tau_first * (settings.tau_last / settings.tau_first) ** ratio
        at_q = torch.randperm(Q, generator=generator)[: settings.batch_queries]
        place_q = sample.place_Q[at_q]
        weight_qF = (base_2F[place_q % 2] + own_PF[place_q]) * factor_F * kept_PF[place_q]
        score_qK = torch.einsum("qkf,qf->qk", sample.value_QKF[at_q], weight_qF)
        gain = smooth_reciprocal_ranks(score_qK, sample.there_QK[at_q], tau).mean()
        loss = settings.penalty / Q * own_PF.square().sum() - gain
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():  # weights >= 0: a sum that stops early stays valid, and a term that harms is left out
            base_2F.clamp_(min=0)
            own_PF.copy_(torch.maximum(own_PF, -base_2F[torch.arange(num_places) % 2]))
    with torch.no_grad():
        weight_PF = (base_2F[torch.arange(num_places) % 2] + own_PF) * factor_F * kept_PF
        return (weight_PF / STEP).round().clamp_(min=0) * STEP


def _worth_keeping(base_2F: Tensor, own_PF: Tensor, allowed_F: Tensor, below: float) -> Tensor:
    """(places, F) 1 for terms with at least this share of the place's largest weight, in units of spread.

    Others cost and say little.
    """
    with torch.no_grad():
        weight_PF = (base_2F[torch.arange(len(own_PF)) % 2] + own_PF) * allowed_F
        return (weight_PF >= below * weight_PF.amax(1, keepdim=True)).float()


def _spreads(sample: Sample, num_model_terms: int) -> Tensor:
    """(F,) unit of each term's weight: the model's spread over the term's, so that one learning rate suits all."""
    inside = sample.value_QKF[sample.there_QK]
    spread_F = inside.std(0)
    model = inside[:, :num_model_terms].sum(1).std()
    return torch.where(spread_F > 0, model / spread_F.clamp_min(1e-6), 1.0)


def model_alone(num_places: int, num_terms: int, num_model_terms: int) -> Tensor:
    """(places, F) weights that leave the model's score as it is."""
    return (torch.arange(num_terms) < num_model_terms).float().repeat(num_places, 1)
