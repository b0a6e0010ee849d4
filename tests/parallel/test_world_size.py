"""The law of the step: the same losses, rows and dense parameters at any world size."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from plain_settings import FUSION, LOSS, MODEL, WEIGHTING
from torch import Tensor

from mocme_dist.batching.batch import BatchMaker
from mocme_dist.batching.sampler import QuerySampler
from mocme_dist.data.known import KnownAnswers
from mocme_dist.model.blocks import make_blocks
from mocme_dist.model.loss import completion_loss
from mocme_dist.model.mocme import MoCME
from mocme_dist.parallel.comm import Comm
from mocme_dist.parallel.exchange import plan_route
from mocme_dist.parallel.table import EntityTable
from mocme_dist.partition import RowPartition
from mocme_dist.training.engine import TorchEngine
from mocme_dist.training.step import EntityInput, MicroBatch, StepModule, train_step
from mocme_dist.training.tally import STAT_NAMES, Tally
from mocme_dist.training.timer import PhaseTimer

R, D, F = 3, 8, 5


class Case(NamedTuple):
    num_entities: int = 61
    num_triples: int = 45
    loss: str = "contrastive"
    optimizer: str = "adam"
    estimator: str = "uniform"
    weight_gradient: str = "stop"
    batch_size: int = 20
    steps: int = 4
    clip: float = 0.0
    mine_rate: float = 0.01
    parts: int = 1
    dtype: torch.dtype = torch.float32
    width: int = D
    precision: str = "float32"
    form: str = "sum"


class Outcome(NamedTuple):
    losses: list[float]
    rows_ED: Tensor
    dense: dict[str, Tensor]
    information: dict[str, Tensor]


def graph(case: Case) -> np.ndarray:
    """Triples of which some entities are no part, so that rows stay untouched."""
    gen = np.random.default_rng(0)
    limit, count = max(2, case.num_entities * 3 // 4), 3 * case.num_triples
    triples = np.stack(
        [gen.integers(limit, size=count), gen.integers(R, size=count), gen.integers(limit, size=count)], 1
    )
    return gen.permutation(np.unique(triples, axis=0))[: case.num_triples]


def features(case: Case) -> tuple[Tensor, Tensor]:
    """Text and numbers side by side: (2, E, F), and who has them."""
    gen = torch.Generator().manual_seed(1)
    values = torch.randn(2, case.num_entities, F, generator=gen)
    return values, torch.rand(2, case.num_entities, generator=gen) < 0.7


def train(comm: Comm, case: Case) -> Outcome:
    """Body of one rank: a few steps as the loop does them."""
    triples_T3 = graph(case)
    partition = RowPartition(case.num_entities, comm.world_size)
    first, _ = partition.bounds(comm.rank)
    blocks = make_blocks(case.form, 3, case.width)
    table = EntityTable(
        partition, comm.rank, blocks.width, optimizer=case.optimizer, learning_rate=0.01, seed=2, dtype=case.dtype
    )
    how = {"estimator": case.estimator, "weight_gradient": case.weight_gradient, "hidden": 16, "ema": 0.8}
    sizes = {"width": case.width, "num_experts": 2, "gamma": 6.0, "form": case.form}
    settings = MODEL._replace(**sizes, fusion=FUSION._replace(**how), precision=case.precision)
    model = MoCME({"structure": blocks.width, "text": F, "numeric": F}, R, settings, seed=2)
    weighting = WEIGHTING._replace(kind="entropy_adversarial")
    loss = LOSS._replace(kind=case.loss, gamma=6.0, weighting=weighting, blocks=blocks.num)
    module = StepModule(model, loss, comm, PhaseTimer())
    groups: dict[bool, list[Tensor]] = {False: [], True: []}
    for name, parameter in module.named_parameters():
        groups[".mine." in name].append(parameter)
    rates = ((False, 0.01), (True, case.mine_rate))
    engine = TorchEngine(module, [{"params": groups[own], "lr": rate} for own, rate in rates], case.clip, comm)
    sampler = QuerySampler(len(triples_T3), case.batch_size, seed=2)
    negatives = 0 if case.loss == "one_vs_all" else 6
    known = KnownAnswers.build(triples_T3, R)
    maker = BatchMaker(
        triples_T3, known, case.num_entities, sampler, 4, negatives, comm.rank, comm.world_size, case.parts
    )
    values, present = features(case)
    losses = []
    for step in range(case.steps):
        parts = []
        for number in range(case.parts):
            batch = maker.make(step, number)
            route = plan_route(batch.ids_U, partition, comm)
            rows_VD = table.gather(route.rows_V)
            ids_V = route.rows_V + first
            raw = {"structure": rows_VD, "text": values[0, ids_V], "numeric": values[1, ids_V]}
            has = torch.cat([torch.ones(1, len(ids_V), dtype=torch.bool), present[:, ids_V]])
            parts.append(
                MicroBatch(rows_VD, EntityInput(raw, has, ids_V % 2 == 1), route, batch, number == case.parts - 1)
            )
        result = train_step(engine, table, parts, comm, Tally(comm.device), estimate=True, timer=PhaseTimer())
        assert not result.skipped
        sums = dict(zip(STAT_NAMES, result.sums.tolist(), strict=True))
        assert sums["queries"] == batch.total
        losses.append(sums["loss"] / sums["queries"])
    rows_ED = torch.cat([torch.from_numpy(rows) for rows in comm.gather(table.rows_rD.float().numpy())])
    state = engine.state()
    for other in comm.gather({name: value.numpy() for name, value in state.items()}):
        for name, value in state.items():
            assert np.array_equal(other[name], value.numpy()), f"ranks differ in {name}"
    information = {name: value for name, value in state.items() if name.endswith("information_P")}
    return Outcome(
        losses, rows_ED, {name: value for name, value in state.items() if name.startswith("value/")}, information
    )


def train_all(comm: Comm, cases: list[Case]) -> list[Outcome]:
    return [train(comm, case) for case in cases]


def outcomes(run_ranks: Any, cases: list[Case], worlds: tuple[int, ...]) -> list[list[Outcome]]:
    """By case, the outcome at each world size; starting ranks costs more than the steps, so all cases share a start."""
    found = []
    for world in worlds:
        ranks = run_ranks(world, train_all, cases)
        for case_of_ranks in zip(*ranks, strict=True):
            first = case_of_ranks[0]
            assert all(
                torch.equal(other.rows_ED, first.rows_ED) and other.losses == first.losses for other in case_of_ranks
            )
        found.append(ranks[0])
    return [list(case) for case in zip(*found, strict=True)]


CASES = {
    "contrastive": Case(),
    "clipped": Case(optimizer="adagrad", clip=0.05),
    "one_vs_all": Case(loss="one_vs_all"),
    "fewer rows than ranks": Case(num_entities=2, num_triples=4),
    "cosine": Case(estimator="cosine"),
    # 90 queries in batches of 64: the second step of the epoch has 26, and ranks that have only filling.
    "short last batch": Case(batch_size=64, steps=5),
    # 5 chunks in 3 parts: ranks of 2 and more have parts of nothing but filling.
    "in parts": Case(parts=3, clip=0.05),
    "blocks": Case(form="blocks", width=4 * D),
    "weights that flow": Case(num_entities=5, num_triples=6, estimator="mine", weight_gradient="flow"),
    "bfloat16": Case(dtype=torch.bfloat16, optimizer="adagrad", steps=3),
    # `one_vs_all` touches every row at every step, so Adam on touched rows is Adam; small steps are clipped hard.
    "clipped hard": Case(loss="one_vs_all", clip=0.01, steps=6),
    "in two parts": Case(parts=2),
    "in seven parts": Case(parts=7),
    "products in bfloat16": Case(width=32, precision="bfloat16"),
}


@pytest.fixture(scope="module")
def found(run_ranks: Any) -> dict[str, list[Outcome]]:
    """Outcomes of every case at 1, 2, 3 and 4 ranks."""
    return dict(zip(CASES, outcomes(run_ranks, list(CASES.values()), (1, 2, 3, 4)), strict=True))


def test_products_in_bfloat16_agree_up_to_their_digits(found):
    """Ranks hold other rows, and no row's numbers depend on its neighbours."""
    plain, *others = found["products in bfloat16"]
    for other in others:
        # The first loss is rounded alike everywhere; gradients are sums in another order, whose bfloat16 may tip.
        assert other.losses[0] == pytest.approx(plain.losses[0], rel=1e-6)
        assert other.losses == pytest.approx(plain.losses, rel=2**-9)
        assert (other.rows_ED - plain.rows_ED).norm() <= 2**-8 * plain.rows_ED.norm()


