"""Whole-number units: exact products in any order, and keys in the order of closeness."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mocme_dist.errors import ShapeError
from mocme_dist.evidence.units import MAX_WIDTH, SCALE, cosine_of, from_keys, to_keys, to_units


@pytest.mark.parametrize("width", [3, 384, MAX_WIDTH])
def test_products_are_exact_in_float32(width):
    gen = np.random.default_rng(0)
    units = to_units(gen.normal(size=(40, width)))
    units[1] = -units[0]  # the largest sums there are
    exact = units.astype(np.int64) @ units.astype(np.int64).T
    square = exact.diagonal()
    floats = torch.from_numpy(units).float()
    product = floats @ floats.T
    assert torch.equal(product.long(), torch.from_numpy(exact))
    closeness = 2 * product - floats.square().sum(1)[:, None] - floats.square().sum(1)
    assert torch.equal(closeness.long(), torch.from_numpy(2 * exact - square[:, None] - square))
    assert (floats.double().norm(dim=1) - SCALE).abs().max() < np.sqrt(width) / 2


def test_cosines_of_near_points_of_the_sphere_keep_their_order():
    """A kilometre or two of rounding: 1 - cosine of points 60 km apart is 4e-5, which a rounded product would lose."""
    angle = np.array([0.0, 60, 120, 180, 240]) / 6371
    points = np.stack([np.cos(0.5 + angle), np.sin(0.5 + angle), np.zeros(5)], 1)
    units = to_units(points).astype(np.int64)
    found = cosine_of(-np.square(units[:1] - units).sum(1))
    assert (np.diff(found) < 0).all()
    np.testing.assert_allclose(1 - found[1:], 1 - np.cos(angle[1:]), rtol=0.1)


def test_rows_without_length_stay_zero_and_wide_ones_are_refused():
    assert not to_units(np.zeros((2, 4))).any()
    with pytest.raises(ShapeError, match="8,193"):
        to_units(np.zeros((1, MAX_WIDTH + 1)))


def test_keys_sort_by_closeness_then_by_id():
    closeness, ids = np.array([-5, 0, -5, -16_000_000]), np.array([7, 2**36, 3, 0])
    keys = to_keys(closeness, ids)
    assert np.argsort(-keys).tolist() == [1, 2, 0, 3]
    back = from_keys(keys)
    assert np.array_equal(back[0], closeness)
    assert np.array_equal(back[1], ids)
