"""What rank 0 says about a run: curves, heat maps, warnings and a line per interval.

Curves in TensorBoard: train/ (loss and its parts, gradient norms, speed), entropy/ (share of Easy, Ambiguous, Hard), phases/
(milliseconds a step), fusion/ (every expert's and modality's weight), roles/ (modality weights of entities by the role they
play), information/ (heat maps in nats), valid/ (metrics), scale/ (ranks, rows, memory, vectors sent), warnings/ (one modality
takes over; no negative is Hard). The Custom Scalars tab shows them arranged, the Projector tab a sample of entities.
"""

from __future__ import annotations

import math
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mocme_dist.config import Config
from mocme_dist.errors import DataError, StorageError
from mocme_dist.model.fusion import PairInformation
from mocme_dist.model.native import has_amx
from mocme_dist.training.log import Progress, RunLog, duration, log
from mocme_dist.training.sample import entity_roles, frequent, thumbnails
from mocme_dist.training.step import STAT_NAMES, StepResult
from mocme_dist.training.worker import Worker

# A modality that takes this share of the weight has collapsed the mixture, in the paper's words.
COLLAPSE_SHARE = 0.9
# Entities whose weights are told apart by role, and how many roles get curves of their own.
ROLE_SAMPLE, ROLES_SHOWN = 4096, 6
# What the Custom Scalars tab shows together: category to chart to patterns of curves.
CHARTS = {
    "Learning": {"loss": ["^train/loss$", "^train/loss_positive$", "^train/loss_negative$"], "MRR on valid": ["^valid/(head_|tail_)?mrr$"]},
    "Fusion": {"weight of each modality": ["^fusion/modality/.*"], "weight of each expert": ["^fusion/expert/.*"]},
    "Negatives": {"share by entropy": ["^entropy/(easy|ambiguous|hard)$"]},
    "Time": {"milliseconds a step": ["^phases/.*_ms$"], "queries a second": ["^train/queries_per_s$"]},
    "Scale": {"memory of rank 0, GiB": ["^scale/rss_gib$"], "vectors sent a step": ["^scale/vectors_sent$"]},
    "Health": {"gradient norms": ["^train/gradient_norm_.*"], "warnings": ["^warnings/.*", "^train/skipped_steps$"]},
}


def advice(config: Config, device: torch.device) -> str | None:
    """A setting that would make this run's steps faster on this CPU, if there is one."""
    exact = {config.train.precision, config.mine.precision} == {"float32"} and not config.deepspeed.bf16
    kernels = device.type == "cpu" and config.compile != "off" and config.deepspeed.stage < 3
    if not (exact and kernels and config.experts.kind == "mlp" and has_amx()):
        return None
    return (
        "this CPU has AMX: with train.precision=bfloat16x3 mine.precision=bfloat16x3 experts multiply numbers of 16 bits, about 2.5 times "
        "as fast; with bfloat16 numbers of 8 bits, more than 4 times as fast"
    )


