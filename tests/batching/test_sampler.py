"""The order of queries: a bijection, once an epoch each, a function of seed and step alone."""

from __future__ import annotations

import numpy as np
import pytest

from mocme_dist.batching.sampler import QuerySampler, key64, mix64, negative_pool, permute


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1000, 4095, 4097, 65537])
def test_permute_is_a_bijection_for_every_size_and_key(size):
    for key in (key64(0), key64(1), key64(2, 3), key64(2**63 + 5), np.uint64(0), np.uint64(2**64 - 1)):
        image = permute(np.arange(size), size, key)
        assert image.dtype == np.int64
        assert np.array_equal(np.sort(image), np.arange(size))


def test_permute_gives_each_position_its_image_whoever_asks():
    whole = permute(np.arange(999), 999, key64(4))
    assert np.array_equal(permute(np.array([998, 0, 500]), 999, key64(4)), whole[[998, 0, 500]])
    assert len(permute(np.arange(0), 999, key64(4))) == 0


def test_permute_works_beyond_32_bits():
    size = 3 * 2**40 + 1
    positions = np.random.default_rng(0).integers(size, size=2000)
    positions = np.unique(np.append(positions, [0, size - 1]))
    image = permute(positions, size, key64(0))
    assert len(np.unique(image)) == len(positions)
    assert image.min() >= 0
    assert image.max() < size


def test_permute_mixes():
    """Each position reaches each image about equally often over keys: a chi-square over 7 x 7 cells."""
    images = np.stack([permute(np.arange(7), 7, key64(9, key)) for key in range(1000)])
    counts = np.stack([np.bincount(images[:, position], minlength=7) for position in range(7)])
    expected = 1000 / 7
    # Rows and columns sum to 1000: the sum is 7 / 6 of a chi-square with 36 degrees of freedom, 99.99 % lie under 92.
    assert ((counts - expected) ** 2 / expected).sum() < 92


def test_mix64_has_no_collision_and_key64_heeds_order():
    assert len(np.unique(mix64(np.arange(100_000, dtype=np.uint64)))) == 100_000
    assert len({int(key64(*numbers)) for numbers in [(), (0,), (0, 0), (1, 2), (2, 1), (-1, 2), (2**64 - 2, 2)]}) == 7


@pytest.mark.parametrize(("num_triples", "batch_size"), [(1, 1), (1, 64), (5, 3), (50, 16), (50, 100), (33, 64)])
def test_an_epoch_visits_each_query_once_and_epochs_differ(num_triples, batch_size):
    sampler = QuerySampler(num_triples, batch_size, seed=7)
    epochs = []
    for epoch in range(3):
        steps = [sampler.queries(epoch * sampler.steps_per_epoch + within) for within in range(sampler.steps_per_epoch)]
        assert all(1 <= len(queries) <= batch_size for queries in steps)
        assert all(len(queries) == batch_size for queries in steps[:-1])
        epochs.append(np.concatenate(steps))
        assert np.array_equal(np.sort(epochs[-1]), np.arange(2 * num_triples))
    if num_triples > 10:
        assert not np.array_equal(epochs[0], epochs[1])
        assert not np.array_equal(
            epochs[0], np.concatenate([QuerySampler(num_triples, 2 * num_triples, seed=8).queries(0)])
        )


def test_negative_pools_are_uniform_and_differ_by_seed_step_and_chunk():
    pools = {at: tuple(negative_pool(*at, 64, 40)) for at in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]}
    assert len(set(pools.values())) == 4
    assert pools[0, 0, 1] == tuple(negative_pool(0, 0, 1, 64, 40))
    drawn = np.bincount(np.concatenate([negative_pool(3, step, 0, 400, 40) for step in range(100)]), minlength=40)
    assert len(drawn) == 40
    # 39 degrees of freedom; 99.99 % of such sums lie under 82.
    assert ((drawn - 1000.0) ** 2 / 1000).sum() < 82


@pytest.mark.parametrize("num_triples", [3, 70, 1000])
def test_steps_are_slices_of_one_permutation_however_they_are_asked_for(num_triples):
    sampler = QuerySampler(num_triples, 32, 5)
    for epoch in (0, 1):
        whole = permute(np.arange(2 * num_triples), 2 * num_triples, key64(5, 1, epoch))
        for within in reversed(range(sampler.steps_per_epoch)):
            found = sampler.queries(epoch * sampler.steps_per_epoch + within)
            assert np.array_equal(found, whole[within * 32 : (within + 1) * 32])
