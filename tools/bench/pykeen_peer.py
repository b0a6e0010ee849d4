"""PyKEEN as it is shipped, at a benchmark's shapes: its training loop and its evaluator."""

from __future__ import annotations

import logging
import time
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mocme_dist.encoders.torchvision_shim import prepare_torchvision
from tools.bench.common import DEVICE

prepare_torchvision()  # pykeen imports torchvision where it finds it
warnings.filterwarnings("ignore", category=UserWarning)
logging.getLogger("pykeen").setLevel(logging.ERROR)

from pykeen.evaluation import RankBasedEvaluator  # noqa: E402
from pykeen.losses import NSSALoss  # noqa: E402
from pykeen.models import ERModel, RotatE  # noqa: E402
from pykeen.nn.init import PretrainedInitializer  # noqa: E402
from pykeen.nn.modules import RotatEInteraction  # noqa: E402
from pykeen.training import SLCWATrainingLoop, TrainingCallback  # noqa: E402
from pykeen.triples import CoreTriplesFactory  # noqa: E402


class _Marks(TrainingCallback):
    """Notes when each batch ended."""

    def __init__(self) -> None:
        super().__init__()
        self.at = [time.perf_counter()]

    def post_batch(self, epoch: int, batch: Any, **kwargs: Any) -> None:
        self.at.append(time.perf_counter())


def train_steps(
    triples_T3: np.ndarray,
    num_entities: int,
    num_relations: int,
    queries: int,
    negatives: int,
    width: int,
    warmup: int,
    gamma: float,
) -> list[float]:
    """Seconds of each training step of PyKEEN's RotatE in its own loop: sampling, forward, backward, Adam, constraints.

    One epoch of `triples_T3`; self-adversarial loss, `negatives` corrupted triples for each positive one, float32 and
    width / 2 complex numbers, so as many parameters as a width of real numbers.
    """
    factory = CoreTriplesFactory.create(
        torch.from_numpy(triples_T3), num_entities=num_entities, num_relations=num_relations
    )
    loss = NSSALoss(margin=gamma, adversarial_temperature=1.0)
    model = RotatE(triples_factory=factory, embedding_dim=width // 2, loss=loss, random_seed=0).to(DEVICE)
    loop = SLCWATrainingLoop(
        model=model,
        triples_factory=factory,
        optimizer=torch.optim.Adam(model.get_grad_params(), lr=1e-3),
        negative_sampler="basic",
        negative_sampler_kwargs={"num_negs_per_pos": negatives},
    )
    marks = _Marks()
    loop.train(
        triples_factory=factory,
        num_epochs=1,
        batch_size=queries,
        use_tqdm=False,
        callbacks=marks,
        drop_last=True,
        pin_memory=False,
    )
    return np.diff(marks.at)[warmup:].tolist()


class SumOfModuli(RotatEInteraction):
    """The published distance: PyKEEN's own takes one 2-norm over all dimensions."""

    def forward(self, h: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """Scores, larger is better."""
        return -(h * r - t).abs().sum(-1)


def make_model(z_ED: Tensor, phase_RC: Tensor, triples_T3: np.ndarray, published: bool) -> ERModel:
    """A model that holds these embeddings, with the published distance or with PyKEEN's own."""
    factory = CoreTriplesFactory.create(
        torch.from_numpy(triples_T3), num_entities=len(z_ED), num_relations=len(phase_RC)
    )
    z_ED, phase_RC = z_ED.cpu(), phase_RC.cpu()
    entities, relations = torch.complex(*z_ED.chunk(2, -1)), torch.polar(torch.ones_like(phase_RC), phase_RC)
    given = [
        {
            "shape": (value.shape[1],),
            "dtype": torch.cfloat,
            "initializer": PretrainedInitializer(torch.view_as_real(value)),
        }
        for value in (entities, relations)
    ]
    return ERModel(
        triples_factory=factory,
        interaction=SumOfModuli if published else RotatEInteraction,
        entity_representations_kwargs=given[0],
        relation_representations_kwargs=given[1],
    ).to(DEVICE)


def evaluate(model: ERModel, test_T3: np.ndarray, known_T3: np.ndarray, batch_size: int) -> tuple[float, np.ndarray]:
    """(seconds, ranks) of PyKEEN's filtered evaluator on both sides of every triple.

    Ranks are tail, head, tail, head ...
    """
    evaluator = RankBasedEvaluator(filtered=True, clear_on_finalize=False)
    start = time.perf_counter()
    evaluator.evaluate(
        model,
        torch.from_numpy(test_T3),
        batch_size=batch_size,
        additional_filter_triples=[torch.from_numpy(known_T3)],
        use_tqdm=False,
    )
    seconds = time.perf_counter() - start
    tail, head = (np.concatenate(evaluator.ranks[side, "realistic"]) for side in ("tail", "head"))
    return seconds, np.stack([tail, head], 1).ravel().astype(np.float64)
