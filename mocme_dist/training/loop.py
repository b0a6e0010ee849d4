"""The run of one rank: resume, step through the epochs, evaluate, checkpoint, and report at the end."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mocme_dist.batching.loader import Prefetcher
from mocme_dist.batching.sampler import key64
from mocme_dist.cluster import return_pages
from mocme_dist.config import Config, dump_config
from mocme_dist.data.files import write_json
from mocme_dist.errors import CheckpointError, ConfigError, DivergedError, Preempted, StorageError
from mocme_dist.parallel.comm import communication
from mocme_dist.training import checkpoint, remote, remote_saver
from mocme_dist.training.checkpoint import Saver
from mocme_dist.training.lease import Held
from mocme_dist.training.log import RunLog, duration
from mocme_dist.training.monitor import Monitor, advice
from mocme_dist.training.profiler import StepProfiler
from mocme_dist.training.rundir import RunDirectory
from mocme_dist.training.step import train_step
from mocme_dist.training.worker import Worker, open_dataset

log = logging.getLogger(__name__)

Stop = Callable[[], bool]


@dataclass(frozen=True)
class Hooks:
    """What a launcher wants to know of a run, called on every rank.

    Attributes:
        beat: before each step, with its number.
        saved: after each checkpoint, with its path or address and manifest fields; collective if it likes.
    """

    beat: Callable[[int], None] = lambda step: None
    saved: Callable[[str, dict[str, Any]], None] = lambda place, manifest: None


def run_training(config: Config, stop: Stop | None = None, hooks: Hooks | None = None, held: Held | None = None) -> dict[str, Any]:
    """Train and then evaluate the best checkpoint on test; the report, the same on every rank.

    Args:
        config: with absolute paths.
        stop: asked once a step; True saves a checkpoint and raises Preempted.
        hooks: of the launcher.
        held: the lease, of a run at a URL; rank 0's counts.

    Raises:
        Preempted, DivergedError, CheckpointError, DataError, StorageError: see `errors`.
    """
    directory = RunDirectory(config.run.dir)
    with communication(config.launch.timeout_s) as comm:
        held = comm.broadcast(held)
        worker = Worker(config, open_dataset(config), comm)
        run = Training(config, worker, directory, stop or directory.stop_file.exists, hooks, held)
        try:
            run.train()
            report = run.finish()
        except BaseException:
            if comm.rank == 0:
                directory.try_to_send(held)
            raise
        if comm.rank == 0:
            directory.insist_to_send(held)
        return report


def run_evaluation(config: Config, split: str, step: str) -> dict[str, Any]:
    """Metrics of a split under the best checkpoint of a run, or under that of a given step.

    Raises:
        CheckpointError: there is none, or none that verifies.
    """
    directory = RunDirectory(config.run.dir)
    with communication(config.launch.timeout_s) as comm:
        worker = Worker(config, open_dataset(config), comm)
        saved = find(directory, step, worker, best=True)
        if saved is None:
            raise CheckpointError(f"{directory.place}: no checkpoint; train first")
        restore(worker, saved)
        report = worker.evaluate(split, show=True) | {"step": saved.step}
        if comm.rank == 0 and directory.mirror is None:  # who reads a run at a URL leaves nothing there
            write_json(directory.metrics, report)
        return report


def find(directory: RunDirectory, resume: str, worker: Worker, best: bool = False) -> checkpoint.Saved | None:
    """The checkpoint to load, verified, with this rank's part of it on this machine; collective. See `checkpoint.find`."""
    if directory.mirror is None:
        return checkpoint.agree(directory.checkpoints, resume, worker.comm, best)
    return remote.agree(directory.mirror, resume, (worker.first, worker.last), worker.comm, best)


def restore(worker: Worker, saved: checkpoint.Saved) -> None:
    """Put a checkpoint into a worker of any number of ranks and any ZeRO stage; collective.

    Raises:
        CheckpointError: it was made with other settings, or its parts do not cover this rank's rows.
    """
    checkpoint.check_identity(saved, worker.identity)
    return_pages()
    checkpoint.load_rows(saved, worker.table)
    worker.engine.load_state(checkpoint.load_dense(saved), worker.table.num_updates)


