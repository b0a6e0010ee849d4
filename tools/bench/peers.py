"""Against others, on the same threads in one run: `python -m tools.bench.peers [--quick] [--data DIR]`.

Unit of training: queries a second, each with N negatives scored, which is what PyKEEN counts as triples (it corrupts
one side of each positive). Shapes: B 1024, N 256, D 256 real numbers (128 complex), 15,000 entities, 169 relations,
float32, margin 12, self-adversarial weights, Adam.

- pykeen_step: PyKEEN 1.11's RotatE in its own sLCWA training loop as shipped (basic sampler, N corruptions of its own
  for each triple) against ours; ours is a whole iteration of `Training.train`, structure only.
- eager_shared_step: the original RotatE code's formulation with negatives shared by a chunk, eager;
`eager_per_triple_step`
  is its published form. Both get their batches for nothing and spend no time on sampling.
- mocme_vs_best_rotate: step time of the fastest of these others over that of full MoCME (3 modalities, K 3, MINE on),
  all float32; `mocme_bfloat16_vs_best_rotate`: our products in bfloat16, theirs as they are.
- pykeen_ranking: filtered ranking of DB15K's test triples with the same random embeddings: PyKEEN's evaluator in
  batches of 32, with the faster of its own RotatE distance and the published sum of moduli, against `rank_queries`.

Parity: losses and gradients of the shared eager form and ours on one batch; ranks of PyKEEN (sum of moduli) and ours,
where two float32 kernels may order candidates differently only within 1e-5 of the target's distance.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mocme_dist.config import load_config
from mocme_dist.data.known import KnownAnswers
from mocme_dist.evaluation.ranking import Queries, RowShard, Sizes, rank_queries, split_queries
from mocme_dist.model.loss import completion_loss
from mocme_dist.parallel.comm import communication
from mocme_dist.training.build import build_worker, loss_settings, open_dataset
from mocme_dist.training.worker import Worker
from tools.bench import pykeen_peer
from tools.bench.common import DEVICE, finish, measure, row, spread
from tools.bench.eager_rotate import EagerRotatE
from tools.bench.workload import (
    BFLOAT16,
    FULL,
    RELATIONS,
    STRUCTURE_ONLY,
    make_graph,
    step_config,
    timed_steps,
    use_all_cores,
)

QUERIES, NEGATIVES, WIDTH, GAMMA = 1024, 256, 256, 12.0
WIDTHS = {"text": 384, "numeric": 128}
DB15K = Path(__file__).resolve().parents[3] / "shared" / "data" / "DB15K"


class Batch:
    """One batch of ours with global ids, for the eager forms."""

    def __init__(self, worker: Worker) -> None:
        batch = worker.prepare(0)[0].batch
        ids = torch.from_numpy(batch.ids_U).to(DEVICE)
        self.batch = batch
        self.source, self.target, self.pool = ids[batch.source_Gb], ids[batch.target_Gb], ids[batch.pool_GN]
        self.relation, self.sign, self.allowed = batch.relation_Gb, batch.sign_Gb, batch.allowed_GbN
        self.own = torch.randint(worker.dataset.num_entities, (self.source.numel(), NEGATIVES), device=DEVICE)

    def queries(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Source, relation, sign and target of each query."""
        return self.source, self.relation, self.sign, self.target


