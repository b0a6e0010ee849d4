"""Complementarity weights against plain loops; absence, scopes, estimators, and where gradients go."""

from __future__ import annotations

import itertools

import pytest
import torch
from plain_settings import FUSION
from torch import Tensor

from mocme_dist.model.fusion import Fused, Fusion, mean_over_siblings
from mocme_dist.model.mine import Halves

M, K, V, D = 3, 2, 16, 6
ESTIMATORS = ("uniform", "cosine", "attention", "mine")
EVERY = list(itertools.product(ESTIMATORS, ("global", "entity"), ("stop", "flow")))


def one(value: Tensor) -> Tensor:
    return value


def fusion(
    estimator: str, scope: str = "global", flow: str = "stop", num_modalities: int = M, **settings: float
) -> Fusion:
    how = {"estimator": estimator, "scope": scope, "weight_gradient": flow, "hidden": 8, **settings}
    chosen = FUSION._replace(**how)
    return Fusion(num_modalities, K, D, chosen, torch.Generator().manual_seed(0))


def case(seed: int = 1, num_modalities: int = M) -> tuple[Tensor, Tensor, Tensor]:
    """Views, who has what (entity 0 nothing, entity 1 one modality), and the held-out half."""
    gen = torch.Generator().manual_seed(seed)
    view = torch.randn(num_modalities, K, V, D, generator=gen)
    view[0, 1] = view[0, 0] + 0.3 * torch.randn(V, D, generator=gen)  # the experts of modality 0 say nearly the same
    present = torch.rand(num_modalities, V, generator=gen) < 0.7
    present[:, 0] = False
    present[:, 1] = torch.arange(num_modalities) == 1
    return view, present, torch.arange(V) % 2 == 1


def train(module: Fusion, steps: int = 12) -> None:
    """A few steps of the networks, so that weights are no longer equal."""
    parameters = list(module.parameters())
    adam = torch.optim.Adam(parameters, lr=0.02) if parameters else None
    for step in range(steps):
        fused = module(*case(step), one, True)
        if adam is not None and fused.loss.requires_grad:
            adam.zero_grad()
            fused.loss.backward()
            adam.step()
    module.zero_grad()


@pytest.mark.parametrize(("estimator", "scope", "flow"), EVERY)
def test_weights_sum_to_one_over_what_is_present(estimator, scope, flow):
    module = fusion(estimator, scope, flow)
    for estimate in (False, True, True, False):
        view, present, held_out = case()
        fused = module(view, present, held_out, one, estimate)
        has = present.any(0)
        torch.testing.assert_close(fused.inter_VM.sum(1), has.float())
        assert (fused.inter_VM[~present.T] == 0).all()
        assert (fused.inter_VM[present.T] > 0).all()
        torch.testing.assert_close(fused.intra_MK.sum(1), torch.ones(M))
        assert torch.isfinite(fused.z_VD).all()
        assert (fused.z_VD[~has] == 0).all()
        assert torch.isfinite(fused.loss)
        # One modality alone weighs 1, whatever its redundancy.
        torch.testing.assert_close(fused.inter_VM[1], torch.eye(M)[1])


@pytest.mark.parametrize(("estimator", "scope", "flow"), EVERY)
@pytest.mark.parametrize("estimate", [True, False])
def test_what_an_absent_modality_holds_does_not_matter(estimator, scope, flow, estimate):
    results = []
    for garbage in (0.0, 1e4):
        module = fusion(estimator, scope, flow)
        train(module, 2)
        view, present, held_out = case()
        view = torch.where(present[:, None, :, None], view, torch.full_like(view, garbage)).requires_grad_()
        fused = module(view, present, held_out, one, estimate)
        (fused.z_VD.square().sum() + fused.loss).backward()
        results.append((fused, view.grad, [p.grad for p in module.parameters()], dict(module.named_buffers())))
    (one_fused, one_grad, one_own, one_state), (two_fused, two_grad, two_own, two_state) = results
    torch.testing.assert_close(one_fused.z_VD, two_fused.z_VD)
    torch.testing.assert_close(one_fused.loss, two_fused.loss)
    torch.testing.assert_close(one_fused.inter_VM, two_fused.inter_VM)
    torch.testing.assert_close(one_fused.intra_MK, two_fused.intra_MK)
    torch.testing.assert_close(one_grad, two_grad)
    for first, second in zip(one_own, two_own, strict=True):
        torch.testing.assert_close(first, second)
    for name, value in one_state.items():
        torch.testing.assert_close(value, two_state[name], msg=name)


