"""A bilinear scorer on a packed graph.

ComplEx with a softmax over all entities, beside RotatE or as a term of the blend.

    python -m tools.experiments.bilinear DATASET OUT --arm plain
    python -m tools.experiments.bilinear DATASET OUT --arm pca --blocks structure text --init pca
    python -m tools.experiments.bilinear DATASET OUT --arm plain --blend RUN   # RotatE run of `mocme train`

score(c | s, r) = Re sum over C of s r conj(c), with a reciprocal relation for head queries, so that every query asks
for a tail. The loss of a triple is -log softmax of its target over all entities, computed exactly in chunks of entities
whose scores are recomputed in the backward pass: nothing of size batch x entities x width is stored, and of size batch
x chunk only one chunk at a time. Triples of one source and relation share their softmax. N3 (Lacroix et al. 2018)
regularises; Adagrad moves all parameters.

A vector is the concatenation of blocks of equal width. The block "structure" starts at random; the block of a modality
starts from the principal components of its frozen features (--init pca, rows are trained freely afterwards) or is a
trained linear map of them (--init map). A run stores its state in OUT/ARM after each evaluation and continues from
there; each evaluation appends a row to OUT/results.jsonl. Only dev (the data set's valid split) is ranked.

With --blend the trained arm is compared as a term of the blend: its scores, those of a RotatE run and both, each with
the run's evidence. Weights are fitted on one half of the dev triples and ranks taken on the other, both ways
(cross-fit).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mocme_dist.config import Config
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.features import FeatureStore
from mocme_dist.data.known import KnownAnswers
from mocme_dist.evaluation.metrics import direction_metrics
from mocme_dist.evaluation.ranking import Queries, split_queries
from mocme_dist.evidence.facts import Facts
from mocme_dist.evidence.fit import FitSettings, Wanted, collect, fit_weights
from mocme_dist.evidence.shared_facts import SharedFacts
from mocme_dist.evidence.spaces import Space, sources_of, vector_space
from mocme_dist.evidence.terms import FACTS, Evidence
from mocme_dist.evidence.votes import Asked
from mocme_dist.kernels.distance import pool_distance
from mocme_dist.model.rotate import rotate
from mocme_dist.parallel.comm import single
from mocme_dist.runs.directory import RunDirectory
from mocme_dist.serving.rows import RunRows
from mocme_dist.train import config_of_run
from mocme_dist.training.evidence_plan import MODEL, EvidencePlan, numeric_statistics

_RANK_BLOCK = 512


class LogSumExp(torch.autograd.Function):
    """(B,) log of the sum over entities of exp(q . z), by chunks of entities; backward recomputes the scores."""

    @staticmethod
    def forward(ctx: Any, query_BD: Tensor, entity_ED: Tensor, chunk: int) -> Tensor:
        """Sum chunk by chunk."""
        total_B = query_BD.new_full((len(query_BD),), -torch.inf)
        for part_nD in entity_ED.split(chunk):
            total_B = torch.logaddexp(total_B, (query_BD @ part_nD.T).logsumexp(1))
        ctx.save_for_backward(query_BD, entity_ED, total_B)
        ctx.chunk = chunk
        return total_B

    @staticmethod
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of queries and entities: the softmax weighs the other side's vectors."""
        query_BD, entity_ED, total_B = ctx.saved_tensors
        grad_query_BD, grad_entity_ED = torch.zeros_like(query_BD), torch.empty_like(entity_ED)
        for start in range(0, len(entity_ED), ctx.chunk):
            part_nD = entity_ED[start : start + ctx.chunk]
            share_Bn = (query_BD @ part_nD.T).sub_(total_B[:, None]).exp_().mul_(grad_B[:, None])
            grad_query_BD += share_Bn @ part_nD
            torch.mm(share_Bn.T, query_BD, out=grad_entity_ED[start : start + ctx.chunk])
        return grad_query_BD, grad_entity_ED, None


def complex_product(left_BD: Tensor, right_BD: Tensor) -> Tensor:
    """(B, D) products of complex vectors whose first half is real and second half imaginary."""
    left_real, left_imaginary = left_BD.chunk(2, dim=1)
    right_real, right_imaginary = right_BD.chunk(2, dim=1)
    real = left_real * right_real - left_imaginary * right_imaginary
    return torch.cat([real, left_real * right_imaginary + left_imaginary * right_real], dim=1)


