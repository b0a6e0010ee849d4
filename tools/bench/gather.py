"""Random rows of the feature store against the bandwidth of memory: `python -m tools.bench.gather [--quick]`.

A gather reads U rows of F float16 numbers at random places and writes U rows of float32: 6 bytes a number. The measure
is a plain copy of float32 numbers of the same size (8 bytes a number), both on the threads torch has. Parity first:
every residency gives the rows of a plain dense table, absent ones as zeros.
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mocme_dist.data.features import FeatureStore, write_part
from mocme_dist.data.files import write_json
from tools.bench.common import finish, measure, row


def make_store(folder: Path, num_rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of a tenth absent rows in parts of 4,096, and the plain table they stand for."""
    gen = np.random.default_rng(0)
    present = gen.random(num_rows) >= 0.1
    values = gen.standard_normal((num_rows, width), dtype=np.float32).astype(np.float16)
    shards = range(-(-num_rows // 4096))
    write_json(folder / "manifest.json", {"num_entities": num_rows, "shard_rows": 4096, "shards": [{"sha256": "x"} for _ in shards]})
    directory = folder / "features" / "image"
    for shard in shards:
        rows = slice(shard * 4096, (shard + 1) * 4096)
        stats = {"failed": {}, "examples": [], "input_sha256": "x", "encoder_hash": "x"}
        write_part(directory, shard, values[rows][present[rows]], present[rows], stats)
    manifest = {"format": 1, "modality": "image", "width": width, "encoder_hash": "x", "num_rows": num_rows, "shard_rows": 4096}
    write_json(directory / "manifest.json", manifest)
    return torch.from_numpy(np.where(present[:, None], values, 0)), torch.from_numpy(present)


def plain_gather(table: torch.Tensor, present: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """What one writes first: index, convert, zero the absent."""
    return table[rows].float().masked_fill_(~present[rows][:, None], 0)


def keep_pages() -> None:
    """As training/launch.py sets the allocator for a run: the pages of a result are kept for the next one."""
    mallopt = ctypes.CDLL("libc.so.6").mallopt
    for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-8, 1)):
        mallopt(parameter, value)


def main() -> None:
    """Parse, check, measure."""
    keep_pages()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller store and fewer repeats")
    parser.add_argument("--rows", type=int, default=4096, help="U, rows of one gather")
    parser.add_argument("--width", type=int, default=4096, help="F, as VGG16's features")
    args = parser.parse_args()
    num_rows, repeats = (20_000, 10) if args.quick else (60_000, 30)
    gen = torch.Generator().manual_seed(1)
    picks = [torch.randint(num_rows, (args.rows,), generator=gen) for _ in range(8)]
    turn = iter(range(1_000_000))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="mocme-bench-") as name:
        table, present = make_store(Path(name), num_rows, args.width)
        source, target = torch.randn(args.rows, args.width), torch.empty(args.rows, args.width)
        copy_ms, _ = measure(lambda: target.copy_(source), repeats=repeats)
        bandwidth = 8 * source.numel() / copy_ms / 1e6
        plain_ms, _ = measure(lambda: plain_gather(table, present, picks[next(turn) % 8]), repeats=repeats)
        parity = True
        for residency in ("host", "mmap"):
            store = FeatureStore.open(Path(name), "image", 0, num_rows, residency)
            for pick in picks[:2]:
                values, found = store.gather(pick)
                parity = parity and bool(torch.equal(values, table[pick].float()) and torch.equal(found, present[pick]))
            median, p90 = measure(lambda store=store: store.gather(picks[next(turn) % 8]), repeats=repeats)  # type: ignore[misc]
            speed = 6 * source.numel() / median / 1e6
            title = "gather" if residency == "host" else f"gather_{residency}"
            rows += [row(f"{title}_fraction", speed / bandwidth, "of copy bandwidth"), row(f"{title}_bandwidth", speed, "GB/s")]
            rows += [row(f"{title}_median", median, "ms"), row(f"{title}_p90", p90, "ms")]
        rows += [row("copy_bandwidth", bandwidth, "GB/s"), row("plain_fraction", 6 * source.numel() / plain_ms / 1e6 / bandwidth, "of it")]
    finish("gather", parity, rows, U=args.rows, F=args.width, store_rows=num_rows)


if __name__ == "__main__":
    main()
