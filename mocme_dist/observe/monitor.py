"""What rank 0 reports about a run: curves, heat maps, warnings and a log line per interval.

Curves in TensorBoard: train/ (loss and its terms, gradient norms, speed), entropy/ (shares of Easy, Ambiguous and Hard
negatives), phases/ (milliseconds per step), fusion/ (weights of experts and modalities), roles/ (modality weights by
the role of entities), information/ (heat maps in nats), valid/ (metrics), scale/ (ranks, rows, memory, vectors sent)
and warnings/ (see `diagnostics`). The Custom Scalars tab arranges them, and the Projector tab shows a sample of
entities.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mocme_dist.data.progress import Progress, duration
from mocme_dist.errors import DataError, StorageError
from mocme_dist.model.fusion import PairInformation
from mocme_dist.observe.diagnostics import Diagnostics
from mocme_dist.observe.log import RunLog, log
from mocme_dist.observe.samples import entity_roles, frequent, thumbnails
from mocme_dist.training.step import StepResult
from mocme_dist.training.tally import STAT_NAMES
from mocme_dist.training.worker import Worker

# Number of entities whose weights are averaged by role, and number of roles with curves of their own.
ROLE_SAMPLE, ROLES_SHOWN = 4096, 6
# Plain values that a resumed monitor continues with.
_KEPT = ("sent_vectors",)
# Charts of the Custom Scalars tab: category to chart to patterns of its curves.
CHARTS = {
    "Learning": {
        "loss": ["^train/loss$", "^train/loss_positive$", "^train/loss_negative$"],
        "MRR on valid": ["^valid/(head_|tail_)?mrr$"],
    },
    "Fusion": {"weight of each modality": ["^fusion/modality/.*"]},
    "Negatives": {"share by entropy": ["^entropy/(easy|ambiguous|hard)$"]},
    "Time": {"milliseconds per step": ["^phases/.*_ms$"], "queries per second": ["^train/queries_per_s$"]},
    "Scale": {"memory of rank 0, GiB": ["^scale/rss_gib$"], "vectors sent per step": ["^scale/vectors_sent$"]},
    "Health": {"gradient norms": ["^train/gradient_norm_.*"], "warnings": ["^warnings/.*", "^train/skipped_steps$"]},
}


class Monitor:
    """Collects results of steps and writes them every `train.log_every` steps."""

    def __init__(
        self,
        worker: Worker,
        run_log: RunLog,
        last_step: int,
        first_step: int,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Continue after `first_step`, in the middle of an interval if `state` of an earlier monitor has one."""
        self.worker, self.log, self.config = worker, run_log, worker.config
        config = worker.config
        self.rank0 = worker.comm.rank == 0
        self.progress = Progress("training", last_step, "steps", start=first_step, active=self.rank0)
        self.progress.note = "compiling for the first step" if worker.compiled else ""
        self.started = self.interval_start = time.perf_counter()
        self.interval_step = first_step
        self.sent_vectors = 0
        self.diagnostics = Diagnostics(worker.modalities, config.train.loss == "contrastive", config.mine.bounded)
        self.seconds_before = 0.0
        if state:
            self._restore(state)
        by_role = (
            {f"weight of {name}": [f"^roles/.*/{name}$"] for name in worker.modalities}
            if len(worker.modalities) > 1
            else {}
        )
        experts = {f"experts of {name}": [f"^fusion/expert/{name}_.*"] for name in worker.modalities}
        inter = getattr(worker.model.fusion, "inter", None)
        if isinstance(inter, PairInformation) and inter.num_pairs:
            experts["information between modalities"] = ["^information/inter/.*"]
        more = {"Experts and information": experts} | ({"Modality weights by role": by_role} if by_role else {})
        self.log.layout(CHARTS | more)
        self.roles = self._find_roles() if self.rank0 else []

    def _find_roles(self) -> list[str]:
        """Return the role of each entity of a sample, the first of this rank's rows."""
        w = self.worker
        count = min(w.last - w.first, ROLE_SAMPLE)
        return entity_roles(w.dataset.triples("train"), w.dataset.relation_names(), w.first, count)

    def opening(self, steps_per_epoch: int) -> str:
        """Return a description of the run in one line."""
        w, c = self.worker, self.config
        dense = sum(p.numel() if not hasattr(p, "ds_numel") else p.ds_numel for p in w.model.parameters())
        return (
            f"{w.dataset.num_entities:,} entities, {w.dataset.num_relations} relations, "
            f"{len(w.dataset.triples('train')):,} triples; "
            f"modalities {', '.join(w.modalities)}; K {w.model.settings.num_experts}, D {w.model.blocks.total}, "
            f"{dense / 1e6:.1f} M dense parameters; "
            f"{steps_per_epoch} steps per epoch, {c.train.epochs} epochs; "
            f"{w.comm.world_size} rank(s) on {w.comm.device.type}, "
            f"{type(w.engine).__name__}{f' ZeRO-{w.engine.stage}' if hasattr(w.engine, 'stage') else ''}, "
            f"{'step as one graph' if w.graph else 'loss compiled' if w.compiled else 'loss plain'}"
            f"{', recorded' if w.graph and w.graph.recorded else ''}"
        )

    def state(self) -> dict[str, Any]:
        """Return the fields that a checkpoint keeps, as JSON: the interval so far, warnings, and the time of all
        legs. The loop restores the tally from "sums" and "total_skipped"."""
        counts = self.worker.tally.read()
        return {
            "seconds": self.seconds(),
            "interval_step": self.interval_step,
            "interval_s": time.perf_counter() - self.interval_start,
            "phases_s": dict(self.worker.timer.seconds),
            "sums": counts.sums,
            "total_skipped": counts.skipped,
            "signatures": self.diagnostics.state(),
            **{name: getattr(self, name) for name in _KEPT},
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.seconds_before = state["seconds"]
        self.interval_step = state["interval_step"]
        self.interval_start -= state["interval_s"]
        self.worker.timer.seconds.update(state["phases_s"])
        if "signatures" in state:
            self.diagnostics.restore(state["signatures"])
        for name in _KEPT:
            setattr(self, name, state[name])

    def seconds(self) -> float:
        """Return the seconds spent training, over all legs of the run."""
        return self.seconds_before + time.perf_counter() - self.started

    def record(self, step: int, result: StepResult, sent_vectors: int) -> None:
        """Count a step, and write at the end of an interval: only there the device is waited for."""
        self.sent_vectors += sent_vectors
        if step % self.config.train.log_every:
            self.progress.raise_to(step)
            return
        counts = self.worker.tally.read()
        named = dict(zip(STAT_NAMES, counts.sums, strict=True))
        queries = named["queries"] or math.nan  # NaN if all steps were skipped
        self.progress.raise_to(step, f"loss {named['loss'] / queries:.4f}")
        if self.rank0:
            self._write(step, result, named, counts.skipped)
        self._start_interval(step)

    def _start_interval(self, step: int) -> None:
        self.worker.tally.restart()
        self.sent_vectors = 0
        self.interval_step, self.interval_start = step, time.perf_counter()
        self.worker.timer.take()

    def _write(self, step: int, result: StepResult, named: dict[str, float], total_skipped: int) -> None:
        steps = max(step - self.interval_step, 1)
        elapsed = time.perf_counter() - self.interval_start
        queries = named["queries"] or math.nan
        allowed = max(named["allowed"], 1.0)
        values = {
            "train/loss": named["loss"] / queries,
            "train/loss_positive": named["positive"] / queries,
            "train/loss_negative": named["negative"] / queries,
            "train/loss_mine": named["mine_loss"] / self.worker.comm.world_size / steps,
            "train/positive_score": named["positive_score"] / queries,
            "train/queries_per_s": named["queries"] / elapsed,
            "train/gradient_norm_dense": self.worker.engine.gradient_norm(),
            "train/gradient_norm_rows": float(result.row_gradient_norm),
            "train/skipped_steps": float(total_skipped),
            **{f"entropy/{name}": named[name] / allowed for name in ("easy", "ambiguous", "hard")},
            **{f"phases/{name}_ms": 1e3 * seconds / steps for name, seconds in self.worker.timer.seconds.items()},
            **self._scale(steps),
            **self._weights(result),
            **self.diagnostics.of_interval(result.fused, self.worker.model.fusion, named["hard"] / allowed),
        }
        self.log.scalars(step, values)
        self.log.line({"step": step, "epoch": step / self.worker.maker.sampler.steps_per_epoch, **values})

    def _scale(self, steps: int) -> dict[str, float]:
        return {
            "scale/ranks": float(self.worker.comm.world_size),
            "scale/rows_per_rank": float(self.worker.last - self.worker.first),
            "scale/rss_gib": resident_bytes() / 2**30,
            "scale/vectors_sent": self.sent_vectors / steps,
        }

    def _weights(self, result: StepResult) -> dict[str, float]:
        out = {}
        inter_M, intra_MK = result.fused.inter_M.tolist(), result.fused.intra_MK.tolist()
        for m, name in enumerate(self.worker.modalities):
            out[f"fusion/modality/{name}"] = inter_M[m]
            out |= {f"fusion/expert/{name}_{k}": weight for k, weight in enumerate(intra_MK[m])}
        return out

    def evaluated(self, step: int, epoch: int, metrics: dict[str, Any], seconds: float) -> None:
        """Write the metrics of valid and the current information matrices."""
        if not self.rank0:
            return
        flat = {f"valid/{key}": value for key, value in metrics.items() if isinstance(value, float)}
        flat |= {f"valid/{side}_{key}": value for side in ("head", "tail") for key, value in metrics[side].items()}
        flat["phases/evaluate_s"] = seconds
        flat |= self._information(step)
        flat |= self._weights_by_presence() | self._weights_by_role() | self.diagnostics.of_evaluation(metrics["mrr"])
        self.log.scalars(step, flat)
        self.log.line({"step": step, "epoch": epoch, "elapsed_s": round(self.seconds(), 2), **flat})
        self.log.flush()
        log.info(
            "epoch %d: valid MRR %.4f, Hits@10 %.4f (%s, evaluated in %.1f s)",
            epoch,
            metrics["mrr"],
            metrics["hits@10"],
            duration(self.seconds()),
            seconds,
        )

    def _weights_by_presence(self) -> dict[str, float]:
        """Return the mean weight of each modality over this rank's entities that have all modalities."""
        weights = self.worker.modality_weights
        complete = (weights > 0).all(1)
        if not complete.any():
            return {}
        return {
            f"fusion/complete/{name}": float(weights[complete, m].mean())
            for m, name in enumerate(self.worker.modalities)
        }

    def _weights_by_role(self) -> dict[str, float]:
        """Return the mean weight of each modality over the sampled entities of each frequent role."""
        weights = self.worker.modality_weights[: len(self.roles)]
        roles = np.array(frequent(self.roles, ROLES_SHOWN), dtype=str)
        if len(self.worker.modalities) == 1 or len(weights) < len(roles):
            return {}
        means = {role: weights[torch.from_numpy(roles == role)].mean(0).tolist() for role in np.unique(roles).tolist()}
        return {
            f"roles/{role.replace(' ', '_')}/{name}": mean
            for role, row in means.items()
            for name, mean in zip(self.worker.modalities, row, strict=True)
        }

    def _information(self, step: int) -> dict[str, float]:
        """Draw the matrices of information between modalities and between experts; return its value for each pair."""
        fusion = self.worker.model.fusion
        flat: dict[str, float] = {}
        K, names = self.worker.model.settings.num_experts, list(self.worker.modalities)
        for name in ("intra", "inter"):
            pairs = getattr(fusion, name, None)
            if not isinstance(pairs, PairInformation) or not pairs.num_pairs:
                continue
            shown = names if name == "inter" else [f"{modality}_{k}" for modality in names for k in range(K)]
            matrix = information_matrix(pairs, len(shown))
            mine = self.config.fusion.estimator == "mine"
            peak = float(pairs.log_n_P.max()) if mine else 1.0
            self.log.heat_map(f"information/{name}", step, matrix, shown, peak, "nats" if mine else "")
            flat |= {f"information/{name}_mean": float(pairs.information_P.mean()), f"information/{name}_cap": peak}
            for left, right in zip(pairs.left_P.tolist(), pairs.right_P.tolist(), strict=True):
                flat[f"information/{name}/{shown[left]}-{shown[right]}"] = float(matrix[left, right])
        return flat

    def show_entities(self, step: int) -> None:
        """Write a sample of entities for the projector: vectors, names, roles and pictures; collective."""
        w = self.worker
        first, last = w.partition.bounds(0)
        count = min(last - first, self.config.train.projector, ROLE_SAMPLE)
        if count < 2:
            return
        vector_ND = w.vectors_of(np.arange(first, first + count))
        if not self.rank0:
            return
        names, tiles = w.dataset.entity_names_of(first, count), None
        shown = w.dataset.entity_labels_of(first, count)
        if "image" in w.dataset.modalities:
            limits = self.config.encoders
            try:
                tiles = thumbnails(
                    w.dataset, first, self.roles[:count], limits.max_member_mb * 2**20, limits.max_pixels
                )
            except (
                DataError,
                StorageError,
            ) as error:  # the vectors are trained: pictures beside them are not worth the run
                log.warning("the projector shows no pictures: %s", error)
        labels = [list(row) for row in zip(shown, names, self.roles[:count], strict=True)]
        self.log.projector(step, vector_ND.float().cpu().numpy(), labels, ["label", "id", "role"], tiles)

    def finished(self, report: dict[str, Any]) -> None:
        """Write the final metrics with the settings of the run, and a sample of entities; collective."""
        self.show_entities(report["step"])
        c = self.config
        settings = {
            "modalities": "+".join(self.worker.modalities),
            "num_experts": self.worker.model.settings.num_experts,
            "width": c.experts.width,
            "gamma": c.rotate.gamma,
            "negatives": c.negatives.count,
            "weighting": c.negatives.weighting,
            "estimator": c.fusion.estimator,
            "scope": c.fusion.scope,
            "loss": c.train.loss,
            "learning_rate": c.train.learning_rate,
            "relations_learning_rate": c.relations.learning_rate or c.train.learning_rate,
            "schedule": c.train.schedule,
            "rows_learning_rate": c.entities.learning_rate or c.train.learning_rate,
            "batch_size": c.train.batch_size,
            "seed": c.train.seed,
        }
        metrics = {f"final/test_{key}": float(report[key]) for key in ("mrr", "hits@1", "hits@3", "hits@10")}
        self.log.hyper_parameters(settings, {**metrics, "final/valid_mrr": float(report["valid_mrr"])})


def resident_bytes() -> int:
    """Return the resident memory of this process in bytes; 0 if the system does not report it."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return 0


def information_matrix(pairs: PairInformation, size: int) -> np.ndarray:
    """Return the (size, size) symmetric matrix of averaged estimates; NaN on the diagonal and for other pairs."""
    out = np.full((size, size), np.nan)
    left, right = pairs.left_P.cpu().numpy(), pairs.right_P.cpu().numpy()
    out[left, right] = out[right, left] = pairs.information_P.cpu().numpy()
    return out