class Training:
    """The state of a run beside the worker's: where it stands, the best so far, when to stop."""

    def __init__(
        self, config: Config, worker: Worker, directory: RunDirectory, stop: Stop, hooks: Hooks | None = None, held: Held | None = None
    ) -> None:
        self.config, self.worker, self.comm, self.directory, self.stop = config, worker, worker.comm, directory, stop
        self.hooks, self.held = hooks or Hooks(), held
        self.saver = self._make_saver()
        self.steps_per_epoch = worker.maker.sampler.steps_per_epoch
        self.last_step = config.train.epochs * self.steps_per_epoch
        self.best_mrr, self.bad_evaluations, self.nonfinite = -math.inf, 0, 0
        self.step = self._resume()
        self.saved_step = self.step
        self._fetch()
        if self.comm.rank == 0:
            directory.write_config(config)  # now that the checkpoint has accepted these settings
        self.log = RunLog(directory.curve, directory.tensorboard, self.comm.rank == 0, self.step)
        self.monitor = Monitor(worker, self.log, config, self.last_step, self.step)
        self.profiler = StepProfiler(directory.path / "profile", config.run.profile, self.comm.rank, worker.timer)

    def _make_saver(self) -> Saver:
        mirror, keep = self.directory.mirror, self.config.train.num_to_keep
        if mirror is None:
            return Saver(self.directory.checkpoints, keep, self.comm)
        if self.held is None:
            raise ConfigError(f"run.dir: {mirror.url}: a run at a URL is started by mocme_dist.train, which takes its lease")
        return remote_saver.RemoteSaver(mirror, keep, self.comm, self.held, self._send_curve)

    def _send_curve(self) -> None:
        self.directory.send(self.held, self.directory.curve.name)

    def _fetch(self) -> None:
        """Rank 0 may run on another machine than before: it goes on with the curve that is at the URL."""
        error: StorageError | None = None
        try:
            if self.comm.rank == 0:
                self.directory.fetch()
        except StorageError as cause:
            error = cause
        if self.directory.mirror is not None:
            self.comm.raise_together(error)

    def _resume(self) -> int:
        saved = find(self.directory, self.config.run.resume, self.worker)
        if saved is None:
            return 0
        restore(self.worker, saved)
        self.best_mrr = saved.manifest["best_mrr"] if saved.manifest["best_mrr"] is not None else -math.inf
        self.bad_evaluations = saved.manifest["bad_evaluations"]
        if self.comm.rank == 0:
            log.info(
                "resuming from step %d of %d (%s) with %d rank(s), saved by %s",
                *(saved.step, self.last_step, saved.path.name, self.comm.world_size, saved.manifest.get("world_size")),
            )
        return saved.step

    def train(self) -> None:
        """Step until the last epoch, the patience or a stop; collective."""
        if self.comm.rank == 0:
            log.info(self.monitor.opening(self.steps_per_epoch))
            if faster := advice(self.config, self.comm.device):
                log.info(faster)
        patience = self.config.train.patience
        with Prefetcher(self.worker.prepare, self.step, self.last_step) as batches, self.profiler.running():
            stream = iter(batches)
            while self.step < self.last_step and not (patience and self.bad_evaluations >= patience):
                self.hooks.beat(self.step)
                with self.worker.timer.phase("wait"):
                    prepared = next(stream)
                self._seed_dropout()
                result = train_step(
                    self.worker.engine,
                    self.worker.table,
                    self.worker.parts(prepared, self.step),
                    self.comm,
                    estimate=self.step % self.config.mine.every == 0,
                    stop=self.stop(),
                    timer=self.worker.timer,
                )
                self.step += 1
                self.monitor.record(self.step, result, sum(part.route.sent_vectors for part in prepared))
                self._check_finite(result.skipped, prepared[0].batch.ids_U)
                self.profiler.step(self.step)
                self._after_step(result.stop)

    def _seed_dropout(self) -> None:
        """Make what dropout draws a function of seed, step and rank, so that a resumed run draws the same."""
        if self.config.projection.dropout or self.config.experts.dropout:
            torch.manual_seed(int(key64(self.config.train.seed, 3, self.step, self.comm.rank) >> np.uint64(1)))

    def _check_finite(self, skipped: bool, ids_U: np.ndarray) -> None:
        self.nonfinite = self.nonfinite + 1 if skipped else 0
        if skipped and self.comm.rank == 0:
            log.warning("step %d: the loss or a gradient is not finite; skipped on all ranks, nothing moved", self.step)
        if self.nonfinite >= self.config.train.max_nonfinite:
            raise DivergedError(
                f"step {self.step}: {self.nonfinite} steps in a row were not finite (train.max_nonfinite); learning rate "
                f"{self.config.train.learning_rate}, last entities {ids_U[:5].tolist()}...; lower train.learning_rate or set "
                f"train.gradient_clipping; the last checkpoint is of step {self.saved_step}"
            )

    def _after_step(self, stop: bool) -> None:
        """Evaluate and save at the ends of epochs that are due, and where the run is asked to stop."""
        train, at_end = self.config.train, self.step == self.last_step
        epoch, within = divmod(self.step, self.steps_per_epoch)
        metric = None
        if within == 0 and (epoch % train.eval_every == 0 or at_end):
            metric = self._evaluate(epoch)
        improved = metric is not None and metric >= self.best_mrr
        given_up = bool(train.patience) and self.bad_evaluations >= train.patience
        due = bool(train.checkpoint_steps) and self.step % train.checkpoint_steps == 0
        if stop or improved or at_end or given_up or due or (within == 0 and epoch % train.checkpoint_every == 0):
            self._save(metric)
        if stop and not at_end:
            self.saver.flush()
            raise Preempted(f"stopped at step {self.step} of {self.last_step}; checkpoint saved; run the same command to go on")

    def _evaluate(self, epoch: int) -> float:
        start = time.perf_counter()
        metrics = self.worker.evaluate("valid", self.config.train.eval_queries)
        mrr = float(metrics["mrr"])
        self.bad_evaluations = 0 if mrr > self.best_mrr else self.bad_evaluations + 1
        self.best_mrr = max(self.best_mrr, mrr)
        self.monitor.evaluated(self.step, epoch, metrics, time.perf_counter() - start)
        return mrr

    def _save(self, metric: float | None) -> None:
        manifest = {
            "epoch": self.step / self.steps_per_epoch,
            "metric": metric,
            "best_mrr": self.best_mrr if math.isfinite(self.best_mrr) else None,
            "bad_evaluations": self.bad_evaluations,
            "identity": self.worker.identity,
            "config_sha256": hashlib.sha256(dump_config(self.config).encode()).hexdigest(),
            "world_size": self.comm.world_size,
        }
        with self.worker.timer.phase("checkpoint"):
            place = self.saver.save(self.step, self.worker.table, self.worker.engine.state(), manifest)
            if place is not None:
                self.saved_step = self.step
                self.hooks.saved(place, manifest)
        if self.comm.rank == 0:
            self.directory.status(
                "running", step=self.step, last_step=self.last_step, last_checkpoint=checkpoint.step_name(self.saved_step), pid=os.getpid()
            )
            self.log.flush()
            self.directory.try_to_send(self.held)

    def finish(self) -> dict[str, Any]:
        """Load the best checkpoint by valid MRR, rank test once, write the report; collective."""
        self.saver.flush()
        saved = find(self.directory, "auto", self.worker, best=True)
        if saved is not None and saved.step != self.step:
            restore(self.worker, saved)
        step = self.step if saved is None else saved.step
        valid = self.worker.evaluate("valid")
        report = self.worker.evaluate("test", show=True)
        report |= {
            "valid_mrr": valid["mrr"],
            "step": step,
            "epoch": round(step / self.steps_per_epoch, 3),
            "seconds": round(self.monitor.seconds(), 1),
        }
        if self.comm.rank == 0:
            self._write_report(report)
        self.monitor.finished(report)
        self.log.close()
        return report

    def _write_report(self, report: dict[str, Any]) -> None:
        write_json(self.directory.metrics, report)
        log.info(
            "best valid MRR %.4f at epoch %g; test MRR %.4f, Hits@1 %.4f, Hits@10 %.4f; %s in all",
            report["valid_mrr"],
            report["epoch"],
            report["mrr"],
            report["hits@1"],
            report["hits@10"],
            duration(report["seconds"]),
        )