def cubes(value_BD: Tensor) -> Tensor:
    """(B,) sums of the cubed moduli of complex vectors."""
    real, imaginary = value_BD.chunk(2, dim=1)
    return (real.square() + imaginary.square()).add(1e-12).pow(1.5).sum(1)


class Bilinear(nn.Module):
    """ComplEx over blocks.

    Vectors of entities, relations with their reciprocals, and an offset of each relation's sources.

    Args:
        num_entities, num_relations: sizes of the graph.
        width: D, a multiple of twice the number of blocks.
        blocks: names of the blocks; all but "structure" have features.
        features: (E, F) of each modality, zeros where an entity has none.
        init: "pca" or "map", see the module.
        scale: standard deviation of rows that start from principal components.
    """

    def __init__(
        self,
        num_entities: int,
        num_relations: int,
        width: int,
        blocks: list[str],
        features: dict[str, Tensor],
        init: str,
        scale: float,
    ) -> None:
        super().__init__()
        block_width = width // len(blocks)
        self.row_EMd = nn.ParameterDict()
        self.map_MFd = nn.ParameterDict()
        self.features = features
        self.blocks = blocks
        for name in blocks:
            if name == "structure":
                self.row_EMd[name] = 1e-3 * torch.randn(num_entities, block_width)
            elif init == "pca":
                self.row_EMd[name] = scale * principal_components(features[name], block_width)
            else:
                F = features[name].shape[1]
                self.map_MFd[name] = torch.randn(F, block_width) / F**0.5
        self.relation_RD = nn.Parameter(1e-3 * torch.randn(2 * num_relations, width))
        self.offset_RD = nn.Parameter(torch.zeros(2 * num_relations, width))

    def entities(self) -> Tensor:
        """(E, D) vectors: each block's real parts, then each block's imaginary parts."""
        found = [
            self.row_EMd[name] if name in self.row_EMd else self.features[name] @ self.map_MFd[name]
            for name in self.blocks
        ]
        halves = [block_Ed.chunk(2, dim=1) for block_Ed in found]
        return torch.cat([half[part] for part in (0, 1) for half in halves], dim=1)

    def queries(self, source_BD: Tensor, relation_B: Tensor) -> Tensor:
        """(B, D) vectors whose dot product with an entity is its score."""
        return complex_product(source_BD + self.offset_RD[relation_B], self.relation_RD[relation_B])


def principal_components(features_EF: Tensor, width: int) -> Tensor:
    """(E, width) leading principal components with unit spread over all of them; zeros beyond the features' width."""
    centred_EF = features_EF - features_EF.mean(0)
    _, _, axis_FF = torch.linalg.svd(centred_EF.T @ centred_EF)
    found_EF = centred_EF @ axis_FF[:width].T
    found_EF = found_EF / found_EF.std().clamp_min(1e-6)
    return nn.functional.pad(found_EF, (0, width - found_EF.shape[1]))


def load_features(dataset: Dataset, blocks: list[str]) -> dict[str, Tensor]:
    """(E, F) features of the blocks' modalities, centred and of unit length; zeros where an entity has none."""
    found = {}
    for name in blocks:
        if name != "structure":
            store = FeatureStore.open(dataset.directory, name, 0, dataset.num_entities)
            value_EF, present_E = store.gather(torch.arange(dataset.num_entities))
            value_EF = value_EF.float()
            value_EF = value_EF - value_EF[present_E].mean(0)
            found[name] = nn.functional.normalize(value_EF, dim=1) * present_E[:, None]
    return found


class Batches:
    """The distinct (source, relation with reciprocals) of train with their targets, shuffled by epoch."""

    def __init__(self, dataset: Dataset) -> None:
        head, relation, tail = dataset.triples("train").astype(np.int64).T
        source = np.concatenate([head, tail])
        relation = np.concatenate([relation, relation + dataset.num_relations])
        target = np.concatenate([tail, head])
        key, index = np.unique(source * (2 * dataset.num_relations) + relation, return_inverse=True)
        order = np.argsort(index, kind="stable")
        self.source_U, self.relation_U = np.divmod(key, 2 * dataset.num_relations)
        self.target_T = target[order]
        self.offset_U = np.searchsorted(index[order], np.arange(len(key) + 1))
        self.num_triples = len(target)

    def epoch(self, size: int, seed: int) -> Any:
        """Batches of (source, relation, number of targets, flat targets, query of each target)."""
        order = np.random.default_rng(seed).permutation(len(self.source_U))
        for start in range(0, len(order), size):
            at = order[start : start + size]
            low, high = self.offset_U[at], self.offset_U[at + 1]
            count = high - low
            query = np.repeat(np.arange(len(at)), count)
            place = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + np.repeat(low, count)
            arrays = (self.source_U[at], self.relation_U[at], count, self.target_T[place], query)
            yield tuple(torch.from_numpy(array) for array in arrays)