def optimizer_step(model: EagerRotatE, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Backward and Adam over the whole tables."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def same_loss(model: EagerRotatE, given: Batch) -> bool:
    """Loss and gradients of the shared eager form and of ours agree to 1e-4 of the largest."""
    model.zero_grad()
    theirs = model.shared(*given.queries(), given.pool, given.allowed)
    theirs.backward()
    rows_ED, phase_RC = (value.detach().clone().requires_grad_() for value in (model.entity, model.phase))
    vectors = rows_ED[given.source], phase_RC[given.relation], given.sign, rows_ED[given.target], rows_ED[given.pool]
    config = load_config([], ["negatives.weighting=self_adversarial"])
    settings = loss_settings(config.train, config.negatives, GAMMA, compiled=True)
    ours, _ = completion_loss(*vectors, given.allowed, given.batch.weight_Gb, settings)
    ours = ours / given.batch.total
    ours.backward()
    pairs = ((ours, theirs), (rows_ED.grad, model.entity.grad), (phase_RC.grad, model.phase.grad))
    return all(bool((a - b).abs().max() <= 1e-4 * b.abs().max()) for a, b in pairs)  # type: ignore[operator, union-attr]


def training_rows(folder: Path, repeats: int) -> tuple[bool, list[dict[str, object]]]:
    """Whether losses agree, and the rows of steps."""
    dataset = make_graph(folder, widths=WIDTHS)
    ours = timed_steps(step_config(dataset, folder / "structure", *STRUCTURE_ONLY), 2 * repeats, 6)
    full = timed_steps(step_config(dataset, folder / "full", *FULL), repeats, 6)
    low = timed_steps(step_config(dataset, folder / "bfloat16", *FULL, *BFLOAT16), repeats, 6)
    print(f"ours: {spread(ours.step_s)[0]:.4f} s and, full, {spread(full.step_s)[0]:.4f} s a step", flush=True)
    config = step_config(dataset, folder / "batch", *STRUCTURE_ONLY)
    worker = build_worker(config, open_dataset(config.data), _alone())
    given = Batch(worker)
    model = EagerRotatE(worker.table.rows_rD * 14 / WIDTH, worker.model.relations.phase_RC, GAMMA)
    parity = same_loss(model, given)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    source, relation, sign, target = (value.reshape(-1) for value in given.queries())
    shared_ms, _ = measure(
        lambda: optimizer_step(model, optimizer, model.shared(*given.queries(), given.pool, given.allowed)), 2, repeats
    )
    per_triple_ms, _ = measure(
        lambda: optimizer_step(model, optimizer, model.per_triple(source, relation, sign, target, given.own)), 1, 5
    )
    print(f"eager: {shared_ms:.0f} ms shared, {per_triple_ms:.0f} ms per triple", flush=True)
    triples_T3 = np.asarray(worker.dataset.triples("train"))[: (repeats + 3) * QUERIES]
    pykeen_s = pykeen_peer.train_steps(
        triples_T3, worker.dataset.num_entities, RELATIONS, QUERIES, NEGATIVES, WIDTH, 3, GAMMA
    )
    step_s, full_s, theirs_s = spread(ours.step_s)[0], spread(full.step_s)[0], spread(pykeen_s)[0]
    best_s = min(theirs_s, shared_ms / 1e3, per_triple_ms / 1e3)
    return parity, [
        row("pykeen_step", theirs_s / step_s, "x", ">= 30"),
        row("eager_shared_step", shared_ms / 1e3 / step_s, "x", ">= 5"),
        row("eager_per_triple_step", per_triple_ms / 1e3 / step_s, "x"),
        row("mocme_vs_best_rotate", best_s / full_s, "x", "> 1"),
        row("mocme_bfloat16_vs_best_rotate", best_s / spread(low.step_s)[0], "x"),
        row("mocme_vs_pykeen_rotate", theirs_s / full_s, "x"),
        row("our_triples_per_s", QUERIES / step_s, "queries/s"),
        row("our_step_p90_ms", 1e3 * spread(ours.step_s)[1], "ms"),
        row("pykeen_triples_per_s", QUERIES / theirs_s, "queries/s"),
        row("pykeen_step_p90_ms", 1e3 * spread(pykeen_s)[1], "ms"),
        row("eager_shared_triples_per_s", QUERIES / shared_ms * 1e3, "queries/s"),
        row("eager_per_triple_triples_per_s", QUERIES / per_triple_ms * 1e3, "queries/s"),
        row("mocme_triples_per_s", QUERIES / full_s, "queries/s"),
    ]


def _alone():  # type: ignore[no-untyped-def]
    """The communication of the process group that is open already."""
    import torch.distributed as dist

    from mocme_dist.parallel.comm import Comm, pick_device

    return Comm(0, 1, pick_device(), dist.group.WORLD)  # type: ignore[arg-type]


def read_graph(folder: Path) -> dict[str, np.ndarray]:
    """(n, 3) int64 triples of each split of a raw folder; ids in order of appearance."""
    entities: dict[str, int] = {}
    relations: dict[str, int] = {}
    splits = {}
    for split in ("train", "valid", "test"):
        lines = [line.split("\t") for line in (folder / f"{split}.txt").read_text(encoding="utf8").splitlines()]
        ids = [(entities.setdefault(h, len(entities)), relations.setdefault(r, len(relations)), t) for h, r, t in lines]
        splits[split] = np.array([(h, r, entities.setdefault(t, len(entities))) for h, r, t in ids], dtype=np.int64)
    return splits


def explained(queries: Queries, ours_Q: np.ndarray, theirs_Q: np.ndarray, z_ED: Tensor, phase_RC: Tensor) -> bool:
    """Whether ranks that differ do so by candidates whose float64 distance is within 1e-5 of the target's."""
    for q in np.flatnonzero(ours_Q != theirs_Q):
        source, relation, direction, target = (int(column[q]) for column in queries)
        z_EC = torch.complex(*z_ED.double().chunk(2, -1))
        angle = phase_RC[relation].double() * (1 - 2 * direction)
        distance_E = (z_EC[source] * torch.polar(torch.ones_like(angle), angle) - z_EC).abs().sum(-1)
        close = int(((distance_E - distance_E[target]).abs() <= 1e-5 * distance_E[target]).sum()) - 1
        if abs(ours_Q[q] - theirs_Q[q]) > close:
            return False
    return True


def ranking_rows(folder: Path, repeats: int, num_triples: int) -> tuple[bool, list[dict[str, object]]]:
    """Whether ranks agree, and the rows of filtered evaluation."""
    splits = read_graph(folder)
    every = np.concatenate(list(splits.values()))
    E, R = int(every[:, [0, 2]].max()) + 1, int(every[:, 1].max()) + 1
    gen = torch.Generator().manual_seed(0)
    z_ED = torch.randn(E, WIDTH, generator=gen).to(DEVICE) * 14 / WIDTH
    phase_RC = (torch.rand(R, WIDTH // 2, generator=gen).to(DEVICE) * 2 - 1) * torch.pi
    known = KnownAnswers.build(every, R)
    test = splits["test"][np.random.default_rng(0).permutation(len(splits["test"]))]
    sample, few = split_queries(test[:1024]), test[:num_triples]

    def rank(queries: Queries) -> np.ndarray:
        return rank_queries(
            queries, lambda relation: phase_RC[relation], RowShard(z_ED, 0), known, _alone(), Sizes(compiled=True)
        ).filtered

    ours_ms, ours_p90 = measure(lambda: rank(sample), 2, repeats)
    ours_per_s = len(sample.source) / ours_ms * 1e3
    rates: dict[str, float] = {}
    for published in (False, True):
        model = pykeen_peer.make_model(z_ED, phase_RC, splits["train"], published)
        seconds, ranks_Q = pykeen_peer.evaluate(model, few, every, 32)
        rates["published" if published else "own"] = 2 * len(few) / seconds
        print(f"pykeen evaluated: {rates}", flush=True)
    queries = split_queries(few)
    ours_Q = rank(queries)
    equal = float((ours_Q == ranks_Q).mean())
    best = max(rates, key=lambda name: rates[name])
    return explained(queries, ours_Q, ranks_Q, z_ED.cpu(), phase_RC.cpu()), [
        row("pykeen_ranking", ours_per_s / rates[best], "x", ">= 40"),
        row("our_queries_per_s", ours_per_s, "queries/s"),
        row("our_ranking_p90_ms", ours_p90, f"ms per {len(sample.source)}"),
        row("pykeen_queries_per_s", rates[best], f"queries/s, {best}"),
        row("equal_ranks", equal, f"of {len(queries.source)}; others are ties in float32"),
    ]


def main() -> None:
    """Parse, check parity, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument(
        "--data", type=Path, default=DB15K, help="raw folder of DB15K; without it the ranking is left out"
    )
    args = parser.parse_args()
    use_all_cores()
    repeats = 5 if args.quick else 20
    with tempfile.TemporaryDirectory(prefix="mocme-bench-") as temporary, communication(60):
        parity, rows = training_rows(Path(temporary), repeats)
        if args.data.is_dir():
            same, more = ranking_rows(args.data, repeats, 64 if args.quick else 128)
            parity, rows = parity and same, rows + more
        else:
            print(f"{args.data}: no such folder, pykeen_ranking is left out")
    finish(
        "peers",
        parity,
        rows,
        shapes={"B": QUERIES, "N": NEGATIVES, "D": WIDTH, "entities": 15_000, "threads": torch.get_num_threads()},
    )


if __name__ == "__main__":
    main()
