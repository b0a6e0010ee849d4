"""The compiled loss against its eager reference: `python -m tools.bench.loss [--quick]`.

Both compute forward and backward of the same batch: B queries in chunks that share N negatives. Parity is checked
first (values and gradients). Peak extra memory is measured in a fresh process for each of the two.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

import torch

from mocme_dist.config import Config
from mocme_dist.kernels import distance
from mocme_dist.kernels.distance import pool_distance
from mocme_dist.model.loss import completion_loss
from mocme_dist.training.build import loss_settings
from tools.bench.common import DEVICE, ceilings, finish, measure, peak_added_mb, replayed_ms, row


def make_batch(queries: int, negatives: int, width: int, chunk: int) -> dict[str, torch.Tensor]:
    """Random inputs of `completion_loss`, seeded."""
    generator = torch.Generator().manual_seed(0)
    groups = queries // chunk
    scale = 14 / width
    normal = lambda *shape: torch.randn(*shape, generator=generator) * scale  # noqa: E731
    batch = {
        "source_GbD": normal(groups, chunk, width).requires_grad_(),
        "phase_GbC": torch.randn(groups, chunk, width // 2, generator=generator).requires_grad_(),
        "sign_Gb": torch.randint(2, (groups, chunk), generator=generator).float() * 2 - 1,
        "target_GbD": normal(groups, chunk, width).requires_grad_(),
        "pool_GND": normal(groups, negatives, width).requires_grad_(),
        "allowed_GbN": torch.rand(groups, chunk, negatives, generator=generator) > 0.01,
        "weight_Gb": torch.ones(groups, chunk),
    }
    return {name: value.detach().to(DEVICE).requires_grad_(value.requires_grad) for name, value in batch.items()}


def run(batch: dict[str, torch.Tensor], compiled: bool, graphs: bool = False) -> tuple[torch.Tensor, ...]:
    """Loss and gradients of one batch."""
    config = Config()
    settings = loss_settings(config.train, config.negatives, config.rotate.gamma, compiled)
    settings = settings._replace(cuda_graphs=graphs)
    loss, _ = completion_loss(**batch, settings=settings)
    leaves = [value for value in batch.values() if value.requires_grad]
    return (loss.detach(), *torch.autograd.grad(loss, leaves))


def close(left: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...]) -> bool:
    """Equal to 1e-5 of each tensor's largest magnitude."""
    return all((a - b).abs().max() <= 1e-5 * b.abs().max() for a, b in zip(left, right, strict=True))


def peak_extra_mb(args: argparse.Namespace, compiled: bool) -> float:
    """Peak memory that one forward and backward adds, in MB, from a process of its own."""
    command = [sys.executable, "-m", "tools.bench.loss", "--child", str(int(compiled))]
    for name in ("queries", "negatives", "width", "chunk"):
        command += [f"--{name}", str(getattr(args, name))]
    return float(
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    )


def child(args: argparse.Namespace) -> None:
    """Measure this process's own peak around one call; the first call has compiled and warmed up on a small batch."""
    compiled = bool(args.child)
    batch = make_batch(args.queries, args.negatives, args.width, args.chunk)
    # On a CPU eager code warms up on a small batch: what it keeps of a large one would hide its peak.
    small = make_batch(args.chunk, 8, args.width, args.chunk) if DEVICE.type == "cpu" and not compiled else batch
    run(small, compiled)
    print(json.dumps(peak_added_mb(lambda: run(batch, compiled))))