def train_epoch(model: Bilinear, batches: Batches, optimizer: torch.optim.Optimizer, args: Any, epoch: int) -> float:
    """The mean loss per triple of one epoch, without the regulariser."""
    total = 0.0
    for source, relation, count, target, query in batches.epoch(args.batch, 1000 * args.seed + epoch):
        entity_ED = model.entities()
        source_BD = entity_ED[source]
        query_BD = model.queries(source_BD, relation)
        target_TD = entity_ED[target]
        everyone_B = LogSumExp.apply(query_BD, entity_ED, args.chunk)
        score_T = (query_BD[query] * target_TD).sum(1)
        fit = ((count * everyone_B).sum() - score_T.sum()) / len(target)
        n3 = (count * (cubes(source_BD) + cubes(model.relation_RD[relation]))).sum() + cubes(target_TD).sum()
        optimizer.zero_grad()
        (fit + args.n3 * n3 / len(target)).backward()
        optimizer.step()
        total += float(fit.detach()) * len(target)
    return total / batches.num_triples


def score_block(model: Bilinear, entity_ED: Tensor, queries: Queries, num_relations: int) -> Tensor:
    """(Q, E) scores."""
    relation = torch.from_numpy(queries.relation + num_relations * queries.direction)
    return model.queries(entity_ED[torch.from_numpy(queries.source)], relation) @ entity_ED.T


@torch.no_grad()
def rank(model: Bilinear, dataset: Dataset, queries: Queries) -> np.ndarray:
    """(Q,) filtered ranks, ties at their mean."""
    known, entity_ED, ranks = dataset.known("all"), model.entities(), []
    for start in range(0, len(queries.source), _RANK_BLOCK):
        some = queries.take(slice(start, start + _RANK_BLOCK))
        score_QE = score_block(model, entity_ED, some, dataset.num_relations)
        ranks.append(filtered_ranks(score_QE, some, known))
    return np.concatenate(ranks)


def filtered_ranks(score_QE: Tensor, queries: Queries, known: KnownAnswers) -> np.ndarray:
    """(Q,) ranks of the targets among candidates that are not known answers; scores are overwritten."""
    target_Q1 = score_QE.gather(1, torch.from_numpy(queries.target)[:, None])
    offsets, answers = known.lookup(queries.source, queries.relation, queries.direction)
    row = np.repeat(np.arange(len(queries.source)), np.diff(offsets))
    score_QE[torch.from_numpy(row), torch.from_numpy(answers)] = -torch.inf
    above_Q, equal_Q = (score_QE > target_Q1).sum(1), (score_QE == target_Q1).sum(1)
    return np.asarray((1 + above_Q + equal_Q / 2).numpy())


def run(args: argparse.Namespace) -> None:
    """Train one arm, or continue it."""
    dataset, model, optimizer = _load(args)
    batches = Batches(dataset)
    queries = split_queries(dataset.triples("valid"), args.eval_queries)
    folder = args.out / args.arm
    folder.mkdir(parents=True, exist_ok=True)
    done, seconds = restore(folder, model, optimizer)
    for epoch in range(done, args.epochs):
        began = time.perf_counter()
        loss = train_epoch(model, batches, optimizer, args, epoch)
        seconds += time.perf_counter() - began
        if (epoch + 1) % args.eval_every and epoch + 1 < args.epochs:
            continue
        metrics = direction_metrics(rank(model, dataset, queries), queries.direction)
        row = {"arm": args.arm, "data": args.dataset.name, "epoch": epoch + 1, "loss": round(loss, 4)}
        row |= {"seconds": round(seconds), **figures(metrics)}
        row |= {
            name: getattr(args, name) for name in ("width", "blocks", "init", "scale", "n3", "rate", "batch", "seed")
        }
        write_row(args.out, row)
        save(folder, model, optimizer, epoch + 1, seconds)


