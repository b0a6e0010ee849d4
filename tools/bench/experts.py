"""All experts as batched products against a list of modules, forward and backward.

`python -m tools.bench.experts [--quick]`.

The module list is the usual form: M K times Linear-ReLU-Linear, each called on its modality's input, results stacked.
Parity first, with equal weights: views and the gradients of input and weights. `speedup` compares float32 with float32
(eager on a CPU, compiled on CUDA), `both_bfloat16_speedup` train.precision=bfloat16 with the list under torch's
autocast to bfloat16, and `bfloat16_over_float32` the batched form with itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mocme_dist.memory import keep_pages
from mocme_dist.model.compile import one_graph
from mocme_dist.model.experts import Experts
from tools.bench.common import DEVICE, finish, measure, row


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


def run(
    forward: Callable[[Tensor], Tensor], x_MUD: Tensor, slope_MKUD: Tensor, parameters: list[nn.Parameter]
) -> list[Tensor]:
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
    keep_pages()  # as a training process does
    generator = torch.Generator().manual_seed(0)
    experts = Experts(M, K, D, 0.0, False, generator).to(DEVICE)
    lower = Experts(M, K, D, 0.0, False, generator, precision=torch.bfloat16).to(DEVICE)
    lower.load_state_dict(experts.state_dict())
    plain = module_list(experts).to(DEVICE)
    x_MUD, slope = (torch.randn(*shape, generator=generator).to(DEVICE) for shape in ((M, U, D), (M, K, U, D)))

    def listed(x_MUD: Tensor) -> Tensor:
        return torch.stack([torch.stack([plain[m * K + k](x_MUD[m]) for k in range(K)]) for m in range(M)])

    def listed_low(x_MUD: Tensor) -> Tensor:
        with torch.autocast(x_MUD.device.type, torch.bfloat16):
            return listed(x_MUD).float()

    forms: dict[str, tuple[Callable[[Tensor], Tensor], list[nn.Parameter]]] = {
        "list": (listed, list(plain.parameters())),
        "list_bfloat16": (listed_low, list(plain.parameters())),
        "batched": (experts, list(experts.parameters())),
        "batched_bfloat16": (lower, list(lower.parameters())),
    }
    if DEVICE.type == "cuda":  # as training encodes there
        for name, form in (("batched", experts), ("batched_bfloat16", lower)):
            graph = one_graph(batched)
            forms[name] = (lambda x, graph=graph, form=form: graph(form, x), list(form.parameters()))  # type: ignore[misc]
    found = {name: run(forward, x_MUD, slope, parameters) for name, (forward, parameters) in forms.items()}
    parity = True
    expected: tuple[Tensor, ...] = ()
    for name, (views, grad_x, grad_first, _, grad_second, *_) in found.items():
        if name.startswith("list"):
            grads = found[name][2::2]
            grad_first = torch.stack([g.T for g in grads[::2]]).view(M, K, D, D).transpose(1, 2).reshape(M, D, K * D)
            grad_second = torch.stack([g.T for g in grads[1::2]])
        these = (views, grad_x, grad_first, grad_second)
        expected = these if name == "list" else expected
        # bfloat16 has an 8-bit mantissa; inputs, weights, hidden units and slopes are rounded, and units near 0 turn on
        # or off.
        digits = 32 * 2**-9 if "bfloat16" in name else 1e-4
        parity &= all(bool((a - b).norm() <= digits * b.norm()) for a, b in zip(these, expected, strict=True))
    repeats = 7 if args.quick else 20
    ms = {}
    for name, (forward, parameters) in forms.items():
        ms[name], p90 = measure(lambda f=forward, p=parameters: run(f, x_MUD, slope, p), 3, repeats)  # type: ignore[misc]
        print(f"{name:19s}{ms[name]:9.2f} ms (p90 {p90:.2f})")
    gflop = 3 * 2 * 2 * M * K * U * D * D / 1e9
    rows = [
        row("speedup", ms["list"] / ms["batched"], "x, both float32"),
        row("both_bfloat16_speedup", ms["list_bfloat16"] / ms["batched_bfloat16"], "x, both bfloat16"),
        row("bfloat16_over_float32", ms["batched"] / ms["batched_bfloat16"], "x, the batched form"),
        *(row(f"{name}_ms", value, "ms") for name, value in ms.items()),
        row("gflops", gflop / ms["batched"] * 1e3, "GFLOP/s"),
        row("bfloat16_gflops", gflop / ms["batched_bfloat16"] * 1e3, "GFLOP/s"),
    ]
    finish("experts", parity, rows, shapes={"M": M, "K": K, "U": U, "D": D})


if __name__ == "__main__":
    main()
