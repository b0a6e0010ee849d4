"""All experts as batched products against a list of modules, forward and backward: `python -m tools.bench.experts [--quick]`.

The module list is the usual form: M K times Linear-ReLU-Linear, each called on its modality's input, results stacked.
Parity first, with equal weights: views and the gradients of input and weights. `speedup` is of the form that
training takes: eager on a CPU, compiled on CUDA; both are shown.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mocme_dist.model.experts import Experts
from mocme_dist.model.graphs import one_graph
from tools.bench.common import finish, measure, row


def module_list(experts: Experts) -> nn.ModuleList:
    """The same experts as modules of their own."""
    M, D, H = experts.first_MDH.shape
    K = H // D
    modules = nn.ModuleList()
    with torch.no_grad():
        for m in range(M):
            for k in range(K):
                first, second = nn.Linear(D, D), nn.Linear(D, D)
                first.weight.copy_(experts.first_MDH[m, :, k * D : (k + 1) * D].T)
                first.bias.copy_(experts.first_bias_MH[m, k * D : (k + 1) * D])
                second.weight.copy_(experts.second_LDD[m * K + k].T)
                second.bias.copy_(experts.second_bias_LD[m * K + k])
                modules.append(nn.Sequential(first, nn.ReLU(), second))
    return modules


def batched(experts: Experts, x_MUD: Tensor) -> Tensor:
    """Views (M, K, U, D) of the batched form; a plain function, for the compiler."""
    return experts(x_MUD)


def run(forward: Callable[[Tensor], Tensor], x_MUD: Tensor, slope_MKUD: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Views and gradients, those of the input first."""
    x_MUD = x_MUD.detach().requires_grad_()
    views = forward(x_MUD)
    return [views.detach(), *torch.autograd.grad(views, [x_MUD, *parameters], slope_MKUD)]


def main() -> None:
    """Parse, check parity, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--modalities", type=int, default=5)
    parser.add_argument("--experts", type=int, default=5)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    args = parser.parse_args()
    M, K, U, D = args.modalities, args.experts, args.rows, args.width
    generator = torch.Generator().manual_seed(0)
    experts = Experts(M, K, D, 0.0, False, generator)
    plain = module_list(experts)
    x_MUD, slope = torch.randn(M, U, D, generator=generator), torch.randn(M, K, U, D, generator=generator)
    forms: dict[str, tuple[Callable[[Tensor], Tensor], list[nn.Parameter]]] = {
        "list": (
            lambda x: torch.stack([torch.stack([plain[m * K + k](x[m]) for k in range(K)]) for m in range(M)]),
            list(plain.parameters()),
        ),
        "eager": (experts, list(experts.parameters())),
    }
    graph = one_graph(batched)
    forms["compiled"] = (lambda x: graph(experts, x), list(experts.parameters()))
    found = {name: run(forward, x_MUD, slope, parameters) for name, (forward, parameters) in forms.items()}
    first = torch.stack([g.T for g in found["list"][2::4]]).view(M, K, D, D).transpose(1, 2).reshape(M, D, K * D)
    expected = [*found["list"][:2], first, torch.stack([g.T for g in found["list"][4::4]])]
    parity = True
    for name in ("eager", "compiled"):
        views, grad_x, grad_first, _, grad_second, _ = found[name]
        pairs = zip((views, grad_x, grad_first, grad_second), expected, strict=True)
        parity &= all(bool((a - b).abs().max() <= 1e-4 * b.abs().max()) for a, b in pairs)
    repeats = 10 if args.quick else 20
    ms = {}
    for name, (forward, parameters) in forms.items():
        ms[name], p90 = measure(lambda f=forward, p=parameters: run(f, x_MUD, slope, p), 3, repeats)  # type: ignore[misc]
        print(f"{name:9s}{ms[name]:9.2f} ms (p90 {p90:.2f})")
    gflop = 3 * 2 * 2 * M * K * U * D * D / 1e9
    rows = [
        row("speedup", ms["list"] / ms["compiled" if torch.cuda.is_available() else "eager"], "x", ">= 2"),
        row("compiled_speedup", ms["list"] / ms["compiled"], "x"),
        row("eager_speedup", ms["list"] / ms["eager"], "x"),
        *(row(f"{name}_ms", value, "ms") for name, value in ms.items()),
        row("gflops", gflop / ms["compiled"] * 1e3, "GFLOP/s"),
    ]
    finish("experts", parity, rows, shapes={"M": M, "K": K, "U": U, "D": D})


if __name__ == "__main__":
    main()
