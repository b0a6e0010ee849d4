"""What a rank runs: a training or an evaluation in a run directory. Creates saver, finder and reporter for the loop."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from mocme_dist.config import Config
from mocme_dist.data.files import write_json
from mocme_dist.data.progress import Progress, current_stage, duration
from mocme_dist.errors import CheckpointError, ConfigError, MocmeError
from mocme_dist.evidence.blend import save_blend
from mocme_dist.observe.log import RunLog
from mocme_dist.observe.monitor import Monitor
from mocme_dist.observe.profiler import StepProfiler
from mocme_dist.parallel.comm import communication
from mocme_dist.runs.directory import STATUS, RunDirectory
from mocme_dist.runs.lease import Held
from mocme_dist.runs.saver import Saver
from mocme_dist.runs.status import STATUS_LOCK, beating
from mocme_dist.training.blending import evaluate
from mocme_dist.training.build import build_worker, open_dataset
from mocme_dist.training.checkpoint import Saved, step_name
from mocme_dist.training.compatibility import HOW, changed_settings, nothing_to_do
from mocme_dist.training.loop import Loop, Reporter, restore
from mocme_dist.training.step import StepResult
from mocme_dist.training.worker import Worker

log = logging.getLogger(__name__)

Stop = Callable[[], bool]


def _ignore(*_: object) -> None:
    pass


@dataclass(frozen=True)
class Hooks:
    """Functions of a launcher that every rank calls.

    Attributes:
        before_step: called before each step, with its number.
        ended: called after the last step, before the final evaluation.
        saved: called after each checkpoint, with its path or URL and manifest fields; may be collective.
    """

    before_step: Callable[[int], None] = _ignore
    ended: Callable[[], None] = _ignore
    saved: Callable[[str, dict[str, Any]], None] = _ignore


def run_training(
    config: Config, stop: Stop | None = None, hooks: Hooks | None = None, held: Held | None = None
) -> dict[str, Any]:
    """Train, then evaluate the best checkpoint on test; return the report, the same on every rank.

    Args:
        config: with absolute paths.
        stop: called once per step; True saves a checkpoint and raises Preempted.
        hooks: of the launcher.
        held: lease of a run at a URL; rank 0's counts.

    Raises:
        Preempted, DivergedError, CheckpointError, DataError, StorageError: see `errors`.
    """
    directory = RunDirectory(config.run.dir)
    with communication(config.launch.timeout_s, config.launch.gpus_per_worker) as comm:
        held = comm.broadcast(held)
        with Progress("loading data and model", active=comm.rank == 0):
            worker = build_worker(config, open_dataset(config.data), comm)
            run = TrainingRun(worker, directory, hooks, held)
        try:
            with beating(run.write_progress) if comm.rank == 0 else nullcontext():
                run.train(stop or directory.stop_file.exists)
                report = run.finish()
        except BaseException:
            if comm.rank == 0:
                directory.try_to_send(held)
            raise
        if comm.rank == 0:
            directory.send_at_end(held)
        return report


def run_evaluation(config: Config, split: str, step: str, drop: dict[str, float] | None = None) -> dict[str, Any]:
    """Return the metrics of a split under the best checkpoint of a run, or under that of a given step.

    Args:
        drop: modalities to hide, each with a share of the entities.

    Raises:
        CheckpointError: there is none, or none that verifies.
    """
    directory = RunDirectory(config.run.dir)
    with communication(config.launch.timeout_s, config.launch.gpus_per_worker) as comm:
        with Progress("loading data and model", active=comm.rank == 0):
            worker = build_worker(config, open_dataset(config.data), comm)
            saved = find(directory, worker, step, best=True)
            if saved is None:
                raise CheckpointError(f"{directory.place}: no checkpoint; train first")
            restore(worker, saved)
        fetch_blend(directory, worker)
        report = evaluate(worker, directory.blend, split, saved.step, drop)[0] | {"step": saved.step}
        if comm.rank == 0 and not directory.storage.is_remote:  # readers of a run at a URL leave nothing there
            hidden = "".join(f".drop-{name}-{share:g}" for name, share in sorted((drop or {}).items()))
            directory.write_evaluation(f"{split}{hidden}", report)
        return report


def find(directory: RunDirectory, worker: Worker, resume: str, best: bool = False) -> Saved | None:
    """Return the checkpoint to load, verified, with this rank's files on this machine; see `Checkpoints.find`."""
    return directory.checkpoints.find(resume, best, (worker.first, worker.last), worker.comm)


def fetch_blend(directory: RunDirectory, worker: Worker) -> None:
    """Bring the blend of a run at a URL to rank 0; collective."""
    _together(worker, lambda: directory.fetch_file(directory.blend))


def _together(worker: Worker, fetch: Callable[[], object]) -> None:
    """Call a function on rank 0; its error is raised on every rank."""
    error: MocmeError | None = None
    try:
        if worker.comm.rank == 0:
            fetch()
    except MocmeError as cause:
        error = cause
    worker.comm.raise_together(error)


