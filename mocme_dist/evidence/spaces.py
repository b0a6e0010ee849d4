"""Spaces in which entities have neighbours.

Unit vectors of a rank's entities, made of features that training does not move.

A space is one modality's frozen features, centred first; the points of the sphere that two numeric attributes give as
latitude and longitude; or the model's fused vectors. An entity without the modality has no vector: it contributes
nothing. Shared facts are a space without stored vectors (`shared_facts`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mocme_dist.evidence.facts import Facts, Integers
from mocme_dist.evidence.units import NOBODY, SCALE, to_keys, to_units
from mocme_dist.evidence.votes import Asked, largest
from mocme_dist.kernels.evidence import EvidenceKernels
from mocme_dist.parallel.comm import Comm

BLOCK_ROWS = 8192
# Features are added up as whole numbers of this, so that their mean does not depend on how they are spread over ranks.
_STEP = 2.0**-24

Gather = Callable[[Tensor], tuple[Tensor, Tensor]]


class Space(NamedTuple):
    """Unit vectors of a rank's entities in one space.

    Attributes:
        name: "text", "coordinates", "model" and so on.
        unit_rF: (r, F) int16 tensor on the rank's device; zeros where the entity has no vector.
        present_r: (r,) whether the entity has a vector, on the CPU.
        beta: how fast the vote of a neighbour falls with its distance.
    """

    name: str
    unit_rF: Tensor
    present_r: NDArray[np.bool_]
    beta: float

    @property
    def width(self) -> int:
        """F."""
        return self.unit_rF.shape[1]

    def rows(self, rows: Tensor) -> Tensor:
        """(n, F) float32 units of local rows."""
        return self.unit_rF[rows].float()


class Source(NamedTuple):
    """How a space's vectors come from features: `change`, then scaled to length 1.

    `width` and `beta` as of the space.
    """

    name: str
    width: int
    gather: Gather
    change: Callable[[NDArray[Any]], NDArray[Any]]
    beta: float

    def fill(self, first: int, last: int, device: torch.device) -> Space:
        """The space of the rows [first, last); rows of length 0 count as absent."""
        unit_rF, present_r = np.zeros((last - first, self.width), np.int16), np.zeros(last - first, bool)
        for rows in torch.arange(first, last).split(BLOCK_ROWS):
            values_nF, present_n = self.gather(rows)
            at = rows.numpy()[present_n.cpu().numpy()] - first
            unit_rF[at] = to_units(self.change(values_nF[present_n].double().cpu().numpy()))
            present_r[at] = unit_rF[at].any(1)
        return Space(self.name, torch.from_numpy(unit_rF).to(device), present_r, self.beta)


def feature_source(name: str, gather: Gather, num_rows: int, comm: Comm, beta: float) -> Source:
    """Frozen features, centred at the mean of all entities that have them; collective.

    Args:
        gather: local rows to features (n, F) and their presence (n,), as `FeatureStore.gather`.
    """
    count, total_F = 0, None
    for values_nF in _present(gather, num_rows):
        count += len(values_nF)
        part_F = np.rint(values_nF / _STEP).sum(0)
        total_F = part_F if total_F is None else total_F + part_F
    width = gather(torch.zeros(0, dtype=torch.int64))[0].shape[1]
    total_F = np.zeros(width) if total_F is None else total_F
    sums = comm.sum(torch.from_numpy(np.append(total_F, count)).to(comm.device)).cpu().numpy()
    mean_F = sums[:-1] * _STEP / max(sums[-1], 1)
    return Source(name, width, gather, lambda values_nF: values_nF - mean_F, beta)


def _present(gather: Gather, num_rows: int) -> Iterator[NDArray[np.float64]]:
    for rows in torch.arange(num_rows).split(BLOCK_ROWS):
        values_nF, present_n = gather(rows)
        yield values_nF[present_n].double().cpu().numpy()


def numeric_sources(gather: Gather, statistics: dict[str, Any], betas: tuple[float, float]) -> list[Source]:
    """ "coordinates", if two attributes are latitude and longitude, and "numeric", the scaled values of all attributes.

    Args:
        gather: rows to numeric features: the columns of an attribute side by side, its value first, then its presence.
        statistics: of the numeric encoder: `attributes`, each with name, log, centre and scale.
        betas: of points of the sphere, and of other vectors.
    """
    attributes = statistics["attributes"]
    columns = gather(torch.zeros(0, dtype=torch.int64))[0].shape[1] // len(attributes)
    sources, pair = [], coordinate_pair([attribute["name"] for attribute in attributes])
    if pair is not None:
        sources.append(_coordinates(gather, attributes, columns, pair, betas[0]))
    values = np.arange(len(attributes)) * columns
    only_values: Gather = lambda rows: _columns(gather(rows), values)  # noqa: E731
    sources.append(Source("numeric", len(values), only_values, lambda values_nF: values_nF, betas[1]))
    return sources


def _columns(found: tuple[Tensor, Tensor], columns: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    return found[0][:, torch.from_numpy(columns).to(found[0].device)], found[1]


def sources_of(
    name: str, gather: Gather, num_rows: int, statistics: dict[str, Any] | None, comm: Comm, betas: tuple[float, float]
) -> list[Source]:
    """The sources that a modality's features give; collective.

    Args:
        statistics: of the numeric encoder, None for features of any other kind.
        betas: of points of the sphere, and of other vectors.
    """
    if statistics is not None:
        return numeric_sources(gather, statistics, betas)
    return [feature_source(name, gather, num_rows, comm, betas[1])]


_LATITUDE = r"latitude|(?<![a-z])lat(?![a-z])"
_LONGITUDE = r"longitude|(?<![a-z])(?:lon|lng|long)(?![a-z])"


def coordinate_pair(names: list[str]) -> tuple[int, int] | None:
    """Which attributes are the latitude and the longitude of one place, by their names.

    The first pair, None without one.
    """

    def stems(pattern: str) -> dict[str, int]:
        found = [(re.sub(pattern, "*", name.lower()), at) for at, name in enumerate(names)]
        return {stem: at for stem, at in reversed(found) if "*" in stem}

    latitudes, longitudes = stems(_LATITUDE), stems(_LONGITUDE)
    return min(((at, longitudes[stem]) for stem, at in latitudes.items() if stem in longitudes), default=None)


def _coordinates(
    gather: Gather, attributes: list[dict[str, Any]], columns: int, pair: tuple[int, int], beta: float
) -> Source:
    """Points of the sphere."""
    wanted = np.array([[at * columns, at * columns + 1] for at in pair]).ravel()

    def points(rows: Tensor) -> tuple[Tensor, Tensor]:
        values_n4, present_n = _columns(gather(rows), wanted)
        both_n = present_n & (values_n4[:, 1] > 0) & (values_n4[:, 3] > 0)
        degrees = [_unscaled(values_n4[:, 2 * side].double().cpu().numpy(), attributes[pair[side]]) for side in (0, 1)]
        return torch.from_numpy(sphere(*degrees)), both_n.cpu()

    return Source("coordinates", 3, points, lambda point_n3: point_n3, beta)


def _unscaled(scaled: NDArray[np.float64], attribute: dict[str, Any]) -> NDArray[np.float64]:
    value = scaled * attribute["scale"] + attribute["centre"]
    return np.sign(value) * np.expm1(np.abs(value)) if attribute["log"] else value


def sphere(latitude_n: NDArray[np.float64], longitude_n: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, 3) points of the unit sphere from degrees."""
    latitude_n, longitude_n = np.radians(latitude_n), np.radians(longitude_n)
    return np.stack(
        [np.cos(latitude_n) * np.cos(longitude_n), np.cos(latitude_n) * np.sin(longitude_n), np.sin(latitude_n)], axis=1
    )


