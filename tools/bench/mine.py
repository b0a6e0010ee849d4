"""All pairs' information estimates at once against a loop of per-pair networks: `python -m tools.bench.mine [--quick]`.

The loop is the usual form of MINE: each pair has its network on concatenated views, called on the joint and on the
marginal rows. Both train on one half of the rows and estimate on the other, forward and backward, with equal weights;
parity of estimates, loss and gradients is checked first. M K (K - 1) / 2 pairs of experts and M (M - 1) / 2 pairs of
modalities. `speedup` compares the form that training takes, eager on a CPU and one graph on CUDA, with the loop, both
float32. Peak extra memory is measured in a fresh process for each form.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from mocme_dist.memory import keep_pages
from mocme_dist.model.mine import Mine, pairs_between, pairs_within
from mocme_dist.model.mocme import alone
from tools.bench.common import DEVICE, finish, measure, peak_added_mb, row

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
    place_V = torch.arange(view_SVD.shape[1], device=view_SVD.device)
    partner_V = torch.empty_like(place_V)
    for half_V in (place_V[held_out_V], place_V[~held_out_V]):
        partner_V[half_V] = half_V.roll(-1)
    estimates, total = [], torch.zeros((), device=view_SVD.device)
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


def batched_step(
    mines: list[Mine], views: list[Tensor], presents: list[Tensor], held_out_V: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """The same by `Mine`, its moving averages and statistics included; one backward pass for all, as in training."""
    found = [
        mine(view, present, held_out_V, alone, True, CLIP)
        for mine, view, present in zip(mines, views, presents, strict=True)
    ]
    torch.stack([one.loss for one in found]).sum().backward()
    return [(one.information_P, one.loss.detach()) for one in found]


def clear(module: nn.Module) -> None:
    """Gradients and moving averages as before the first step."""
    module.zero_grad()
    if isinstance(module, Mine):
        module.mean_exp_P.zero_()
        module.num_updates.zero_()
        module.center_SD.zero_()
        module.deviation_SD.fill_(1)


def peak_extra_mb(args: argparse.Namespace, form: str) -> float:
    """Peak memory in MB that a step of one form adds, in a process of its own."""
    command = [sys.executable, "-m", "tools.bench.mine", "--child", form]
    for name in ("rows", "modalities", "experts", "width", "hidden"):
        command += [f"--{name}", str(getattr(args, name))]
    return float(
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    )


def main() -> None:
    """Parse, check parity, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--modalities", type=int, default=3)
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="fewer repeats of the loop")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    M, K, V, D = args.modalities, args.experts, args.rows, args.width
    generator = torch.Generator().manual_seed(0)
    shapes = ((M * K, pairs_within(M, K)), (M, pairs_between(M)))
    forms: dict[str, dict[str, Any]] = {"torch": {}}
    if DEVICE.type == "cuda":
        forms["compiled"] = {"compiled": True}
    ours = list(forms)[-1]
    cases = []
    for num_views, pairs in shapes:
        mines = {
            name: Mine(num_views, pairs, D, args.hidden, torch.Generator().manual_seed(1), **how).to(DEVICE)
            for name, how in forms.items()
        }
        networks = [PairNetwork(mines["torch"], p).to(DEVICE) for p in range(len(pairs))]
        views = torch.randn(num_views, V, D, generator=generator).to(DEVICE)
        cases.append((mines, networks, views, torch.ones(num_views, V, dtype=torch.bool, device=DEVICE)))
    held_out_V = torch.arange(V, device=DEVICE) % 2 == 1

    def loop() -> list[tuple[Tensor, Tensor]]:
        for mines, networks, _, _ in cases:
            clear(mines["torch"])
            for network in networks:
                network.zero_grad()
        return [loop_step(mines["torch"], networks, view, held_out_V) for mines, networks, view, _ in cases]

    def batched(form: str) -> list[tuple[Tensor, Tensor]]:
        mines = [case[0][form] for case in cases]
        for mine in mines:
            clear(mine)
        return batched_step(mines, [case[2] for case in cases], [case[3] for case in cases], held_out_V)

    if args.child:
        # The first call compiles and warms up; the mark of the peak is then reset.
        step = loop if args.child == "loop" else lambda: batched(args.child)
        step()
        print(json.dumps(peak_added_mb(step)))
        return
    keep_pages()  # as a training process does
    expected, parity = loop(), True
    for form in forms:
        for (information, loss), (plain, plain_loss), (mines, networks, _, _) in zip(
            batched(form), expected, cases, strict=True
        ):
            parity &= torch.allclose(information, plain, rtol=1e-4, atol=1e-4)
            parity &= torch.allclose(loss, plain_loss, rtol=1e-4, atol=1e-4)
            for p, network in enumerate(networks):
                found, wanted = mines[form].networks.second_PHH.grad[p], network.second.weight.grad.T  # type: ignore[index, union-attr]
                parity &= bool((found - wanted).norm() <= 1e-3 * wanted.norm())
    repeats = 7 if args.quick else 20
    ms = {"loop": measure(loop, 2, repeats)}
    ms |= {name: measure(lambda name=name: batched(name), 3, 20) for name in forms}  # type: ignore[misc]
    print("\n".join(f"{name:15s}{median:9.2f} ms (p90 {p90:.2f})" for name, (median, p90) in ms.items()))
    # Each in a process of its own; a GPU's memory is counted by process, a CPU's figures are taken one by one.
    with ThreadPoolExecutor(len(forms) + 1 if DEVICE.type == "cuda" else 1) as pool:
        mb = dict(
            zip(("loop", *forms), pool.map(lambda name: peak_extra_mb(args, name), ("loop", *forms)), strict=True)
        )
    rows = [
        row("speedup", ms["loop"][0] / ms[ours][0], "x"),
        row("memory_ratio", mb[ours] / mb["loop"], f"{ours} / loop"),
        *(row(f"{name}_ms", median, "ms") for name, (median, _) in ms.items()),
        *(row(f"{name}_mb", value, "MB") for name, value in mb.items()),
    ]
    finish("mine", parity, rows, shapes={"M": M, "K": K, "V": V, "D": D, "hidden": args.hidden})


if __name__ == "__main__":
    main()