def _load(args: argparse.Namespace) -> tuple[Dataset, Bilinear, torch.optim.Optimizer]:
    """Return the data set, a new model of the arm and its optimizer."""
    torch.manual_seed(args.seed)
    dataset = Dataset.open(args.dataset, check_shards=False)
    features = load_features(dataset, args.blocks)
    sizes = (dataset.num_entities, dataset.num_relations, args.width)
    model = Bilinear(*sizes, args.blocks, features, args.init, args.scale)
    return dataset, model, torch.optim.Adagrad(model.parameters(), lr=args.rate)


@torch.no_grad()
def rotate_vectors(config: Config, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Return the fused vectors (E, D) and phases (R, C) of the best checkpoint of a run."""
    saved = RunDirectory(config.run.dir).checkpoints.find("auto", best=True)
    if saved is None:
        raise SystemExit(f"{config.run.dir}: no checkpoint")
    rows = RunRows(config, dataset, saved)
    return torch.cat([block.z_nD for block in rows.blocks(0, dataset.num_entities)]), rows.phase_RC


def make_evidence(config: Config, dataset: Dataset, z_ED: Tensor) -> Evidence:
    """Return the evidence of a run's configuration, of all entities."""
    E, settings, spaces = dataset.num_entities, config.evidence, list[Space]()
    names = EvidencePlan(config, dataset, 1).spaces
    for name in ("text", "numeric", "image"):
        if (dataset.directory / "features" / name).is_dir():
            store = FeatureStore.open(dataset.directory, name, 0, E)
            betas = (settings.beta_coordinates, settings.beta)
            found = sources_of(name, store.gather, E, numeric_statistics(dataset, name), single(), betas)
            spaces += [source.fill(0, E, torch.device("cpu")) for source in found if source.name in names]
    if MODEL in names:
        spaces.append(vector_space(MODEL, z_ED, settings.beta))
    facts = Facts(dataset.known("train"), E)
    shared = SharedFacts(facts, 0, E, settings.max_holders, settings.max_answers) if FACTS in names else None
    return Evidence(facts, spaces, shared, 0, E, settings.neighbours, settings.beta, single())


class BlendTrial:
    """Cross-fitted blends of some model terms on one set of dev queries."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.dataset, self.model, optimizer = _load(args)
        restore(args.out / args.arm, self.model, optimizer)
        self.config = config_of_run(str(args.blend))
        self.z_ED, self.phase_RC = rotate_vectors(self.config, self.dataset)
        self.entity_ED = self.model.entities().detach()
        self.evidence = make_evidence(self.config, self.dataset, self.z_ED)
        self.queries = split_queries(self.dataset.triples("valid"), args.eval_queries)

    def model_terms(self, kinds: tuple[str, ...], queries: Queries) -> Tensor:
        """Return (terms, Q, E) scores of the models."""
        found = []
        if "rotate" in kinds:
            sign_Q = torch.from_numpy(1.0 - 2.0 * queries.direction).float()
            phase_QC = self.phase_RC[torch.from_numpy(queries.relation)]
            query_QD = rotate(self.z_ED[torch.from_numpy(queries.source)], phase_QC, sign_Q)
            found.append(-pool_distance(query_QD[None], self.z_ED[None], True)[0])
        if "bilinear" in kinds:
            found.append(score_block(self.model, self.entity_ED, queries, self.dataset.num_relations))
        return torch.stack(found)

    def fit(self, kinds: tuple[str, ...], queries: Queries) -> Tensor:
        """Return the (places, terms) weights fitted on these queries."""
        asked, index_Q = Asked.distinct(queries.source, queries.relation, queries.direction)
        offsets, known = self.dataset.known("all").lookup(queries.source, queries.relation, queries.direction)
        wanted = Wanted(index_Q, queries.target, offsets, known)

        def values(at_q: np.ndarray) -> Tensor:
            return self.model_terms(kinds, queries.take(at_q))

        E, seed = self.dataset.num_entities, self.config.train.seed
        sample = collect(self.evidence, self.evidence.prepare(asked), wanted, values, E, seed)
        allowed_F = torch.ones(len(kinds) + len(self.evidence.terms), dtype=torch.bool)
        fit = FitSettings(**self.config.blend.model_dump(exclude={"frequency", "queries"}), seed=seed)
        with torch.enable_grad():
            return fit_weights(sample, 2 * self.dataset.num_relations, len(kinds), allowed_F, fit)

    def rank(self, kinds: tuple[str, ...], queries: Queries, weight_PF: Tensor) -> np.ndarray:
        """Return (Q,) filtered ranks under a table of weights, by brute force."""
        known, ranks, every = self.dataset.known("all"), [], np.arange(self.dataset.num_entities)
        for start in range(0, len(queries.source), 256):
            some = queries.take(slice(start, start + 256))
            asked, index_Q = Asked.distinct(some.source, some.relation, some.direction)
            terms = dict(self.evidence.values(self.evidence.prepare(asked), index_Q, every))
            value_FQE = torch.cat([self.model_terms(kinds, some), torch.stack([*terms.values()])])
            place_Q = torch.from_numpy(2 * some.relation + some.direction)
            score_QE = torch.einsum("fqe,qf->qe", value_FQE, weight_PF[place_Q])
            ranks.append(filtered_ranks(score_QE, some, known))
        return np.concatenate(ranks)

    @torch.no_grad()
    def mrr(self, kinds: tuple[str, ...]) -> dict[str, float]:
        """Return the cross-fitted metrics."""
        half = np.arange(len(self.queries.source)) // 2 % 2
        rank_Q = np.zeros(len(half))
        for fold in (0, 1):
            weight_PF = self.fit(kinds, self.queries.take(np.flatnonzero(half != fold)))
            at = np.flatnonzero(half == fold)
            rank_Q[at] = self.rank(kinds, self.queries.take(at), weight_PF)
        return direction_metrics(rank_Q, self.queries.direction)


def blend(args: argparse.Namespace) -> None:
    """Compare the terms."""
    trial = BlendTrial(args)
    for kinds in (("rotate",), ("bilinear",), ("rotate", "bilinear")):
        metrics = trial.mrr(kinds)
        row = {"arm": args.arm, "data": args.dataset.name, "blend": "+".join(kinds), "run": args.blend.name}
        row |= {"queries": len(trial.queries.source), **figures(metrics)}
        write_row(args.out, row)


def figures(metrics: dict[str, Any]) -> dict[str, float]:
    """Return the rounded metrics of a row."""
    found = {name: round(metrics[name], 4) for name in ("mrr", "hits@1", "hits@10")}
    return found | {f"{side}_mrr": round(metrics[side]["mrr"], 4) for side in ("head", "tail")}


def write_row(out: Path, row: dict[str, Any]) -> None:
    """Append a row to the results and print it."""
    with (out / "results.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def save(folder: Path, model: Bilinear, optimizer: torch.optim.Optimizer, epoch: int, seconds: float) -> None:
    """Store parameters, sums of Adagrad and the number of epochs; the last rename commits them."""
    sums = {name: optimizer.state[value]["sum"] for name, value in model.named_parameters()}
    tensors = {f"value.{name}": value.detach() for name, value in model.named_parameters()}
    tensors |= {f"sum.{name}": value for name, value in sums.items()}
    save_file(tensors, folder / "state.tmp", {"epoch": str(epoch), "seconds": str(seconds)})
    (folder / "state.tmp").replace(folder / "state.safetensors")


def restore(folder: Path, model: Bilinear, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Load what `save` stored, if anything; return the number of epochs and their seconds."""
    path = folder / "state.safetensors"
    if not path.is_file():
        return 0, 0.0
    tensors = load_file(path)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(tensors[f"value.{name}"])
            optimizer.state[value]["sum"].copy_(tensors[f"sum.{name}"])
    with safe_open(path, "pt") as file:
        said = file.metadata()
    return int(said["epoch"]), float(said["seconds"])


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--arm", required=True, help="name of the run; its state is kept in OUT/ARM")
    parser.add_argument("--blocks", nargs="+", default=["structure"])
    parser.add_argument("--init", choices=["pca", "map"], default="pca")
    parser.add_argument("--scale", type=float, default=0.1)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--n3", type=float, default=0.005)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--batch", type=int, default=1000, help="distinct queries per step")
    parser.add_argument("--chunk", type=int, default=4096, help="entities scored at once")
    parser.add_argument("--eval-every", type=int, default=5)
    parser.add_argument("--eval-queries", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--blend", type=Path, metavar="RUN", help="compare the trained arm as a term of a run's blend")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.blend:
        blend(args)
    else:
        run(args)


if __name__ == "__main__":
    main()