def test_uniform_weights_are_the_mean_of_means():
    view, present, held_out = case()
    fused = fusion("uniform")(view, present, held_out, one, True)
    for v in range(V):
        has = [m for m in range(M) if present[m, v]]
        expected = torch.stack([view[m, :, v].mean(0) for m in has]).mean(0) if has else torch.zeros(D)
        torch.testing.assert_close(fused.z_VD[v], expected)


def softmax(values: list[float]) -> list[float]:
    return torch.tensor(values).softmax(0).tolist()


def plain_global(view: Tensor, present: Tensor, intra: dict, inter: dict, scale: float) -> Tensor:
    """z by loops, from the information of each pair of experts (m, j, k) and of modalities (m, n)."""
    z = torch.zeros(V, D)
    for v in range(V):
        mixed = {}
        for m in range(M):
            if present[m, v]:
                redundancy = [
                    sum(intra[m, min(j, k), max(j, k)] for j in range(K) if j != k) / (K - 1) for k in range(K)
                ]
                weight = softmax([-r / scale for r in redundancy])
                mixed[m] = sum(w * view[m, k, v] for k, w in enumerate(weight))
        if mixed:
            has = list(mixed)
            others = {m: [inter[min(m, n), max(m, n)] for n in has if n != m] for m in has}
            weight = softmax([-sum(others[m]) / max(1, len(others[m])) / scale for m in has])
            z[v] = sum(w * mixed[m] for m, w in zip(has, weight, strict=True))
    return z


@pytest.mark.parametrize("normalize", [True, False])
def test_global_weights_are_softmaxes_of_mean_redundancy(normalize):
    """Information planted in the buffers; the mean runs over the siblings that the entity has."""
    module = fusion("mine", normalize=normalize, temperature=0.5)
    gen = torch.Generator().manual_seed(5)
    intra = {(m, 0, 1): value for m, value in enumerate(torch.rand(3, generator=gen).tolist())}
    inter = dict(zip([(0, 1), (0, 2), (1, 2)], (torch.rand(3, generator=gen) * 4).tolist(), strict=True))
    for pairs, planted in ((module.intra, intra), (module.inter, inter)):
        pairs.information_P.copy_(torch.tensor(list(planted.values())))
        pairs.log_n_P.fill_(2.0)
        pairs.seen_P.fill_(1.0)
    view, present, held_out = case()
    fused = module(view, present, held_out, one, False)
    scale = 0.5 * (2.0 if normalize else 1.0)
    torch.testing.assert_close(fused.z_VD, plain_global(view, present, intra, inter, scale))


def test_cosine_of_each_entity_weighs_by_loops():
    module = fusion("cosine", "entity", temperature=0.3)
    view, present, held_out = case()
    fused = module(view, present, held_out, one, True)
    cosine = torch.nn.functional.cosine_similarity
    for v in range(V):
        has = [m for m in range(M) if present[m, v]]
        # With two experts there is one pair, and both weigh the same.
        mixed = {m: view[m, :, v].mean(0) for m in has}
        if not has:
            continue
        redundancy = [[cosine(mixed[m], mixed[n], 0).item() for n in has if n != m] for m in has]
        weight = softmax([-sum(r) / max(1, len(r)) / 0.3 for r in redundancy])
        torch.testing.assert_close(fused.inter_VM[v, has], torch.tensor(weight))
        torch.testing.assert_close(fused.z_VD[v], sum(w * mixed[m] for m, w in zip(has, weight, strict=True)))