class Monitor:
    """Gathers what steps report and writes it every `train.log_every` steps."""

    def __init__(self, worker: Worker, run_log: RunLog, config: Config, last_step: int, first_step: int) -> None:
        self.worker, self.log, self.config = worker, run_log, config
        self.rank0 = worker.comm.rank == 0
        self.progress = Progress("step", last_step, self.rank0)
        self.started = self.interval_start = time.perf_counter()
        self.first_step = self.interval_step = first_step
        self.sums = torch.zeros(len(STAT_NAMES), dtype=torch.float64)
        self.skipped = self.total_skipped = self.sent_vectors = 0
        self.collapsed = self.no_hard = False
        by_role = {f"weight of {name}": [f"^roles/.*/{name}$"] for name in worker.modalities} if len(worker.modalities) > 1 else {}
        self.log.layout(CHARTS | ({"Modality weights by role": by_role} if by_role else {}))
        self.roles = self._find_roles() if self.rank0 else []

    def _find_roles(self) -> list[str]:
        """Role of each entity of a sample: the first of this rank's rows."""
        w = self.worker
        count = min(w.last - w.first, ROLE_SAMPLE)
        return entity_roles(w.dataset.triples("train"), w.dataset.relation_names(), w.first, count)

    def opening(self, steps_per_epoch: int) -> str:
        """The run in one line."""
        w, c = self.worker, self.config
        dense = sum(p.numel() if not hasattr(p, "ds_numel") else p.ds_numel for p in w.model.parameters())
        return (
            f"{w.dataset.num_entities:,} entities, {w.dataset.num_relations} relations, {len(w.dataset.triples('train')):,} triples; "
            f"modalities {', '.join(w.modalities)}; K {c.experts.num_experts}, D {c.experts.width}, {dense / 1e6:.1f} M dense parameters; "
            f"{steps_per_epoch} steps an epoch, {c.train.epochs} epochs; {w.comm.world_size} rank(s) on {w.comm.device.type}, "
            f"{type(w.engine).__name__}{f' ZeRO-{w.engine.stage}' if hasattr(w.engine, 'stage') else ''}, "
            f"loss {'compiled' if w.compiled else 'plain'}"
        )

    def seconds(self) -> float:
        """Since this process began to train."""
        return time.perf_counter() - self.started

    def record(self, step: int, result: StepResult, sent_vectors: int) -> None:
        """Add a step; write when the interval is full."""
        if result.skipped:
            self.skipped += 1
            self.total_skipped += 1
        else:
            self.sums += result.sums.cpu()
        self.sent_vectors += sent_vectors
        queries = float(self.sums[STAT_NAMES.index("queries")]) or math.nan  # all skipped: no figure, and not zero
        loss = float(self.sums[0]) / queries
        self.progress(step, f"loss {loss:.4f}")
        if (step - self.first_step) % self.config.train.log_every == 0 and self.rank0:
            self._write(step, result, loss, queries)
        if (step - self.first_step) % self.config.train.log_every == 0:
            self._start_interval(step)

    def _start_interval(self, step: int) -> None:
        self.sums.zero_()
        self.skipped = self.sent_vectors = 0
        self.interval_step, self.interval_start = step, time.perf_counter()
        self.worker.timer.take()

    def _write(self, step: int, result: StepResult, loss: float, queries: float) -> None:
        steps = max(step - self.interval_step, 1)
        elapsed = time.perf_counter() - self.interval_start
        named = dict(zip(STAT_NAMES, self.sums.tolist(), strict=True))
        allowed = max(named["allowed"], 1.0)
        values = {
            "train/loss": loss,
            "train/loss_positive": named["positive"] / queries,
            "train/loss_negative": named["negative"] / queries,
            "train/loss_mine": named["mine_loss"] / self.worker.comm.world_size / steps,
            "train/positive_score": named["positive_score"] / queries,
            "train/queries_per_s": named["queries"] / elapsed,
            "train/gradient_norm_dense": self.worker.engine.gradient_norm(),
            "train/gradient_norm_rows": result.row_gradient_norm,
            "train/skipped_steps": float(self.total_skipped),
            **{f"entropy/{name}": named[name] / allowed for name in ("easy", "ambiguous", "hard")},
            **{f"phases/{name}_ms": 1e3 * seconds / steps for name, seconds in self.worker.timer.seconds.items()},
            **self._scale(steps),
            **self._weights(result),
            **self._warnings(named, allowed, result),
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
        for m, name in enumerate(self.worker.modalities):
            out[f"fusion/modality/{name}"] = float(result.fused.inter_M[m])
            out |= {f"fusion/expert/{name}_{k}": float(weight) for k, weight in enumerate(result.fused.intra_MK[m])}
        return out

    def _warnings(self, named: dict[str, float], allowed: float, result: StepResult) -> dict[str, float]:
        several = len(self.worker.modalities) > 1
        # An entity with one modality gives it weight 1 by right, so the share is of the entities' average.
        collapsed = several and float(result.fused.inter_M.max()) > COLLAPSE_SHARE
        no_hard = self.config.train.loss == "contrastive" and named["hard"] / allowed < 1e-6
        if collapsed and not self.collapsed:
            name = self.worker.modalities[int(result.fused.inter_M.argmax())]
            log.warning(
                "modality %s takes over %.0f %% of the weight: the mixture has collapsed", name, 100 * float(result.fused.inter_M.max())
            )
        if no_hard and not self.no_hard:
            log.warning("no negative is Hard: entropy weights do nothing now; check rotate.gamma and the learning rates")
        self.collapsed, self.no_hard = collapsed, no_hard
        return {"warnings/modality_collapse": float(collapsed), "warnings/no_hard_negative": float(no_hard)}

    def evaluated(self, step: int, epoch: int, metrics: dict[str, Any], seconds: float) -> None:
        """Metrics of the development set, and the information matrices as they stand."""
        if not self.rank0:
            return
        flat = {f"valid/{key}": value for key, value in metrics.items() if isinstance(value, float)}
        flat |= {f"valid/{side}_{key}": value for side in ("head", "tail") for key, value in metrics[side].items()}
        flat["phases/evaluate_s"] = seconds
        flat |= self._weights_by_presence() | self._weights_by_role()
        self.log.scalars(step, flat)
        self.log.line({"step": step, "epoch": epoch, "elapsed_s": round(self.seconds(), 2), **flat})
        self._heat_maps(step)
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
        """Mean weight of each modality over this rank's entities that have all modalities."""
        weights = self.worker.modality_weights
        complete = (weights > 0).all(1)
        if not complete.any():
            return {}
        return {f"fusion/complete/{name}": float(weights[complete, m].mean()) for m, name in enumerate(self.worker.modalities)}

    def _weights_by_role(self) -> dict[str, float]:
        """Mean weight of each modality over the sampled entities of each frequent role."""
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

    def _heat_maps(self, step: int) -> None:
        fusion = self.worker.model.fusion
        K = self.config.experts.num_experts
        for name in ("intra", "inter"):
            pairs = getattr(fusion, name, None)
            if not isinstance(pairs, PairInformation) or not pairs.num_pairs:
                continue
            size = len(self.worker.modalities) * (K if name == "intra" else 1)
            matrix = information_matrix(pairs, size)
            peak = float(pairs.log_n_P.max()) if self.config.fusion.estimator == "mine" else 1.0
            self.log.heat_map(f"information/{name}", step, matrix, peak)
            self.log.scalars(step, {f"information/{name}_mean": float(pairs.information_P.mean()), f"information/{name}_cap": peak})

    def show_entities(self, step: int) -> None:
        """Fill the projector with a sample: fused vectors, names, roles and pictures; collective."""
        w = self.worker
        first, last = w.partition.bounds(0)
        count = min(last - first, self.config.train.projector, ROLE_SAMPLE)
        if count < 2:
            return
        vector_ND = w.vectors_of(np.arange(first, first + count))
        if not self.rank0:
            return
        names, tiles = w.dataset.entity_names_of(first, count), None
        if "image" in w.dataset.modalities:
            limits = self.config.encoders
            try:
                tiles = thumbnails(w.dataset, first, self.roles[:count], limits.max_member_mb * 2**20, limits.max_pixels)
            except (DataError, StorageError) as error:  # the vectors are trained: pictures beside them are not worth the run
                log.warning("the projector shows no pictures: %s", error)
        labels = [[name, role] for name, role in zip(names, self.roles[:count], strict=True)]
        self.log.projector(step, vector_ND.float().cpu().numpy(), labels, ["name", "role"], tiles)

    def finished(self, report: dict[str, Any]) -> None:
        """Final metrics beside the settings that made them, and a sample of entities; collective."""
        self.show_entities(report["step"])
        c = self.config
        settings = {
            "modalities": "+".join(self.worker.modalities),
            "num_experts": c.experts.num_experts,
            "width": c.experts.width,
            "gamma": c.rotate.gamma,
            "negatives": c.negatives.count,
            "weighting": c.negatives.weighting,
            "estimator": c.fusion.estimator,
            "scope": c.fusion.scope,
            "loss": c.train.loss,
            "learning_rate": c.train.learning_rate,
            "rows_learning_rate": c.entities.learning_rate or c.train.learning_rate,
            "batch_size": c.train.batch_size,
            "seed": c.train.seed,
        }
        metrics = {f"final/test_{key}": float(report[key]) for key in ("mrr", "hits@1", "hits@3", "hits@10")}
        self.log.hyper_parameters(settings, {**metrics, "final/valid_mrr": float(report["valid_mrr"])})


def resident_bytes() -> int:
    """Memory of this process that is in RAM; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return 0


def information_matrix(pairs: PairInformation, size: int) -> np.ndarray:
    """(size, size) symmetric matrix of the averaged estimates; NaN on the diagonal and where no pair is estimated."""
    out = np.full((size, size), np.nan)
    left, right = pairs.left_P.cpu().numpy(), pairs.right_P.cpu().numpy()
    out[left, right] = out[right, left] = pairs.information_P.cpu().numpy()
    return out
