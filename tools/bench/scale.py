"""How cost grows with the graph and the ranks.

`python -m tools.bench.scale [--quick] [--only ROW ...] [--data FOLDER]`.

Real ranks of the training loop on planted graphs (tools/bench/rank.py), one thread each where ranks are compared.
Groups of rows: step_growth, zero_growth, two_rank_speedup, rss_over_table, rss_constant, exchange_bytes,
ranking_fraction, pack. plan_error is the largest over all runs whose memory was measured. Graphs are kept in FOLDER and
used again.
Parity first: two ranks rank as one does, bit for bit, and send what the plan's formula says, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from mocme_dist.batching.batch import BatchMaker
from mocme_dist.batching.sampler import QuerySampler
from mocme_dist.config import Config, load_config
from mocme_dist.data.dataset import Dataset
from mocme_dist.partition import RowPartition
from mocme_dist.train import resolve_paths
from mocme_dist.training.plan import Planner, exchange_bytes
from tools.bench.common import finish, row
from tools.bench.rank import measure_ranks
from tools.bench.scale_ranking import rank_shards, ranking_fraction

# Structure alone: what does not grow is as small as it gets, so growth shows. Rows by Adagrad, one number each.
LEAN = (
    *("modalities=[structure]", "experts.num_experts=1", "experts.residual=true", "projection.structure=identity"),
    *("entities.optimizer=adagrad", "deepspeed.engine=torch", "fusion.estimator=uniform", "train.log_every=1000000"),
)
WIDTH, BATCH = 256, 1024


class Scale:
    """One run of the benchmark: its graphs, and the plan's error so far."""

    def __init__(self, data: Path, quick: bool) -> None:
        self.data, self.quick = data, quick
        self.errors: dict[str, float] = {}

    def graph(self, num_entities: int) -> Path:
        """A packed planted graph of two lines an entity (never fewer than 40,000), made when it is not there."""
        folder = self.data / f"packed-{num_entities}"
        if not (folder / "manifest.json").is_file():
            triples = max(2 * num_entities, 40_000)
            sizes = [
                "--entities",
                str(num_entities),
                "--triples",
                str(triples),
                "--factors",
                "32",
                "32",
                "--relations",
                "64",
            ]
            make(folder, *sizes, "--modalities", "--packed", "--shard-rows", "65536")
        return folder

    def run(
        self, name: str, world_size: int, num_entities: int, *settings: str, steps: int = 25, **how: Any
    ) -> list[dict[str, Any]]:
        """Measured ranks on a graph; the plan is held against the largest of them."""
        overrides = [*LEAN, f"data.dataset={json.dumps(str(self.graph(num_entities)))}", *settings]
        ranks = measure_ranks(world_size, overrides, steps, **how)
        config = config_of(overrides)
        plan = Planner(config, Dataset.open(self.graph(num_entities)), world_size).plan(under_ray=False)
        peak = max(rank["peak_mb"] for rank in ranks)
        if how.get("queries"):  # the plan is of a run that ranks, too
            self.errors[name] = plan.peak / 2**20 / peak - 1
        first = ranks[0]
        ranked = f", {first['queries']} queries ranked in {first['rank_s']:.1f} s" if "rank_s" in first else ""
        said = (
            f"{step_ms(ranks):.1f} ms a step, peak {peak:,.0f} MiB (plan {plan.peak / 2**20:,.0f}), built in"
            f" {first['build_s']:.1f} s"
        )
        phases = ", ".join(f"{phase} {ms:.1f}" for phase, ms in first["phases_ms"].items())
        print(
            f"  {name}: {world_size} rank(s), {num_entities:,} entities: {said}{ranked}; ms: {phases}",
            file=sys.stderr,
            flush=True,
        )
        return ranks

    def step_growth(self) -> list[dict[str, Any]]:
        """Median step at one batch, from small to large."""
        sizes = (10_000, 100_000) if self.quick else (10_000, 100_000, 1_000_000, 5_000_000)
        found = {size: step_ms(self.run(f"step_{size}", 1, size, steps=40, threads=2)) for size in sizes}
        rows = [row(f"step_ms_{size}", value, "ms") for size, value in found.items()]
        return [
            row("step_growth", found[sizes[-1]] / found[sizes[0]], f"{sizes[-1]:,} / {sizes[0]:,}", "<= 1.3"),
            *rows,
        ]

    def zero_growth(self) -> list[dict[str, Any]]:
        """The control: the table inside the engine, where every step moves every row."""
        sizes = (10_000, 40_000) if self.quick else (10_000, 100_000, 400_000)
        settings = (
            "entities.sharding=zero",
            "entities.optimizer=auto",
            "deepspeed.engine=deepspeed",
            "deepspeed.stage=1",
        )
        found = {size: step_ms(self.run(f"zero_{size}", 1, size, *settings, steps=12, threads=2)) for size in sizes}
        slope = (found[sizes[-1]] - found[sizes[-2]]) / (sizes[-1] - sizes[-2]) * 1e6
        rows = [row(f"zero_step_ms_{size}", value, "ms") for size, value in found.items()]
        return [
            row("zero_growth", found[sizes[-1]] / found[sizes[0]], f"{sizes[-1]:,} / {sizes[0]:,}"),
            row("zero_ms_per_million_rows", slope, "ms, last two sizes"),
            *rows,
        ]

    def two_rank_speedup(self) -> list[dict[str, Any]]:
        """Triples a second of two ranks of one thread against one, the same share of a batch each.

        A core for each rank.

        Plain RotatE, then the whole model; medians of three turns, because one run's steps differ by a tenth from
        another's.
        """
        size, turns = (20_000, 1) if self.quick else (1_000_000, 3)
        rows = []
        for kind, settings in {
            "": (),
            "_mocme": ("experts.num_experts=3", "fusion.estimator=mine", "projection.structure=mlp"),
        }.items():
            found: dict[int, list[float]] = {1: [], 2: []}
            for turn in range(turns):
                for world, ms in found.items():
                    batch = f"train.batch_size={world * BATCH}"
                    ms.append(
                        step_ms(
                            self.run(f"speedup{kind}_{world}_{turn}", world, size, *settings, batch, steps=30, pin=True)
                        )
                    )
            # A triple is two queries.
            rates = {world: world * BATCH / 2 / statistics.median(ms) * 1e3 for world, ms in found.items()}
            bar = ">= 1.7" if kind else ">= 1.5"  # plain steps are short beside what gloo takes
            rows.append(row(f"two_rank_speedup{kind}", rates[2] / rates[1], "x", bar))
            rows += [row(f"triples_per_s{kind}_w{world}", rate, "triples/s") for world, rate in rates.items()]
        return rows

    def rss_over_table(self) -> list[dict[str, Any]]:
        """Peak memory of a rank with the largest table: trained, saved and ranked."""
        size = 100_000 if self.quick else 5_000_000
        (rank,) = self.run("rss_over_table", 1, size, steps=20, queries=200, threads=2)
        table = 4 * size * WIDTH / 2**20
        return [
            row("rss_over_table", rank["peak_mb"] / table, f"of {table:,.0f} MiB", "<= 1.5" if not self.quick else ""),
            row("rss_peak_mib", rank["peak_mb"], "MiB"),
            row("rss_file_mib", rank["file_mb"], "MiB of it mapped files, at the end"),
            row("checkpoint_s", rank["last_step_and_checkpoint_s"], "s"),
            row("rank_200_queries_s", rank["rank_s"], "s"),
            row("checkpoint_load_s", rank["load_s"], "s"),
        ]

    def rss_constant(self) -> list[dict[str, Any]]:
        """Peak memory of a rank less its share of rows and state, at two and four ranks.

        It should not depend on them.
        """
        size = 100_000 if self.quick else 1_000_000
        share = 4 * size * (WIDTH + 1) / 2**20
        rows = []
        for world in (1, 2, 4):
            ranks = self.run(f"rss_w{world}", world, size, f"train.batch_size={world * 256}", steps=10, queries=64)
            peak = max(rank["peak_mb"] for rank in ranks)
            rows += [
                row(f"rss_w{world}_mib", peak, "MiB"),
                row(f"rss_constant_w{world}_mib", peak - share / world, "MiB"),
            ]
        return rows

    def exchange_bytes(self) -> list[dict[str, Any]]:
        """Bytes that ranks send each other in a step: counted on their routes, by the formula, and without dedup."""
        size, rows = 10_000 if self.quick else 100_000, []
        for world in (2,) if self.quick else (2, 4):
            overrides = f"train.batch_size={world * BATCH}"
            ranks = self.run(f"exchange_{world}", world, size, overrides, steps=4)
            config = config_of([*LEAN, f"data.dataset={json.dumps(str(self.graph(size)))}", overrides])
            planned, plain = planned_bytes(config, world)
            measured = max(exchange_bytes(sent, WIDTH) for rank in ranks for sent in rank["sent"][:3])
            rows += [
                row(f"exchange_bytes_w{world}", measured, "bytes a step, one way"),
                row(f"exchange_over_plan_w{world}", measured / planned, "x", "<= 1"),
                row(f"exchange_without_dedup_w{world}", plain / planned, "x the bytes"),
            ]
        return rows

    def ranking_fraction(self) -> list[dict[str, Any]]:
        """Exact ranking over two ranks against a compiled distance kernel that only scores, on the same two cores."""
        size, queries = (20_000, 200) if self.quick else (1_000_000, 1_000)
        found = ranking_fraction(size, queries, WIDTH)
        return [
            row("ranking_fraction", found["scores_per_s"] / found["plain_scores_per_s"], "x", ">= 0.7"),
            row("ranking_scores_per_s", found["scores_per_s"], "pairs/s"),
            row("ranking_plain_scores_per_s", found["plain_scores_per_s"], "pairs/s"),
        ]

    def pack(self) -> list[dict[str, Any]]:
        """Packing of raw text: memory, and time per million lines at three sizes."""
        sizes = (
            ((50_000, 200_000), (100_000, 400_000))
            if self.quick
            else ((500_000, 2_000_000), (2_500_000, 10_000_000), (5_000_000, 20_000_000))
        )
        per_million, rows = [], []
        for entities, lines in sizes:
            folder = self.data / f"raw-{entities}"
            if not (folder / "truth" / "truth.json").is_file():
                make(
                    folder,
                    "--entities",
                    str(entities),
                    "--triples",
                    str(lines),
                    "--factors",
                    "64",
                    "64",
                    "--relations",
                    "64",
                    "--modalities",
                )
            with tempfile.TemporaryDirectory(dir=self.data) as out:
                found = run_python(_PACK, str(folder), f"{out}/packed")
            per_million.append(found["seconds"] / lines * 1e6)
            rows.append(row(f"pack_seconds_per_million_{lines}", per_million[-1], "s"))
            print(f"  pack {lines:,} lines: {found}", file=sys.stderr, flush=True)
        return [
            row("pack_rss_gib", found["peak_mib"] / 1024, "GiB", "<= 8"),
            row("pack_seconds_per_million", per_million[-1], "s"),
            row("pack_growth", per_million[-1] / per_million[0], f"{sizes[-1][1]:,} / {sizes[0][1]:,}", "<= 1.3"),
            *rows,
        ]