class TrainingRun(Reporter):
    """A training in a run directory: resumes, accepts changed settings, reports to files, and evaluates at the end."""

    def __init__(
        self, worker: Worker, directory: RunDirectory, hooks: Hooks | None = None, held: Held | None = None
    ) -> None:
        config = worker.config
        self.config, self.worker, self.comm, self.directory = config, worker, worker.comm, directory
        self.hooks, self.held = hooks or Hooks(), held
        if directory.storage.is_remote and held is None:
            raise ConfigError(
                f"run.dir: {directory.place}: a run at a URL is started by mocme_dist.train, which takes its lease"
            )
        send_curve = partial(directory.send, held, directory.curve.name)
        self.saver = Saver(directory.checkpoints, config.train.num_to_keep, self.comm, held, send_curve)
        self.loop = Loop(worker, self.saver)
        saved = self.loop.resume(partial(find, directory, worker))
        self.legs = [] if saved is None else list(saved.manifest.get("legs", []))
        # Rank 0 may run on another machine than before: it continues the curve that is at the URL.
        _together(worker, directory.fetch)
        self._accept(saved)
        step, last_step = self.loop.step, self.loop.last_step
        self.log = RunLog(directory.curve, directory.tensorboard, self.comm.rank == 0, step)
        monitored = None if saved is None else saved.manifest.get("monitor")
        self.monitor = Monitor(worker, self.log, last_step, step, monitored)
        self.profiler = StepProfiler(
            directory.path / "profile",
            config.run.profile,
            self.comm.rank,
            worker.timer,
            self.comm.device.type == "cuda",
        )

    def _accept(self, saved: Saved | None) -> None:
        """Log and keep what changed since the last leg, now that the checkpoint has accepted the settings; collective.

        Raises:
            ConfigError: no step is left to which the changed settings would apply; nothing is written.
        """
        loop = self.loop
        changed: list[str] = []
        message = None
        if self.comm.rank == 0 and saved is not None:
            before = self.directory.read_config()
            changed = changed_settings(before, self.config) if before else []
            if loop.is_over and before and (unused := changed_settings(before, self.config, HOW)):
                message = nothing_to_do(self.directory.place, loop.step, unused)
        if (message := self.comm.broadcast(message)) is not None:
            raise ConfigError(message)
        if self.comm.rank:
            return
        if saved is not None:
            log.info(
                "resuming from step %d of %d (%s) with %d rank(s), saved by %s",
                *(saved.step, loop.last_step, saved.path.name, self.comm.world_size, saved.manifest.get("world_size")),
            )
            if not loop.is_over and (longer := loop.schedule.changed_from(saved.manifest.get("schedule"), loop.step)):
                log.warning(longer)
        for line in changed:
            log.info("changed: %s", line)
        if not loop.is_over or changed:
            at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
            self.legs.append("; ".join([f"from step {loop.step}, {at}", *changed]))
        self.directory.write_config(self.config, self.legs)
        self._write_progress()
        self.directory.try_to_send(self.held, "config.yaml", STATUS)

    def write_progress(self) -> None:
        """Write step and stage to run_status.json; the caller holds STATUS_LOCK."""
        saved_step = self.loop.saved_step
        saved = {"last_checkpoint": step_name(saved_step)} if saved_step else {}
        fields = {"step": self.loop.step, "last_step": self.loop.last_step, **saved}
        self.directory.write_progress(**fields, pid=os.getpid(), stage=current_stage())

    def _write_progress(self) -> None:
        with STATUS_LOCK:
            self.write_progress()

    def train(self, stop: Stop) -> None:
        """Run the loop to its end; collective."""
        if self.comm.rank == 0:
            log.info(self.monitor.opening(self.loop.steps_per_epoch))
        self.loop.train(self, stop)

    @contextmanager
    def running(self) -> Iterator[None]:
        """See `Reporter`."""
        with self.profiler.running(), self.monitor.progress:
            yield

    def before_step(self, step: int) -> None:
        """See `Reporter`."""
        self.hooks.before_step(step)

    def after_step(self, step: int, result: StepResult, sent_vectors: int) -> None:
        """See `Reporter`."""
        self.monitor.record(step, result, sent_vectors)
        self.profiler.step(step)

    def evaluated(self, step: int, epoch: int, metrics: dict[str, Any], seconds: float) -> None:
        """See `Reporter`."""
        self.monitor.evaluated(step, epoch, metrics, seconds)

    def manifest_fields(self) -> dict[str, Any]:
        """See `Reporter`."""
        return {"monitor": self.monitor.state(), "legs": self.legs}

    def saved(self, place: str | None, manifest: dict[str, Any]) -> None:
        """See `Reporter`."""
        if place is not None:
            self.hooks.saved(place, manifest)
        if self.comm.rank == 0:
            self._write_progress()
            self.log.flush()
            self.directory.try_to_send(self.held)

    def finish(self) -> dict[str, Any]:
        """Load the best checkpoint by valid MRR, rank test once, write the report and return it; collective."""
        worker, loop = self.worker, self.loop
        with Progress("finishing the checkpoint", active=self.comm.rank == 0):
            self.saver.flush()
        self.hooks.ended()
        saved = find(self.directory, worker, "auto", best=True)
        if saved is not None and saved.step != loop.step:
            restore(worker, saved)
        step = loop.step if saved is None else saved.step
        fetch_blend(self.directory, worker)
        report, blend = evaluate(worker, self.directory.blend, "test", step)
        if blend is not None and self.comm.rank == 0:
            save_blend(self.directory.blend, blend)
        report |= {
            "valid_mrr": worker.evaluate("valid")["mrr"] if blend is None else blend.fitted["mrr"],
            "step": step,
            "epoch": round(step / loop.steps_per_epoch, 3),
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
            "best valid MRR %.4f at epoch %g; test MRR %.4f, Hits@1 %.4f, Hits@10 %.4f; %s in all%s",
            report["valid_mrr"],
            report["epoch"],
            report["mrr"],
            report["hits@1"],
            report["hits@10"],
            duration(report["seconds"]),
            f"; the model alone has test MRR {report['model']['mrr']:.4f}" if "model" in report else "",
        )