@pytest.mark.parametrize("name", list(CASES)[:8])
def test_steps_agree_at_every_world_size(found, name):
    case, (plain, *others) = CASES[name], found[name]
    assert plain.losses[-1] != plain.losses[0]
    start = EntityTable(RowPartition(case.num_entities, 1), 0, plain.rows_ED.shape[1], seed=2).rows_rD
    assert (plain.rows_ED != start).any(1).sum() > case.num_entities / 2
    for other in others:
        assert other.losses == pytest.approx(plain.losses, rel=1e-5)
        torch.testing.assert_close(other.rows_ED, plain.rows_ED, rtol=1e-4, atol=1e-5)
        # Rows that no step asked for are those of the start, at every world size alike.
        assert torch.equal((other.rows_ED == start).all(1), (plain.rows_ED == start).all(1))
        for name, value in plain.dense.items():
            torch.testing.assert_close(
                other.dense[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


def plain_twin(comm: Comm, case: Case) -> Outcome:
    """One torch model that holds the table as well.

    One Adam, one clip_grad_norm_ over everything, no ranks and no routes.
    """
    triples_T3 = graph(case)
    fusion = FUSION._replace(estimator=case.estimator)
    settings = MODEL._replace(width=D, num_experts=2, gamma=6.0, fusion=fusion)
    model = MoCME({"structure": D, "text": F, "numeric": F}, R, settings, seed=2)
    rows = torch.nn.Parameter(EntityTable(RowPartition(case.num_entities, 1), 0, D, seed=2).rows_rD.clone())
    everything = [*model.parameters(), rows]
    adam = torch.optim.Adam(everything, lr=0.01)
    values, present = features(case)
    known = KnownAnswers.build(triples_T3, R)
    maker = BatchMaker(
        triples_T3, known, case.num_entities, QuerySampler(len(triples_T3), case.batch_size, seed=2), 4, 0, 0, 1
    )
    has = torch.cat([torch.ones(1, case.num_entities, dtype=torch.bool), present])
    losses = []
    for step in range(case.steps):
        batch = maker.make(step)
        z_ED = model.encode({"structure": rows, "text": values[0], "numeric": values[1]}, has).z_VD
        ends = (
            z_ED[batch.source_Gb],
            model.relations(batch.relation_Gb),
            batch.sign_Gb,
            z_ED[batch.target_Gb],
            z_ED[batch.pool_GN],
        )
        loss, _ = completion_loss(*ends, batch.allowed_GbN, batch.weight_Gb, LOSS._replace(kind=case.loss, gamma=6.0))
        adam.zero_grad()
        (loss / batch.total).backward()
        torch.nn.utils.clip_grad_norm_(everything, case.clip)
        adam.step()
        losses.append(float(loss) / batch.total)
    return Outcome(
        losses, rows.detach(), {f"value/model.{name}": p.detach() for name, p in model.named_parameters()}, {}
    )


def test_clipping_is_by_one_norm_over_the_dense_part_and_the_rows(run_ranks, found):
    (plain,) = run_ranks(1, plain_twin, CASES["clipped hard"])
    for other in found["clipped hard"]:
        assert other.losses == pytest.approx(plain.losses, rel=1e-5)
        torch.testing.assert_close(other.rows_ED, plain.rows_ED, rtol=1e-4, atol=1e-5)
        for name, value in plain.dense.items():
            torch.testing.assert_close(
                other.dense[name], value, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("name", ["in two parts", "in seven parts"])
def test_a_step_in_parts_is_the_step_of_the_whole_batch(found, name):
    whole = found["contrastive"][0]
    for cut in found[name]:
        assert cut.losses == pytest.approx(whole.losses, rel=1e-5)
        torch.testing.assert_close(cut.rows_ED, whole.rows_ED, rtol=1e-4, atol=1e-5)


def test_bfloat16_rows_agree_at_every_world_size_but_for_single_digits(found):
    """A sum in another order may fall on the other side of a random number: one digit of a few rows, never more."""
    plain, *others = found["bfloat16"]
    for other in others:
        assert other.losses == pytest.approx(plain.losses, rel=1e-3)
        torch.testing.assert_close(other.rows_ED, plain.rows_ED, rtol=2**-7, atol=1e-4)
        assert (other.rows_ED != plain.rows_ED).double().mean() < 0.01


def test_information_estimates_agree_at_every_world_size_within_sampling_error(run_ranks):
    """Ranks pair rows among their own, so marginal samples differ; the estimates differ by that alone."""
    case = Case(num_entities=400, num_triples=300, estimator="mine", batch_size=200, steps=12, mine_rate=0.03)
    ((plain, *others),) = outcomes(run_ranks, [case], (1, 2, 3, 4))
    moved = torch.cat(list(plain.information.values()))
    assert moved.max() > 0.2
    for other in others:
        assert other.losses == pytest.approx(plain.losses, rel=2e-3)
        for name, value in plain.information.items():
            # Some 150 held-out rows: one marginal sample's log mean exp deviates by about 0.1.
            torch.testing.assert_close(other.information[name], value, rtol=0.25, atol=0.1)


def test_weights_that_flow_take_steps_at_every_world_size(found):
    for other in found["weights that flow"]:
        assert np.isfinite(other.losses).all()
        assert torch.isfinite(other.rows_ED).all()
