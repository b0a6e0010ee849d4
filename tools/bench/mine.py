"""All pairs' information estimates at once against a loop of per-pair networks: `python -m tools.bench.mine [--quick]`.

The loop is the usual form of MINE: each pair has its network on concatenated views, called on the joint and on the
marginal rows. Both train on one half of the rows and estimate on the other, forward and backward, with equal weights;
parity of estimates, loss and gradients is checked first. M K (K - 1) / 2 pairs of experts and M (M - 1) / 2 pairs of
modalities. `speedup` is of the form that training takes: eager on a CPU, compiled on CUDA.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from mocme_dist.model.mine import Mine, pairs_between, pairs_within
from mocme_dist.model.mocme import alone
from tools.bench.common import finish, measure, row

CLIP = 10.0


class PairNetwork(nn.Module):
    """The statistics network of one pair, with the weights that the batched form has for it."""

    def __init__(self, mine: Mine, pair: int) -> None:
        super().__init__()
        networks, H = mine.networks, mine.networks.first_bias_PH.shape[1]
        left, right = int(networks.left_P[pair]), int(networks.right_P[pair])
        D = networks.sides_SDH.shape[1]
        self.first, self.second, self.last = nn.Linear(2 * D, H), nn.Linear(H, H), nn.Linear(H, 1, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.cat([networks.sides_SDH[left, :, :H], networks.sides_SDH[right, :, H:]]).T)
            self.first.bias.copy_(networks.first_bias_PH[pair])
            self.second.weight.copy_(networks.second_PHH[pair].T)
            self.second.bias.copy_(networks.second_bias_PH[pair])
            self.last.weight.copy_(networks.last_PH[pair][None])

    def forward(self, left_VD: Tensor, right_VD: Tensor) -> Tensor:
        """(V,) T of pairs of rows."""
        hidden_VH = torch.relu(self.first(torch.cat([left_VD, right_VD], 1)))
        return self.last(torch.relu(self.second(hidden_VH)))[:, 0]


def loop_step(mine: Mine, networks: list[PairNetwork], view_SVD: Tensor, held_out_V: Tensor) -> tuple[Tensor, Tensor]:
    """Estimates (P,) and the summed loss, backward done, one pair at a time."""
    view_SVD = mine.standardise(view_SVD)
    place_V = torch.arange(view_SVD.shape[1])
    partner_V = torch.empty_like(place_V)
    for half_V in (place_V[held_out_V], place_V[~held_out_V]):
        partner_V[half_V] = half_V.roll(-1)
    estimates, total = [], torch.zeros(())
    for p, network in enumerate(networks):
        left_VD, right_VD = view_SVD[int(mine.networks.left_P[p])], view_SVD[int(mine.networks.right_P[p])]
        joint_V, marginal_V = network(left_VD, right_VD), network(left_VD, right_VD[partner_V])
        with torch.no_grad():
            mean_exp = marginal_V[held_out_V].clamp(-CLIP, CLIP).exp().mean()
            estimates.append((joint_V[held_out_V].mean() - mean_exp.log()).clamp_min(0))
            exp_V = marginal_V[~held_out_V].clamp(-CLIP, CLIP).exp()
            average = exp_V.mean()  # the first step of a moving average is the value itself
        pushed_V = exp_V * (1 + marginal_V[~held_out_V] - marginal_V[~held_out_V].detach())
        loss = -(joint_V[~held_out_V].mean() - pushed_V.mean() / average)
        loss.backward()
        total += loss.detach()
    return torch.stack(estimates), total


def batched_step(mine: Mine, view_SVD: Tensor, present_SV: Tensor, held_out_V: Tensor) -> tuple[Tensor, Tensor]:
    """The same by `Mine`, its moving averages and statistics included."""
    found = mine(view_SVD, present_SV, held_out_V, alone, True, CLIP)
    found.loss.backward()
    return found.information_P, found.loss.detach()


def clear(module: nn.Module) -> None:
    """Gradients and moving averages as before the first step."""
    module.zero_grad()
    if isinstance(module, Mine):
        module.mean_exp_P.zero_()
        module.num_updates.zero_()
        module.center_SD.zero_()
        module.deviation_SD.fill_(1)


def main() -> None:
    """Parse, check parity, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--modalities", type=int, default=3)
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="fewer repeats of the loop")
    args = parser.parse_args()
    M, K, V, D = args.modalities, args.experts, args.rows, args.width
    generator = torch.Generator().manual_seed(0)
    cases = []
    for num_views, pairs in ((M * K, pairs_within(M, K)), (M, pairs_between(M))):
        forms = [Mine(num_views, pairs, D, args.hidden, torch.Generator().manual_seed(1), compiled) for compiled in (False, True)]
        networks = [PairNetwork(forms[0], p) for p in range(len(pairs))]
        cases.append((forms, networks, torch.randn(num_views, V, D, generator=generator), torch.ones(num_views, V, dtype=torch.bool)))
    held_out_V = torch.arange(V) % 2 == 1

    def loop() -> list[tuple[Tensor, Tensor]]:
        for (plain, _), networks, _, _ in cases:
            clear(plain)
            for network in networks:
                network.zero_grad()
        return [loop_step(forms[0], networks, view, held_out_V) for forms, networks, view, _ in cases]

    def batched(compiled: bool) -> list[tuple[Tensor, Tensor]]:
        for forms, _, _, _ in cases:
            clear(forms[compiled])
        return [batched_step(forms[compiled], view, present, held_out_V) for forms, _, view, present in cases]

    expected, parity = loop(), True
    for compiled in (False, True):
        for (information, loss), (plain, plain_loss), (forms, networks, _, _) in zip(batched(compiled), expected, cases, strict=True):
            parity &= torch.allclose(information, plain, rtol=1e-4, atol=1e-5) and torch.allclose(loss, plain_loss, rtol=1e-4, atol=1e-4)
            for p, network in enumerate(networks):
                found, wanted = forms[compiled].networks.second_PHH.grad[p], network.second.weight.grad.T  # type: ignore[index, union-attr]
                parity &= bool((found - wanted).abs().max() <= 1e-3 * wanted.abs().max())
    loop_ms, loop_p90 = measure(loop, 1, 5 if args.quick else 20)
    eager_ms, _ = measure(lambda: batched(False), 3, 20)
    compiled_ms, compiled_p90 = measure(lambda: batched(True), 3, 20)
    print(f"loop {loop_ms:.2f} ms (p90 {loop_p90:.2f}), batched {eager_ms:.2f} ms, compiled {compiled_ms:.2f} ms (p90 {compiled_p90:.2f})")
    rows = [
        row("speedup", loop_ms / (compiled_ms if torch.cuda.is_available() else eager_ms), "x", ">= 10"),
        row("compiled_speedup", loop_ms / compiled_ms, "x"),
        row("eager_speedup", loop_ms / eager_ms, "x"),
        row("loop_ms", loop_ms, "ms"),
        row("compiled_ms", compiled_ms, "ms"),
    ]
    finish("mine", parity, rows, shapes={"M": M, "K": K, "V": V, "D": D, "hidden": args.hidden})


if __name__ == "__main__":
    main()