def vector_space(name: str, z_rD: Tensor, beta: float) -> Space:
    """The space of vectors that are there already, such as the model's."""
    unit_rD = torch.empty(z_rD.shape, dtype=torch.int16, device=z_rD.device)
    for start in range(0, len(z_rD), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        unit_rD[block] = torch.from_numpy(to_units(z_rD[block].cpu().numpy())).to(z_rD.device)
    return Space(name, unit_rD, unit_rD.any(1).cpu().numpy(), beta)


def mean_units(sum_UF: Tensor) -> Tensor:
    """(U, F) float32 units of the directions of sums of units; 0 where the sum is 0."""
    length_U1 = sum_UF.double().square().sum(1, keepdim=True).sqrt()
    return (sum_UF.double() * (SCALE / torch.where(length_U1 > 0, length_U1, 1.0))).round().float()


# Products that are held at once: 16 MiB of float32.
_PRODUCTS = 1 << 22
# Below every closeness.
_NEVER = -(2.0**25)


def nearest_units(
    space: Space,
    unit_UF: Tensor,
    asked: Asked,
    facts: Facts,
    first: int,
    count: int,
    kernels: EvidenceKernels | None = None,
) -> Integers:
    """(U, count) keys of the nearest of a rank's entities that have a vector and a fact at the query's place.

    Args:
        unit_UF: (U, F) float32 units of the sources; zeros where a source has none; it then has no neighbours.
        first: id of the rank's first entity.
        kernels: of evidence.cpp, or None for torch.
    """
    keys_Uk = np.full((len(asked.source_U), count), NOBODY)
    has_U = unit_UF.any(1).cpu().numpy()
    groups = list[tuple[Integers, Integers]]()
    for place in np.unique(asked.place_U):
        low, high = np.searchsorted(asked.place_U, [place, place + 1])
        at_u = low + np.flatnonzero(has_U[low:high])
        ids_x = facts.sources(int(place))
        local_x = ids_x - first
        inside = (local_x >= 0) & (local_x < len(space.present_r))
        local_x = local_x[inside]
        local_x = local_x[space.present_r[local_x]]
        if len(local_x) and len(at_u):
            groups.append((at_u, local_x))
    if kernels is not None and groups:
        at_u, candidate = (np.concatenate(part) for part in zip(*groups, strict=True))
        queries, starts = (np.cumsum([0, *map(len, part)]) for part in zip(*groups, strict=True))
        unit_uF = unit_UF[torch.from_numpy(at_u)].to(torch.int16).numpy()
        arrays = (unit_uF, space.unit_rF.numpy(), asked.source_U[at_u], queries, starts, candidate)
        keys_Uk[at_u] = kernels.nearest(*arrays, count, first)
    else:
        for at_u, local_x in groups:
            _search(space, unit_UF, asked.source_U, at_u, local_x, first, keys_Uk)
    return keys_Uk


def _search(
    space: Space,
    unit_UF: Tensor,
    source_U: Integers,
    at_u: Integers,
    local_x: Integers,
    first: int,
    keys_Uk: Integers,
) -> None:
    """Fill the rows `at_u` of `keys_Uk` from the candidates `local_x`, both in blocks."""
    device, count = unit_UF.device, keys_Uk.shape[1]
    rows_per_block = max(count, 1 << 15)
    for start in range(0, len(local_x), rows_per_block):
        rows = torch.from_numpy(local_x[start : start + rows_per_block]).to(device)
        unit_xF = space.rows(rows)
        square_x = unit_xF.square().sum(1)
        for some_u in np.array_split(at_u, -(-len(at_u) * len(rows) // _PRODUCTS)):
            at = torch.from_numpy(some_u).to(device)
            unit_uF = unit_UF[at]
            closeness_ux = 2 * (unit_uF @ unit_xF.T) - unit_uF.square().sum(1)[:, None] - square_x
            source_u = torch.from_numpy(source_U[some_u]).to(device)
            closeness_ux.masked_fill_(source_u[:, None] == rows + first, -torch.inf)
            least_u1 = closeness_ux.topk(min(count, len(rows)), dim=1).values[:, -1:]
            query, column = torch.nonzero(closeness_ux >= least_u1.clamp_min(_NEVER), as_tuple=True)
            keys = to_keys(closeness_ux[query, column].long(), rows[column] + first)
            found_uk = largest(query.cpu().numpy(), keys.cpu().numpy(), len(some_u), count)
            both = np.concatenate([keys_Uk[some_u], found_uk], axis=1)
            keys_Uk[some_u] = np.sort(both, axis=1)[:, ::-1][:, :count]


def merge(keys_Uk: Integers, comm: Comm) -> Integers:
    """(U, k) the largest keys of all ranks, in descending order; collective."""
    if comm.world_size == 1:
        return keys_Uk
    slots_WUk = torch.zeros((comm.world_size, *keys_Uk.shape), dtype=torch.int64)
    slots_WUk[comm.rank] = torch.from_numpy(keys_Uk)
    all_WUk = comm.sum(slots_WUk.to(comm.device)).cpu()
    every_Uk = all_WUk.permute(1, 0, 2).flatten(1)
    return every_Uk.sort(dim=1, descending=True).values[:, : keys_Uk.shape[1]].numpy()
