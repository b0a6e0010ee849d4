"""The training loop of one rank: resume, step through the epochs, evaluate, save. It receives saver, finder and
reporter."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mocme_dist.batching.sampler import key64
from mocme_dist.config import dump_config
from mocme_dist.data.progress import Progress
from mocme_dist.errors import CheckpointError, DivergedError, Preempted
from mocme_dist.memory import return_pages
from mocme_dist.parallel.table import EntityTable
from mocme_dist.prefetch import Prefetcher
from mocme_dist.training import checkpoint
from mocme_dist.training.checkpoint import Saved
from mocme_dist.training.engine_rows import EngineRows
from mocme_dist.training.prefetch import Prepared
from mocme_dist.training.rates import Schedule
from mocme_dist.training.step import StepResult, train_step
from mocme_dist.training.tally import EXPLODED
from mocme_dist.training.worker import Worker

log = logging.getLogger(__name__)


class Saver(Protocol):
    """Writes checkpoints; every rank calls it."""

    def save(
        self, step: int, table: EntityTable | EngineRows, dense: Mapping[str, Tensor], manifest: dict[str, Any]
    ) -> str | None:
        """Save a checkpoint; return its path or URL, None if it could not be saved."""

    def flush(self) -> None:
        """Finish what `save` left to be done."""


class Reporter:
    """Receives what the loop does, on every rank; this one ignores it."""

    def running(self) -> AbstractContextManager[object]:
        """Return a context that lasts as long as the steps."""
        return nullcontext()

    def before_step(self, step: int) -> None:
        """Called before each step, counted from 0."""

    def after_step(self, step: int, result: StepResult, sent_vectors: int) -> None:
        """Called after each step with the number of steps so far."""

    def evaluated(self, step: int, epoch: int, metrics: dict[str, Any], seconds: float) -> None:
        """Called with the metrics of the validation split."""

    def manifest_fields(self) -> dict[str, Any]:
        """Return fields that each checkpoint keeps for a later start of the run."""
        return {}

    def saved(self, place: str | None, manifest: dict[str, Any]) -> None:
        """Called after each checkpoint with its path or URL, None if it could not be saved."""


def restore(worker: Worker, saved: Saved) -> None:
    """Load a checkpoint of any number of ranks and any ZeRO stage into a worker; collective.

    Raises:
        CheckpointError: it was made with other settings, or its files do not cover this rank's rows.
    """
    checkpoint.check_compatible(saved, worker.identity)
    return_pages()
    checkpoint.load_rows(saved, worker.table)
    try:
        worker.engine.load_state(checkpoint.load_dense(saved), worker.table.num_updates)
    except CheckpointError as error:
        raise CheckpointError(f"{saved.path}: {error}") from None


class Loop:
    """Position of a run: steps done, best metric so far, and when to stop.

    Attributes:
        step: number of steps done.
        last_step: number of steps of the whole run.
        saved_step: step of the newest checkpoint; 0 without any.
    """

    def __init__(self, worker: Worker, saver: Saver) -> None:
        self.worker, self.comm, self.saver = worker, worker.comm, saver
        self.config = worker.config
        self.steps_per_epoch = worker.maker.sampler.steps_per_epoch
        self.last_step = self.config.train.epochs * self.steps_per_epoch
        self.schedule = Schedule(self.config.train.schedule, self.config.train.warmup_steps, self.last_step)
        self.best_mrr, self.bad_evaluations = -math.inf, 0
        self.step = self.saved_step = self._checked_step = 0
        self._skipped = 0
        self.reporter = Reporter()

    def resume(self, find: Callable[[str], Saved | None]) -> Saved | None:
        """Continue from the checkpoint that `find` returns for run.resume; return it. Collective."""
        saved = find(self.config.run.resume)
        if saved is None:
            return None
        restore(self.worker, saved)
        self.step = self.saved_step = saved.step
        best_mrr = saved.manifest.get("best_mrr")
        self.best_mrr = -math.inf if best_mrr is None else best_mrr
        self.bad_evaluations = saved.manifest.get("bad_evaluations", 0)
        # Absent in older checkpoints.
        in_row, exploded = saved.manifest.get("nonfinite", 0), saved.manifest.get("exploded", 0)
        first_loss = saved.manifest.get("first_loss") or 0.0
        monitored = saved.manifest.get("monitor") or {}
        self._skipped = monitored.get("total_skipped", 0)
        self.worker.tally.restore(monitored.get("sums", []), self._skipped, in_row, first_loss, exploded)
        return saved

    @property
    def is_over(self) -> bool:
        """Whether no step is left."""
        patience = self.config.train.patience
        return self.step >= self.last_step or bool(patience and self.bad_evaluations >= patience)

    def train(self, reporter: Reporter, stop: Callable[[], bool]) -> None:
        """Step until the last epoch, the end of patience, or a stop; collective.

        Args:
            stop: called once per step; True on any rank saves a checkpoint and raises Preempted on all.

        Raises:
            Preempted, DivergedError, StorageError: see `errors`.
        """
        self.reporter = reporter
        prepared_steps = map(self.worker.prepare, range(self.step, self.last_step))
        with Prefetcher(prepared_steps, what="the batch of a step") as batches, reporter.running():
            stream = iter(batches)
            while not self.is_over:
                reporter.before_step(self.step)
                with self.worker.timer.phase("wait"):
                    prepared = next(stream)
                self._seed_dropout()
                self.worker.stop_asked = stop() or self.worker.stop_asked
                result = self._take_step(prepared)
                self.step += 1
                reporter.after_step(self.step, result, sum(ready.route.sent_vectors for ready in prepared))
                self._end_step(prepared)

    def _take_step(self, prepared: list[Prepared]) -> StepResult:
        worker, estimate = self.worker, self.step % self.config.mine.every == 0
        factor = self.schedule.factor(self.step)
        if worker.graph is not None:
            return worker.graph_step(prepared, estimate, factor)
        worker.scale_rates(factor)
        return train_step(
            worker.engine,
            worker.table,
            worker.micro_batches(prepared, self.step),
            self.comm,
            worker.tally,
            estimate=estimate,
            timer=worker.timer,
            merge=prepared[-1].merge,
        )

    def _seed_dropout(self) -> None:
        """Make dropout a function of seed, step and rank, so that a resumed run draws the same."""
        if self.config.projection.dropout or self.config.experts.dropout:
            torch.manual_seed(int(key64(self.config.train.seed, 3, self.step, self.comm.rank) >> np.uint64(1)))

    def _end_step(self, prepared: list[Prepared]) -> None:
        """Evaluate and save at the ends of epochs that are due, and if the run is asked to stop.

        The device is asked whether steps were finite once per log interval, and before it evaluates or saves.
        """
        train, at_end = self.config.train, self.step == self.last_step
        epoch, within = divmod(self.step, self.steps_per_epoch)
        evaluates = within == 0 and (epoch % train.eval_every == 0 or at_end)
        due = bool(train.checkpoint_steps) and self.step % train.checkpoint_steps == 0
        due = due or at_end or (within == 0 and epoch % train.checkpoint_every == 0)
        # Several ranks learn of a stop with a batch that was planned later. Where they wait for each other, they ask.
        stop = self.worker.stop_asked if self.comm.world_size == 1 else prepared[0].route.stop
        if evaluates or due:
            stop = self.comm.any(stop or self.worker.stop_asked)
        if evaluates or due or stop or self.step % train.log_every == 0:
            self._check_finite(prepared[0].batch.ids_U)
        if evaluates or due or stop:
            self._evaluate_and_save(epoch if evaluates else None, due, stop)

    def _check_finite(self, ids_U: np.ndarray) -> None:
        """Report steps that were skipped since the last check; raise if too many in a row were, or if the loss
        exploded."""
        counts = self.worker.tally.read()
        since, self._checked_step = counts.steps - self._checked_step, counts.steps
        skipped, self._skipped = counts.skipped - self._skipped, counts.skipped
        last = self.step - counts.steps + counts.last_skipped
        if skipped and self.comm.rank == 0:
            log.warning(
                "step %d: the loss or a gradient is not finite; skipped on all ranks, nothing moved, "
                "as in %d of the last %d steps",
                *(last, skipped, since),
            )
        c = self.config
        how = ""
        if counts.most_in_row >= c.train.max_nonfinite:
            how = f"step {last}: {counts.most_in_row} steps in a row were not finite"
        elif counts.most_exploded >= c.train.max_nonfinite:
            how = (
                f"step {self.step}: {counts.most_exploded} steps in a row had a loss {EXPLODED:,.0f} times that of the "
                f"first step ({counts.first_loss:.3g}) or more"
            )
        if how:
            raise DivergedError(
                f"{how} (train.max_nonfinite); learning rate {c.train.learning_rate}, that of the rows "
                f"{c.entities.learning_rate}, last entities {ids_U[:5].tolist()}...; lower train.learning_rate and "
                "entities.learning_rate, or set train.gradient_clipping; the last checkpoint is of step "
                f"{self.saved_step}"
            )

    def _evaluate_and_save(self, epoch: int | None, due: bool, stop: bool) -> None:
        """Evaluate unless `epoch` is None; save if that is due, the metric improved, or the run ends."""
        metric = None if epoch is None else self._evaluate(epoch)
        patience = self.config.train.patience
        improved = metric is not None and metric >= self.best_mrr
        given_up = bool(patience) and self.bad_evaluations >= patience
        if stop or improved or given_up or due:
            self._save(metric)
        if stop:
            with self._stage("finishing the checkpoint"):
                self.saver.flush()
            raise Preempted(
                f"stopped at step {self.step} of {self.last_step}; checkpoint saved; run the same command to continue"
            )

    def _evaluate(self, epoch: int) -> float:
        start = time.perf_counter()
        metrics = self.worker.evaluate("valid", self.config.train.eval_queries)
        mrr = float(metrics["mrr"])
        self.bad_evaluations = 0 if mrr > self.best_mrr else self.bad_evaluations + 1
        self.best_mrr = max(self.best_mrr, mrr)
        self.reporter.evaluated(self.step, epoch, metrics, time.perf_counter() - start)
        return mrr

    def _save(self, metric: float | None) -> None:
        counts = self.worker.tally.read()
        manifest = {
            "epoch": self.step / self.steps_per_epoch,
            "metric": metric,
            "best_mrr": self.best_mrr if math.isfinite(self.best_mrr) else None,
            "bad_evaluations": self.bad_evaluations,
            "nonfinite": counts.in_row,
            "first_loss": counts.first_loss,
            "exploded": counts.exploded,
            **self.reporter.manifest_fields(),
            "identity": self.worker.identity,
            "schedule": self.schedule.to_json(),
            "config_sha256": hashlib.sha256(dump_config(self.config).encode()).hexdigest(),
            "world_size": self.comm.world_size,
        }
        with self.worker.timer.phase("checkpoint"), self._stage("saving a checkpoint"):
            place = self.saver.save(self.step, self.worker.table, self.worker.engine.state(), manifest)
            if place is not None:
                self.saved_step = self.step
            self.reporter.saved(place, manifest)

    def _stage(self, name: str) -> Progress:
        return Progress(name, active=self.comm.rank == 0)