def against_compile(batch: dict[str, torch.Tensor], repeats: int) -> tuple[bool, list[dict[str, object]]]:
    """On a CPU: distances and their gradients by distance.cpp against torch.compile alone, in turns.

    Whether they agree.
    """
    query_GbD, pool_GND = batch["source_GbD"].detach().requires_grad_(), batch["pool_GND"].detach().requires_grad_()
    slope_GbN = torch.randn(*query_GbD.shape[:2], pool_GND.shape[1])
    compiled = distance._compiled_distance()

    def gradients(distances: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (distances.detach(), *torch.autograd.grad(distances, (query_GbD, pool_GND), slope_GbN))

    forms = {
        "pool_cpp": lambda: gradients(pool_distance(query_GbD, pool_GND, True)),
        "pool_compile": lambda: gradients(compiled(query_GbD, pool_GND)),
    }
    parity = close(forms["pool_cpp"](), forms["pool_compile"]())
    turns = [{name: measure(form, 0, 1)[0] for name, form in forms.items()} for _ in range(repeats + 2)][2:]
    ms = {name: statistics.median(turn[name] for turn in turns) for name in forms}
    rows = [row("pool_over_compile", ms["pool_compile"] / ms["pool_cpp"], "x, distances and gradients alone")]
    return parity, rows + [row(f"{name}_ms", value, "ms") for name, value in ms.items()]


def kernel_rows(batch: dict[str, torch.Tensor], name: str = "") -> list[dict[str, object]]:
    """On CUDA: the kernels of distances alone, in one recorded graph."""
    query_GbD, pool_GND = batch["source_GbD"].detach().requires_grad_(), batch["pool_GND"].detach().requires_grad_()
    slope_GbN = torch.randn(*query_GbD.shape[:2], pool_GND.shape[1], device=DEVICE)

    def forward() -> torch.Tensor:
        return pool_distance(query_GbD.detach(), pool_GND.detach(), True)

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(pool_distance(query_GbD, pool_GND, True), (query_GbD, pool_GND), slope_GbN)

    parts = (("distance", forward), ("distance_and_gradients", both))
    return [row(f"{name}{part}_ms", replayed_ms(function), "ms") for part, function in parts]


def main() -> None:
    """Parse, check parity, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, default=1024)
    parser.add_argument("--negatives", type=int, default=256)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        child(args)
        return
    batch = make_batch(args.queries, args.negatives, args.width, args.chunk)
    parity = close(run(batch, True), run(batch, False))
    repeats = 5 if args.quick else 20
    eager_ms, eager_p90 = measure(lambda: run(batch, False), 1, repeats)
    fused_ms, fused_p90 = measure(lambda: run(batch, True), 3, 20)
    eager_mb, fused_mb = peak_extra_mb(args, False), peak_extra_mb(args, True)
    print(f"eager    {eager_ms:9.2f} ms (p90 {eager_p90:.2f}), peak extra {eager_mb:.0f} MB")
    print(f"compiled {fused_ms:9.2f} ms (p90 {fused_p90:.2f}), peak extra {fused_mb:.0f} MB")
    rows = [
        row("speedup", eager_ms / fused_ms, "x", ">= 20"),
        row("memory_ratio", fused_mb / eager_mb, "compiled / eager", "<= 0.05"),
        row("eager_ms", eager_ms, "ms"),
        row("compiled_ms", fused_ms, "ms"),
    ]
    extra = {}
    if DEVICE.type == "cuda":
        extra["ceilings"] = ceilings(repeats)
        rows += kernel_rows(batch)
        graphs_ms, _ = measure(lambda: run(batch, True, True), 5, 20)
        rows += [
            row("graphs_speedup", eager_ms / graphs_ms, "x, train.cuda_graphs", ">= 20"),
            row("graphs_ms", graphs_ms, "ms"),
        ]
        large = make_batch(8 * args.queries, 4 * args.negatives, args.width, 4 * args.chunk)
        large_ms = {compiled: measure(lambda how=compiled: run(large, how), 3, 10)[0] for compiled in (True, False)}  # type: ignore[misc]
        rows += [
            row("large_speedup", large_ms[False] / large_ms[True], "x, B x 8, N x 4, chunk x 4", ">= 20"),
            row("large_compiled_ms", large_ms[True], "ms"),
        ]
        rows += kernel_rows(large, "large_")
    elif distance.has_kernels("cpu"):
        same, more = against_compile(batch, repeats)
        parity, rows = parity and same, rows + more
    shapes = {"B": args.queries, "N": args.negatives, "D": args.width, "chunk": args.chunk}
    finish("loss", parity, rows, shapes=shapes, **extra)


if __name__ == "__main__":
    main()