def test_the_average_of_cosines_is_that_of_the_entities_with_both():
    module = fusion("cosine", ema=0.75)
    expected = None
    for seed in (1, 2, 3):
        view, present, held_out = case(seed)
        module(view, present, held_out, one, True)
        similarity = torch.nn.functional.cosine_similarity(view[1, 0, present[1]], view[1, 1, present[1]], -1).mean()
        fresh = torch.stack([similarity, present[1].sum().log()])
        expected = fresh if expected is None else 0.75 * expected + 0.25 * fresh
        torch.testing.assert_close(torch.stack([module.intra.information_P[1], module.intra.log_n_P[1]]), expected)


def test_weights_use_the_averages_of_the_steps_before():
    module = fusion("mine", ema=0.0)
    first = module(*case(1), one, True)
    torch.testing.assert_close(first.intra_MK, torch.full((M, K), 0.5))
    train(module, 8)
    before = {name: value.clone() for name, value in module.named_buffers()}
    training = module(*case(3), one, True)
    assert any(not torch.equal(value, before[name]) for name, value in module.named_buffers())
    for name, value in module.named_buffers():
        value.copy_(before[name])
    evaluation = module(*case(3), one, False)
    torch.testing.assert_close(training.z_VD, evaluation.z_VD)
    for name, value in module.named_buffers():
        assert torch.equal(value, before[name]), name


def test_a_redundant_modality_weighs_less_with_mine():
    """Modalities 0 and 1 are copies, 2 stands alone: it gets the largest weight, and copies share theirs."""
    module = fusion("mine", temperature=0.2)
    adam = torch.optim.Adam(module.parameters(), lr=0.01)
    present = torch.ones(M, 256, dtype=torch.bool)
    held_out = torch.arange(256) % 2 == 1
    for step in range(120):
        view = torch.randn(M, 1, 256, D, generator=torch.Generator().manual_seed(step)).expand(M, K, 256, D).clone()
        view[1] = view[0]
        fused = module(view, present, held_out, one, True)
        adam.zero_grad()
        fused.loss.backward()
        adam.step()
    assert module.inter.information_P[0] > 1.0
    assert (module.inter.information_P[1:] < 0.2).all()
    assert fused.inter_M[2] > 0.6
    assert fused.inter_M[0].item() == pytest.approx(fused.inter_M[1].item(), abs=0.05)


@pytest.mark.parametrize("scope", ["global", "entity"])
@pytest.mark.parametrize("normalize", [True, False])
def test_before_the_first_estimate_mine_weighs_all_alike(scope, normalize):
    module = fusion("mine", scope, normalize=normalize)
    view, present, held_out = case()
    for estimate in (False, True):
        fused = module(view, present, held_out, one, estimate)
        expected = present / present.sum(0).clamp_min(1)
        torch.testing.assert_close(fused.inter_VM, expected.T.float())
        torch.testing.assert_close(fused.intra_MK[present.any(1)], torch.full((M, K), 0.5))


def completion(fused: Fused) -> Tensor:
    """Stands for the completion loss: anything differentiable of z."""
    return torch.sin(fused.z_VD * torch.arange(1.0, D + 1)).sum()


