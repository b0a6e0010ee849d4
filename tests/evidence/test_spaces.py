"""Spaces: centred at the mean of all ranks, places on the sphere, and who has no vector."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mocme_dist.evidence.spaces import coordinate_pair, feature_source, numeric_sources
from mocme_dist.evidence.units import SCALE
from mocme_dist.parallel.comm import Comm
from mocme_dist.partition import RowPartition


@pytest.mark.parametrize(
    ("names", "pair"),
    [
        (["latitude_degrees", "longitude_degrees", "sphere_x"], (0, 1)),
        (["location.geocode.longitude", "area", "location.geocode.latitude"], (2, 0)),
        (["hasLongitude", "hasLatitude"], (1, 0)),
        (["lat", "lon"], (0, 1)),
        (["geo lat", "geo long"], (0, 1)),
        (["birth.latitude", "death.longitude"], None),
        (["plate", "long_side", "population"], None),
    ],
)
def test_coordinates_are_found_by_their_names(names, pair):
    assert coordinate_pair(names) == pair


def test_numbers_become_points_of_the_sphere_and_scaled_values():
    """Four columns an attribute, of which the first two are value and presence.

    The second entity lacks its longitude.
    """
    names = ["latitude", "population", "longitude"]
    attributes = [{"name": name, "log": name == "population", "centre": 10.0, "scale": 20.0} for name in names]
    values = torch.zeros(3, 12)
    values[0, [0, 1, 4, 5, 8, 9]] = torch.tensor([1.0, 1, 0.5, 1, 4.0, 1])  # 30 north, 90 east
    values[1, [0, 1, 4, 5]] = torch.tensor([-1.0, 1, 2.0, 1])
    present = torch.tensor([True, True, False])
    sources = numeric_sources(lambda rows: (values[rows], present[rows]), {"attributes": attributes}, (400.0, 15.0))
    places, numbers = (source.fill(0, 3, torch.device("cpu")) for source in sources)
    assert (places.name, places.beta, numbers.name, numbers.beta) == ("coordinates", 400.0, "numeric", 15.0)
    assert places.present_r.tolist() == [True, False, False]
    expected = SCALE * np.array([0, np.cos(np.pi / 6), np.sin(np.pi / 6)])
    assert np.abs(places.unit_rF[0].numpy() - expected).max() <= 0.5
    assert numbers.present_r.tolist() == [True, True, False]
    assert np.abs(numbers.unit_rF[1].numpy() - SCALE * np.array([-1, 2, 0]) / np.sqrt(5)).max() <= 0.5


def centred(comm: Comm) -> tuple[np.ndarray, np.ndarray]:
    gen = torch.Generator().manual_seed(0)
    values, present = torch.randn(50, 5, generator=gen) + 3, torch.rand(50, generator=gen) < 0.7
    first, last = RowPartition(50, comm.world_size).bounds(comm.rank)

    def gather(rows):
        return (
            values[first:last][rows] * present[first:last][rows, None],
            present[first:last][rows],
        )

    space = feature_source("text", gather, last - first, comm, 15.0).fill(0, last - first, comm.device)
    return space.unit_rF.numpy(), space.present_r


def test_the_mean_is_that_of_all_ranks(run_ranks):
    ((alone, present),) = run_ranks(1, centred)
    for world in (2, 3):
        parts = run_ranks(world, centred)
        assert np.array_equal(np.concatenate([part[0] for part in parts]), alone)
    assert np.abs(alone[present].astype(float).mean(0)).max() < SCALE / 10
    assert not alone[~present].any()