_PACK = """
import json, resource, sys, time
from pathlib import Path
from mocme_dist.config.schema import DataConfig
from mocme_dist.data.packing import pack_folder
start = time.perf_counter()
pack_folder(Path(sys.argv[1]), Path(sys.argv[2]), DataConfig(shard_rows=65536))
peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"seconds": time.perf_counter() - start, "peak_mib": peak_mib}))
"""


def make(folder: Path, *arguments: str) -> None:
    """A planted graph in `folder`, by the tool's own command."""
    subprocess.run(
        [sys.executable, "-m", "tools.make_synthetic", str(folder), *arguments], check=True, stdout=subprocess.DEVNULL
    )


def run_python(code: str, *arguments: str) -> dict[str, Any]:
    """The JSON that a fresh process prints last."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def config_of(overrides: list[str]) -> Config:
    """The configuration of measured ranks."""
    return resolve_paths(load_config([], ["launch.mode=local", *overrides]))


def step_ms(ranks: list[dict[str, Any]]) -> float:
    """Median step, the first five left out: kernels are made and pages touched there."""
    return statistics.median(ranks[0]["step_ms"][5:] or ranks[0]["step_ms"])


def planned_bytes(config: Config, world_size: int) -> tuple[int, int]:
    """Bytes of fused vectors that a rank sends by the plan, and those if each request were answered by itself."""
    dataset = Dataset.open(Path(str(config.data.dataset)))
    partition = RowPartition(dataset.num_entities, world_size)
    sampler = QuerySampler(len(dataset.triples("train")), config.train.batch_size, config.train.seed)
    requests = Planner(config, dataset, world_size).count_requests()
    chunk, count = config.negatives.chunk_size, config.negatives.count
    most = 0
    for step in range(3):
        sent_W = np.zeros(world_size, dtype=np.int64)
        for rank in range(world_size):
            maker = BatchMaker(
                dataset.triples("train"),
                dataset.known("train"),
                partition.num_rows,
                sampler,
                chunk,
                count,
                rank,
                world_size,
            )
            batch = maker.make(step)
            ids = batch.ids_U[
                np.concatenate([part.numpy().ravel() for part in (batch.source_Gb, batch.target_Gb, batch.pool_GN)])
            ]
            owner = np.searchsorted(partition.starts(), ids, side="right") - 1
            sent_W += np.bincount(owner[owner != rank], minlength=world_size)
        most = max(most, int(sent_W.max()))
    return exchange_bytes(requests.sent, config.experts.width), exchange_bytes(most, config.experts.width)


GROUPS = (
    "step_growth",
    "zero_growth",
    "two_rank_speedup",
    "rss_over_table",
    "rss_constant",
    "exchange_bytes",
    "ranking_fraction",
    "pack",
)


def main() -> None:
    """Parse, check parity, measure the groups that are asked for, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small graphs")
    parser.add_argument(
        "--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="ROW", help=", ".join(GROUPS)
    )
    parser.add_argument("--data", type=Path, help="folder for the graphs; a temporary one when not given")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mocme-scale-") as temporary:
        folder = args.data or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        scale = Scale(folder, args.quick)
        parity = bool(np.array_equal(rank_shards(1, 3000, 60, 32), rank_shards(2, 3000, 60, 32)))
        rows = [figure for name in args.only for figure in getattr(scale, name)()]
        parity = parity and all(
            figure["value"] == 1 for figure in rows if figure["name"].startswith("exchange_over_plan")
        )
    if scale.errors:
        worst = max(scale.errors, key=lambda name: abs(scale.errors[name]))
        rows.append(row("plan_error", abs(scale.errors[worst]), f"of the measured peak ({worst})", "<= 0.15"))
    finish("scale", parity, rows, shapes={"D": WIDTH, "batch": BATCH, "negatives": 128}, plan_errors=scale.errors)


if __name__ == "__main__":
    main()