@pytest.mark.parametrize(("estimator", "scope", "flow"), EVERY)
def test_the_completion_loss_reaches_the_networks_never_and_the_views_through_weights_where_it_flows(
    estimator, scope, flow
):
    module = fusion(estimator, scope, flow)
    train(module)
    view, present, held_out = case(99)
    view.requires_grad_()
    fused = module(view, present, held_out, one, True)
    completion(fused).backward()
    for name, parameter in module.named_parameters():
        if ".mine." in name:
            assert parameter.grad is None or (parameter.grad == 0).all(), name
        else:  # attention's queries do learn from it
            assert parameter.grad.abs().sum() > 0, name
    if estimator == "attention":
        return
    # The gradient with the weights held fixed, from the weights that the pass used.
    fixed = view.detach().clone().requires_grad_()
    # With two experts a modality has one pair, so both weigh 1/2 at every scope.
    completion(fused._replace(z_VD=torch.einsum("vm,mvd->vd", fused.inter_VM.detach(), fixed.mean(1)))).backward()
    through = (view.grad - fixed.grad).abs().max().item()
    if flow == "flow" and estimator in ("mine", "cosine"):
        assert through > 1e-4
    else:
        assert through < 1e-6


@pytest.mark.parametrize("estimator", ["mine", "cosine"])
def test_flowing_entity_weights_have_the_gradient_of_finite_differences(estimator):
    module = fusion(estimator, "entity", "flow", temperature=0.5)
    train(module)
    view, present, held_out = case(98)
    view.requires_grad_()
    completion(module(view, present, held_out, one, False)).backward()
    for place in [(0, 0, 2, 1), (1, 1, 5, 0), (2, 0, 9, 3), (1, 0, 11, 4)]:
        step = torch.zeros_like(view)
        step[place] = 1e-2
        with torch.no_grad():
            high, low = (completion(module(view + sign * step, present, held_out, one, False)) for sign in (1, -1))
        assert view.grad[place].item() == pytest.approx(((high - low) / 2e-2).item(), rel=0.05, abs=5e-3)


def test_mean_over_siblings_equals_a_loop():
    gen = torch.Generator().manual_seed(0)
    pairs = [(0, 1), (0, 3), (1, 3), (2, 3)]
    left, right = (torch.tensor(side) for side in zip(*pairs, strict=True))
    value, present = torch.randn(4, 7, generator=gen), torch.rand(4, 7, generator=gen) < 0.6
    found = mean_over_siblings(value, left, right, 5, present)
    for s in range(5):
        for v in range(7):
            own = [value[p, v].item() for p, pair in enumerate(pairs) if s in pair and present[p, v]]
            assert found[s, v].item() == pytest.approx(sum(own) / len(own) if own else 0.0, abs=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("scope", ["global", "entity"])
def test_one_modality_with_one_expert_needs_no_weights(estimator, scope):
    module = Fusion(1, 1, D, FUSION._replace(estimator=estimator, scope=scope), torch.Generator().manual_seed(0))
    view = torch.randn(1, 1, V, D)
    fused = module(view, torch.ones(1, V, dtype=torch.bool), torch.arange(V) % 2 == 1, one, True)
    torch.testing.assert_close(fused.z_VD, view[0, 0])
    assert fused.loss == 0


@pytest.mark.parametrize(("estimator", "scope", "flow"), EVERY)
def test_a_rank_without_rows_takes_part(estimator, scope, flow):
    module = fusion(estimator, scope, flow)
    view = torch.zeros(M, K, 0, D, requires_grad=True)
    fused = module(view, torch.zeros(M, 0, dtype=torch.bool), torch.zeros(0, dtype=torch.bool), one, True)
    (fused.z_VD.sum() + fused.loss).backward()
    assert fused.z_VD.shape == (0, D)
    assert torch.isfinite(fused.loss)
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())


def test_a_sample_of_rows_keeps_both_halves():
    module = fusion("mine", rows=4)
    sizes = []
    original = module.inter.mine.forward

    def spy(view: Tensor, present: Tensor, halves: Halves, *rest: object) -> object:
        sizes.append((view.shape[1], present.shape[1], len(halves.held_out_H)))
        return original(view, present, halves, *rest)

    module.inter.mine.forward = spy
    view, _, held_out = case()
    module(view, torch.ones(M, V, dtype=torch.bool), held_out, one, True)
    ((rows, masks, held),) = sizes
    assert rows == masks
    assert 2 <= rows <= 4
    assert 0 < held < rows
