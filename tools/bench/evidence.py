"""Ranking by the blend: `python -m tools.bench.evidence [--quick] [--graph PACKED]`.

A graph of DB15K's size (12,842 entities, 279 relations, 79,222 facts with hubs), or the triples of a packed data set;
vectors of D 256 in small groups, so that targets are near and sums stop early as those of a trained model do; text of
384 numbers, the vectors themselves and shared facts as spaces. First ranks at one, two and three ranks are held against
each other and against whole scores from the terms, every term with a weight everywhere; then ranking by the blend is
timed against ranking by the model
alone, same queries, same vectors: with as many weights as a fit leaves (`time_ratio`), and with all of them.
`bytes_per_query` is what a rank puts into sums of two ranks for a distinct query, beyond what the model's ranking does.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from mocme_dist.data.dataset import Dataset
from mocme_dist.data.known import KnownAnswers
from mocme_dist.evaluation.blended import BlendInputs, rank_blended
from mocme_dist.evaluation.ranking import Queries, RowShard, Sizes, rank_queries, split_queries
from mocme_dist.evidence.facts import Facts
from mocme_dist.evidence.shared_facts import SharedFacts
from mocme_dist.evidence.spaces import feature_source, vector_space
from mocme_dist.evidence.terms import Evidence
from mocme_dist.evidence.votes import Asked
from mocme_dist.kernels.evidence import evidence_kernels
from mocme_dist.parallel.comm import Comm, communication
from mocme_dist.partition import RowPartition
from tools.bench.common import finish, row
from tools.bench.workload import use_all_cores

ENTITIES, RELATIONS, FACTS, WIDTH, TEXT = 12_842, 279, 79_222, 256, 384
SIZES = Sizes(256, 1024, True)
# Share of the weights that the fit leaves, as measured on the demo.
FITTED = 0.47


class CountedComm(Comm):
    """A comm that knows how many bytes it was given to add up."""

    def sum(self, value: Tensor) -> Tensor:
        """See `Comm.sum`."""
        object.__setattr__(self, "given", getattr(self, "given", 0) + value.nbytes)
        return super().sum(value)


class Problem:
    """A graph with vectors and features, the same on every rank."""

    def __init__(self, graph: str | None, queries: int) -> None:
        gen, torch_gen = np.random.default_rng(0), torch.Generator().manual_seed(0)
        if graph is None:
            self.entities, self.relations = ENTITIES, RELATIONS
            facts = _facts(gen)
            train, test = facts[queries // 2 :], facts[: queries // 2]
        else:
            dataset = Dataset.open(graph)
            self.entities, self.relations = dataset.num_entities, dataset.num_relations
            train, test = (np.array(dataset.triples(split)) for split in ("train", "test"))
        self.train, self.queries = train, split_queries(test, queries)
        self.known = KnownAnswers.build(np.concatenate([train, test]), self.relations)
        groups = torch.randn(self.entities // 16 + 1, WIDTH, generator=torch_gen)
        member = torch.randint(len(groups), (self.entities,), generator=torch_gen)
        noise = torch.randn(self.entities, WIDTH, generator=torch_gen)
        self.z_ED = (groups[member] + 0.5 * noise) * 14 / WIDTH
        self.text_ET = torch.randn(self.entities, TEXT, generator=torch_gen)
        # A target lies near its source, as in a trained model.
        for source, target in test.T[[0, 2]].T[: self.entities // 4]:
            self.z_ED[target] = self.z_ED[source] + 0.7 * 14 / WIDTH * noise[target]

    def evidence(self, comm: Comm) -> tuple[Evidence, RowShard]:
        """This rank's."""
        first, last = RowPartition(self.entities, comm.world_size).bounds(comm.rank)
        facts = Facts(KnownAnswers.build(self.train, self.relations), self.entities)
        text, z_rD = self.text_ET[first:last], self.z_ED[first:last]
        everybody = torch.ones(last - first, dtype=torch.bool)
        spaces = [
            feature_source("text", lambda rows: (text[rows], everybody[rows]), last - first, comm, 15.0).fill(
                0, last - first, comm.device
            ),
            vector_space("model", z_rD, 15.0),
        ]
        kernels = evidence_kernels(torch.get_num_threads())
        shared = SharedFacts(facts, first, last, 2000, 32, kernels)
        return Evidence(facts, spaces, shared, first, last - first, 20, 15.0, comm, kernels), RowShard(z_rD, first)

    def table(self, terms: int, share: float = 1.0) -> Tensor:
        """Weights of the model everywhere, and of each term at this share of the places."""
        gen = torch.Generator().manual_seed(2)
        weight_PF = torch.rand(2 * self.relations, terms + 1, generator=gen) + 0.5
        weight_PF[:, 1:] *= torch.rand(2 * self.relations, terms, generator=gen) < share
        return weight_PF

    def phase_of(self, relation: Tensor) -> Tensor:
        """No rotation: near vectors are near answers."""
        return torch.zeros(len(relation), WIDTH // 2)


def _facts(gen: np.random.Generator) -> np.ndarray:
    """Distinct facts; relations and tails by Zipf, so that there are hubs."""

    def zipf(size: int, count: int) -> np.ndarray:
        weight = 1 / np.arange(1, size + 1)
        return gen.permutation(size)[gen.choice(size, count, p=weight / weight.sum())]

    drawn = 2 * FACTS
    triples = np.stack([gen.integers(ENTITIES, size=drawn), zipf(RELATIONS, drawn), zipf(ENTITIES, drawn)], 1)
    distinct = np.unique(triples, axis=0)
    return gen.permutation(distinct)[:FACTS]


def rank_both(problem: Problem, queries: Queries, comm: Comm) -> tuple[np.ndarray, tuple[int, int]]:
    """Ranks by the blend, and the bytes summed by the model's ranking and by the blend's."""
    counted = CountedComm(**{field.name: getattr(comm, field.name) for field in fields(comm)})
    evidence, shard = problem.evidence(counted)
    object.__setattr__(counted, "given", 0)
    rank_queries(queries, problem.phase_of, shard, problem.known, counted, Sizes(compiled=True))
    alone = counted.given  # type: ignore[attr-defined]
    table = problem.table(len(evidence.terms))
    inputs = BlendInputs(problem.phase_of, shard, problem.known, evidence, [table], SIZES)
    [ranks] = rank_blended(queries, inputs, counted)
    return ranks.filtered, (alone, counted.given - alone)  # type: ignore[attr-defined]


def _body(rank: int, world: int, store: str, graph: str | None, queries: int, out: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    with communication(600) as comm:
        problem = Problem(graph, queries)
        found = rank_both(problem, problem.queries, comm)
    if rank == 0:
        out.put(found)
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(world: int, graph: str | None, queries: int) -> tuple[np.ndarray, tuple[int, int]]:
    """`rank_both` on so many processes."""
    out = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        context = mp.spawn(  # type: ignore[attr-defined]
            _body, (world, f"{folder}/store", graph, queries, out), world, join=False
        )
        found: tuple[np.ndarray, tuple[int, int]] = out.get()
        while not context.join():
            pass
    return found


def whole_scores_agree(problem: Problem, comm: Comm, ranks_Q: np.ndarray) -> bool:
    """Whether ranks from whole scores, in float64 of the same terms, differ for few queries and by little."""
    some = problem.queries.take(slice(0, 200))
    evidence, shard = problem.evidence(comm)
    asked, index_Q = Asked.distinct(some.source, some.relation, some.direction)
    prepared, rows = evidence.prepare(asked), np.arange(evidence.num_rows)
    weight_QF = problem.table(len(evidence.terms))[2 * some.relation + some.direction].double()
    z_EC = torch.complex(*shard.z_rD.double().chunk(2, 1))
    distance_QE = torch.stack([(z_EC[source] - z_EC).abs().sum(1) for source in some.source])
    score_QE = -weight_QF[:, :1] * distance_QE
    for turn, (_, value_QE) in enumerate(evidence.values(prepared, index_Q, rows), 1):
        score_QE += weight_QF[:, turn : turn + 1] * value_QE.double()
    target_Q1 = score_QE[torch.arange(200), torch.from_numpy(some.target)][:, None]
    offsets, targets = problem.known.lookup(some.source, some.relation, some.direction)
    score_QE[np.repeat(np.arange(200), np.diff(offsets)), targets] = -torch.inf
    expected = 1 + (score_QE > target_Q1 + 1e-5).sum(1).numpy()
    most = 1 + (score_QE > target_Q1 - 1e-5).sum(1).numpy()
    return bool(((ranks_Q[:200] >= expected) & (ranks_Q[:200] <= most)).all())


def alternate(
    times: dict[str, Callable[[], np.ndarray]], repeats: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Wall and processor seconds of each call, all of them in turn in each round, after a round that is not counted."""
    wall: dict[str, list[float]] = {name: [] for name in times}
    cpu: dict[str, list[float]] = {name: [] for name in times}
    for _ in range(repeats + 1):
        for name, call in times.items():
            begun, used = time.perf_counter(), time.process_time()
            call()
            wall[name].append(time.perf_counter() - begun)
            cpu[name].append(time.process_time() - used)
    return tuple({name: np.array(found[1:]) for name, found in part.items()} for part in (wall, cpu))  # type: ignore[return-value]


def main() -> None:
    """Parse, check parity, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer queries and repeats")
    parser.add_argument("--graph", help="a packed data set whose triples are taken")
    args = parser.parse_args()
    use_all_cores()
    queries, repeats = (2048, 2) if args.quick else (8192, 5)
    if args.graph is not None:
        args.graph = str(Path(args.graph).absolute())
    on_two, (alone, blended) = on_ranks(2, args.graph, 1024)
    on_three, _ = on_ranks(3, args.graph, 1024)
    with communication(600) as comm:
        few = Problem(args.graph, 1024)
        by_one, _ = rank_both(few, few.queries, comm)
        parity = bool(np.array_equal(by_one, on_two) and np.array_equal(by_one, on_three))
        parity = parity and whole_scores_agree(few, comm, by_one)
        problem = Problem(args.graph, queries)
        evidence, shard = problem.evidence(comm)
        place = (problem.phase_of, shard, problem.known, comm)
        fitted, every = problem.table(len(evidence.terms), FITTED), problem.table(len(evidence.terms))

        def by_model() -> np.ndarray:
            return rank_queries(problem.queries, *place, Sizes(256, 1024, True)).filtered

        def by_blend(table: Tensor = fitted) -> np.ndarray:
            return rank_blended(problem.queries, BlendInputs(*place[:3], evidence, [table], SIZES), comm)[0].filtered

        times: dict[str, Callable[[], np.ndarray]] = {
            "model": by_model,
            "blend": by_blend,
            "every": lambda: by_blend(every),
        }
        wall, cpu = alternate(times, repeats)
    asked = len(Asked.distinct(*few.queries[:3])[0].source_U)
    count = len(problem.queries.source)
    rows = [
        row("parity", float(parity), "equal ranks at W 1, 2, 3", ">= 1"),
        row("time_ratio", float(np.median(wall["blend"] / wall["model"])), "blend / model", "<= 2"),
        row("cpu_ratio", float(np.median(cpu["blend"] / cpu["model"])), "blend / model, processor time"),
        row("cpu_ratio_every_term", float(np.median(cpu["every"] / cpu["model"])), "blend / model, processor time"),
        row("blend_queries_per_s", count / float(np.median(wall["blend"])), "queries/s"),
        row("bytes_per_query", (blended - alone) / asked, "bytes a rank, W 2, distinct query"),
    ]
    finish("evidence", parity, rows, shapes={"entities": problem.entities, "D": WIDTH, "text": TEXT, "queries": count})


if __name__ == "__main__":
    main()
