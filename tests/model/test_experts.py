"""Batched experts against a loop of plain networks, values and gradients; projections against plain layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mocme_dist.errors import ShapeError
from mocme_dist.model.experts import Experts
from mocme_dist.model.projection import Projection, Projections

M, K, U, D = 2, 3, 7, 6


def experts(residual: bool, dropout: float = 0.0) -> Experts:
    module = Experts(M, K, D, dropout, residual, torch.Generator().manual_seed(0)).double()
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():  # biases start at 0 and would hide a mistake in their place
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=gen, dtype=torch.float64) * 0.3)
    return module


def twin(module: Experts, m: int, k: int) -> nn.Sequential:
    """Expert k of modality m as a plain pair of layers with the same weights."""
    first, second = nn.Linear(D, D).double(), nn.Linear(D, D).double()
    with torch.no_grad():
        first.weight.copy_(module.first_MDH[m, :, k * D : (k + 1) * D].T)
        first.bias.copy_(module.first_bias_MH[m, k * D : (k + 1) * D])
        second.weight.copy_(module.second_LDD[m * K + k].T)
        second.bias.copy_(module.second_bias_LD[m * K + k])
    return nn.Sequential(first, nn.ReLU(), second)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("rows", [U, 1, 0])
def test_batched_experts_equal_a_loop_of_networks(residual, rows):
    module = experts(residual)
    gen = torch.Generator().manual_seed(2)
    x_MUD = torch.randn(M, rows, D, generator=gen, dtype=torch.float64).requires_grad_()
    grad_out = torch.randn(M, K, rows, D, generator=gen, dtype=torch.float64)
    views = module(x_MUD)
    (views * grad_out).sum().backward()

    x_twin = x_MUD.detach().clone().requires_grad_()
    twins = [[twin(module, m, k) for k in range(K)] for m in range(M)]
    for m in range(M):
        for k in range(K):
            expected = twins[m][k](x_twin[m]) + (x_twin[m] if residual else 0)
            torch.testing.assert_close(views[m, k], expected)
            (expected * grad_out[m, k]).sum().backward()
    torch.testing.assert_close(x_MUD.grad, x_twin.grad)
    for m in range(M):
        for k in range(K):
            first, _, second = twins[m][k]
            columns = slice(k * D, (k + 1) * D)
            torch.testing.assert_close(module.first_MDH.grad[m, :, columns].T, first.weight.grad)
            torch.testing.assert_close(module.first_bias_MH.grad[m, columns], first.bias.grad)
            torch.testing.assert_close(module.second_LDD.grad[m * K + k].T, second.weight.grad)
            torch.testing.assert_close(module.second_bias_LD.grad[m * K + k], second.bias.grad)


def test_residual_experts_start_as_the_identity_and_plain_ones_apart():
    x_MUD = torch.randn(M, U, D, generator=torch.Generator().manual_seed(0))
    start = Experts(M, K, D, 0.0, True, torch.Generator().manual_seed(0))
    assert torch.equal(start(x_MUD), x_MUD[:, None].expand(M, K, U, D))
    start = Experts(M, K, D, 0.0, False, torch.Generator().manual_seed(0))
    views = start(x_MUD)
    assert not torch.allclose(views[:, 0], views[:, 1])


def test_views_keep_the_scale_of_their_inputs():
    width = 128
    module = Experts(1, 2, width, 0.0, False, torch.Generator().manual_seed(0))
    views = module(torch.randn(1, 400, width, generator=torch.Generator().manual_seed(1)))
    assert views.std().item() == pytest.approx(1.0, rel=0.1)


def test_dropout_acts_in_training_only():
    module = experts(False, dropout=0.5)
    x_MUD = torch.ones(M, U, D, dtype=torch.float64)
    torch.manual_seed(0)
    assert not torch.equal(module(x_MUD)[:, :, 0], module(x_MUD)[:, :, 1])
    module.eval()
    assert torch.equal(module(x_MUD), module(x_MUD))


def test_experts_refuse_other_shapes():
    with pytest.raises(ShapeError, match=r"x_MUD is \(3, 7, 6\), expected M and D of \(2, 6\)"):
        experts(False)(torch.zeros(3, U, D))


def test_a_projection_is_two_layers_on_standardised_features():
    projection = Projection(5, 9, 4, 0.0)
    raw = torch.randn(30, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 100, 0.01, 3, 0]) + 7
    mean, std = raw.mean(0), raw.std(0, correction=0)
    projection.set_statistics(mean, std)
    standard = (raw - mean) / torch.where(std > 1e-6, std, 1.0)
    torch.testing.assert_close(standard[:, :4].std(0, correction=0), torch.ones(4))
    assert (standard[:, 4] == 0).all()
    expected = nn.functional.linear(standard, projection.first.weight, projection.first.bias).relu()
    expected = nn.functional.linear(expected, projection.second.weight, projection.second.bias)
    torch.testing.assert_close(projection(raw), expected, rtol=1e-4, atol=1e-5)


def test_projections_keep_the_order_of_modalities_and_may_pass_structure_through():
    raw = {"structure": torch.randn(6, 4), "text": torch.randn(6, 3)}
    widths = {name: value.shape[1] for name, value in raw.items()}
    through = Projections(widths, 5, 4, 0.0, "identity")
    stacked = through(raw)
    assert torch.equal(stacked[0], raw["structure"])
    assert torch.equal(stacked[1], through.by_modality["text"](raw["text"]))
    assert not any("structure" in name for name, _ in through.named_parameters())
    both = Projections(widths, 5, 4, 0.0, "mlp")
    assert torch.equal(
        both({"text": raw["text"], "structure": raw["structure"]})[0], both.by_modality["structure"](raw["structure"])
    )


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recomputed_experts_give_the_same_gradients_and_draw_the_same_dropout(dropout):
    found = []
    for recompute in (False, True):
        experts = Experts(2, 3, 8, dropout, True, torch.Generator().manual_seed(0), recompute)
        with torch.no_grad():
            experts.second_LDD.normal_(generator=torch.Generator().manual_seed(1))
        x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
        torch.manual_seed(3)
        views = experts(x)
        torch.rand(7)  # what is drawn in between does not change what is drawn again
        views.square().sum().backward()
        found.append([views.detach(), x.grad, *(p.grad for p in experts.parameters())])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_recomputed_experts_keep_no_hidden_layer():
    def kept(recompute: bool) -> int:
        experts = Experts(2, 3, 8, 0.0, False, torch.Generator().manual_seed(0), recompute)
        sizes: dict[int, int] = {}

        def pack(value: torch.Tensor) -> torch.Tensor:
            sizes[value.data_ptr()] = value.numel()
            return value

        parameters = {p.data_ptr() for p in experts.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            experts(torch.randn(2, 50, 8).requires_grad_())
        return sum(size for address, size in sizes.items() if address not in parameters)

    assert kept(False) >= 2 * 50 * 8 + 2 * 3 * 50 * 8
    assert kept(True) <= 2 * 50 * 8


# Neighbours of a bfloat16 number are 2^-8 of it apart: rounding moves it by at most half of that.
HALF_DIGIT = 2**-9


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_bfloat16_products_round_what_they_multiply_and_nothing_else(residual, recompute):
    """Views and gradients are float32's up to roundings; in evaluation they are float32's bit for bit."""
    gen = torch.Generator().manual_seed(2)
    x_MUD, grad_out = torch.randn(M, 300, D, generator=gen), torch.randn(M, K, 300, D, generator=gen)
    found = {}
    for precision in (torch.float32, torch.bfloat16):
        module = Experts(M, K, D, 0.0, residual, torch.Generator().manual_seed(0), recompute, precision)
        with torch.no_grad():
            module.second_LDD.add_(
                torch.randn(module.second_LDD.shape, generator=torch.Generator().manual_seed(1)) * 0.3
            )
        leaf = x_MUD.clone().requires_grad_()
        views = module(leaf)
        (views * grad_out).sum().backward()
        found[precision] = [views.detach(), leaf.grad, *(p.grad for p in module.parameters())]
        found[precision].append(module.eval()(x_MUD).detach())
    *exact, evaluated = found[torch.float32]
    *rounded, same = found[torch.bfloat16]
    assert torch.equal(same, evaluated)
    assert not torch.equal(rounded[0], exact[0])
    for value, expected in zip(rounded, exact, strict=True):
        assert value.dtype == torch.float32
        # Inputs, weights, hidden units, outputs and gradients, each by half a digit; a hidden unit near 0 that turns on
        # or off moves a gradient by all of its share.
        assert (value - expected).norm() <= 32 * HALF_DIGIT * expected.norm()


def test_bfloat16_projections_are_float32_up_to_roundings_and_in_evaluation_equal():
    raw_UF = torch.randn(200, 30, generator=torch.Generator().manual_seed(3)) * 3 + 1
    found = {}
    for precision in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        layer = Projection(30, 20, 10, 0.0, precision)
        layer.set_statistics(raw_UF.mean(0), raw_UF.std(0))
        out = layer(raw_UF)
        out.square().sum().backward()
        found[precision] = [out.detach(), *(p.grad for p in layer.parameters()), layer.eval()(raw_UF).detach()]
    *exact, evaluated = found[torch.float32]
    *rounded, same = found[torch.bfloat16]
    assert torch.equal(same, evaluated)
    for value, expected in zip(rounded, exact, strict=True):
        assert value.dtype == torch.float32
        assert (value - expected).norm() <= 16 * HALF_DIGIT * expected.norm()


def test_divided_experts_have_the_views_and_gradients_of_the_whole():
    whole = experts(True)
    divided = whole.divided()
    assert [len(list(own.parameters())) for own in divided.by_modality] == [4] * M
    x_MUD = torch.randn(M, U, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = []
    for module in (whole, divided):
        leaf = x_MUD.clone().requires_grad_()
        views = module(leaf)
        (views * torch.arange(views.numel()).view_as(views)).sum().backward()
        found.append((views, leaf.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    for name, p in whole.named_parameters():
        stacked = torch.cat([own.get_parameter(name).grad for own in divided.by_modality])
        torch.testing.assert_close(stacked, p.grad)
