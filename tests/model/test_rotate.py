"""RotatE against complex arithmetic; the fused distance against the plain one, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch

from mocme_dist.errors import ShapeError
from mocme_dist.kernels.distance import distance
from mocme_dist.model.rotate import Relations, rotate


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def as_complex(value: torch.Tensor) -> torch.Tensor:
    real, imaginary = value.double().chunk(2, -1)
    return torch.complex(real, imaginary)


def test_rotate_is_a_complex_product_and_its_inverse_for_head_queries():
    source_BD, phase_BC = normal(9, 10), normal(9, 5, seed=1) * 4
    sign_B = torch.tensor([1.0, -1, 1, -1, -1, 1, 1, 1, -1])
    turned = torch.polar(torch.ones(9, 5).double(), (phase_BC * sign_B[:, None]).double())
    expected = as_complex(source_BD) * turned
    torch.testing.assert_close(as_complex(rotate(source_BD, phase_BC, sign_B)), expected, rtol=1e-5, atol=1e-5)


def test_distance_is_the_sum_of_complex_moduli_with_its_gradient():
    query, candidate = normal(4, 3, 8).requires_grad_(), normal(4, 1, 8, seed=1).requires_grad_()
    grad_out = normal(4, 3, seed=2)
    found = distance(query, candidate)
    (found * grad_out).sum().backward()
    plain_query, plain_candidate = (x.detach().double().requires_grad_() for x in (query, candidate))
    expected = (as_complex(plain_query) - as_complex(plain_candidate)).abs().sum(-1)
    (expected * grad_out).sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(query.grad.double(), plain_query.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(candidate.grad.double(), plain_candidate.grad, rtol=1e-5, atol=1e-5)


def test_a_head_query_is_a_tail_query_with_the_phase_negated():
    """|h e^(i theta) - t| = |t e^(-i theta) - h|: scores of one triple agree in both directions."""
    head, tail, phase = normal(7, 12), normal(7, 12, seed=1), normal(7, 6, seed=2) * 3
    forward = distance(rotate(head, phase, torch.ones(7)), tail)
    backward = distance(rotate(tail, phase, -torch.ones(7)), head)
    torch.testing.assert_close(forward, backward, rtol=1e-5, atol=1e-5)
    again = rotate(rotate(head, phase, torch.ones(7)), phase, -torch.ones(7))
    torch.testing.assert_close(again, head, rtol=1e-5, atol=1e-5)


def test_rotate_refuses_widths_that_do_not_fit():
    with pytest.raises(ShapeError, match=r"width 10, expected 2 \* C = 12"):
        rotate(normal(3, 10), normal(3, 6), torch.ones(3))


def test_relations_start_all_around_the_circle():
    phases = Relations(400, 20, torch.Generator().manual_seed(0)).phase_RC
    assert phases.shape == (400, 10)
    assert phases.abs().max() <= math.pi
    assert phases.max() > 3
    assert phases.min() < -3
    # The mean of 4000 such phases deviates by 0.029.
    assert abs(phases.mean().item()) < 0.12
