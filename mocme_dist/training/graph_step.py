"""A step of one rank as one graph: lookup, encoding, estimates, loss and their gradients, compiled for fixed shapes.

Rows of a step are padded to one of few sizes with rows that have no modality, so nothing is compiled after the first
steps. The whole forward pass is one compiled graph and its backward pass another; a third one makes the norm, the
finite check, clipping, moving averages and sums. Adam and the row update are one launch per group of parameters. No
part of it needs a value on the host, so on CUDA the step is recorded once per shape and replayed (`train.cuda_graphs`).

`train_step` is the plain twin: equal up to the order of sums (tests/training/test_graph_step.py). It is also what runs
where this step does not hold: several ranks, several micro-batches, ZeRO's optimizers, rows that are not float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mocme_dist.batching.batch import Batch
from mocme_dist.data.features import FeatureStore
from mocme_dist.kernels.row_update import BETAS, EPSILON, make_control
from mocme_dist.model.compile import one_graph
from mocme_dist.model.fusion import Fused
from mocme_dist.model.loss import completion_loss
from mocme_dist.model.mine import Halves
from mocme_dist.model.mocme import alone
from mocme_dist.parallel.table import EntityTable
from mocme_dist.training.engine import MOMENTS, Engine, buffers_of, clip_factor
from mocme_dist.training.step import StepModule, StepResult, pack_stats, take
from mocme_dist.training.tally import Tally, tallied_with

# Sizes of a padded step, as shares of the largest one.
_RUNGS = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
# Steps that run before a shape is recorded: the compiler and the libraries of the device allocate in them.
_WARMUP = 3


class GraphInput(NamedTuple):
    """Inputs of a step, padded to fixed shapes.

    Attributes:
        stride: see `Halves`; a constant of the graph.
        rows_V: (V,) local rows; -1 is padding.
        train_T, held_out_H: positions of `Halves`; padding points at a row without any modality.
        drawn_V: (V,) entities whose structure is hidden if they have another modality.
        raw, present: (V, F) and (V,) of the modalities whose features are not on the device.
        total: number of queries in the batch.
        source_Gb, target_Gb, pool_GN, relation_Gb, sign_Gb, weight_Gb, allowed_GbN: see `Batch`.
    """

    stride: int
    rows_V: Tensor
    train_T: Tensor
    held_out_H: Tensor
    drawn_V: Tensor
    raw: dict[str, Tensor]
    present: dict[str, Tensor]
    total: Tensor
    source_Gb: Tensor
    target_Gb: Tensor
    pool_GN: Tensor
    relation_Gb: Tensor
    sign_Gb: Tensor
    weight_Gb: Tensor
    allowed_GbN: Tensor

    def tensors(self) -> list[Tensor]:
        """Return all tensors in a fixed order."""
        return torch.utils._pytree.tree_leaves(tuple(self)[1:])

    def map(self, function: Callable[[Tensor], Tensor]) -> GraphInput:
        """Return the same with every tensor replaced by its image."""
        return GraphInput(self.stride, *torch.utils._pytree.tree_map(function, tuple(self)[1:]))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return what the compiled graphs are fixed to: V, T, H."""
        return len(self.rows_V), len(self.train_T), len(self.held_out_H)


class Padding(NamedTuple):
    """Sizes of padded steps: at most `rows` unique rows, of which an even sample of `sample` (0 is all) estimates."""

    rows: int
    sample: int

    def sizes(self) -> list[int]:
        """Return the numbers of rows that a step may be padded to, ascending; 64 rows are spare in the last one."""
        return sorted({64 * (int(self.rows * share) // 64 + 2) for share in _RUNGS})

    def stride(self, rows: int) -> int:
        """Return `Halves.stride` of so many padded rows."""
        return -(-rows // self.sample) | 1 if 0 < self.sample < rows else 1

    def choose(self, held_out_V: np.ndarray) -> tuple[int, int, Halves]:
        """Return V and the padded halves of a step: a function of its rows alone, so that a resumed run pads alike.

        Args:
            held_out_V: (rows of the step,) bool, rows used only to estimate.
        """
        for rows in self.sizes():
            stride = self.stride(rows)
            if len(held_out_V) + stride > rows:
                continue
            sampled_N = held_out_V[::stride]
            last = (rows - 1) // stride  # a row of padding
            parts = np.flatnonzero(~sampled_N), np.flatnonzero(sampled_N)
            # Halves of random ids differ by a few roots of their number; more is possible in a small graph.
            half = (last + 2) // 2 + 2 * int(rows**0.5)
            if max(map(len, parts)) > half:
                half = last + 1
            padded = (np.pad(part, (0, half - len(part)), constant_values=last) for part in parts)
            return rows, stride, Halves(stride, *map(torch.from_numpy, padded))
        raise AssertionError("a batch has more rows than its queries and negatives")


class GraphStep:
    """Runs steps of one rank as graphs; see the module's text.

    Args:
        module, engine, table, tally: as `train_step` uses them.
        optimizer: Adam of the dense parameters; its state is created here if it has none.
        stores: features of the modalities of the model but structure.
        seen_r: (rows,) whether a training fact mentions the entity, on the device.
        padding: of steps.
        recorded: record steps as CUDA graphs.
        backend: of torch.compile.
    """

    def __init__(
        self,
        module: StepModule,
        engine: Engine,
        optimizer: torch.optim.Optimizer,
        table: EntityTable,
        tally: Tally,
        stores: Mapping[str, FeatureStore],
        seen_r: Tensor,
        padding: Padding,
        *,
        recorded: bool = False,
        backend: str = "inductor",
    ) -> None:
        self.module, self.engine, self.optimizer, self.table, self.tally = module, engine, optimizer, table, tally
        self.stores, self.padding, self.recorded, self.backend = dict(stores), padding, recorded, backend
        self.held = {name: held for name, store in stores.items() if (held := store.on_device()) is not None}
        self.seen_r = seen_r
        self._shapes: dict[tuple[Any, ...], _Shape] = {}
        self._graphs: dict[tuple[Any, ...], tuple[Callable[..., Any], Callable[..., Any]]] = {}

    def make_input(
        self, batch: Batch, rows_V: Tensor, held_out_V: Tensor, drawn_V: Tensor | None, send: Callable[[Tensor], Tensor]
    ) -> GraphInput:
        """Return the padded inputs of a step, sent to the device; called by the background thread.

        Args:
            batch: on the host.
            rows_V, held_out_V: (V,) local rows on the host, and whether they only estimate.
            drawn_V: see `GraphInput`; None hides nothing.
        """
        V, stride, halves = self.padding.choose(held_out_V.numpy())
        after = V - len(rows_V)

        def pad(value: Tensor, fill: float = 0) -> Tensor:
            return torch.nn.functional.pad(value, (0, 0) * (value.dim() - 1) + (0, after), value=fill)

        raw, present = {}, {}
        for name, store in self.stores.items():
            if name not in self.held:
                values_VF, present_V = store.gather(rows_V)
                raw[name], present[name] = pad(values_VF), pad(present_V)
        drawn_V = torch.zeros(0, dtype=torch.bool) if drawn_V is None else pad(drawn_V)
        total = torch.tensor(float(batch.total))
        parts = (batch.source_Gb, batch.target_Gb, batch.pool_GN, batch.relation_Gb, batch.sign_Gb, batch.weight_Gb)
        indices = pad(rows_V, -1), halves.train_T, halves.held_out_H
        return GraphInput(stride, *indices, drawn_V, raw, present, total, *parts, batch.allowed_GbN).map(send)

    def step(self, given: GraphInput, estimate: bool, factor: float) -> StepResult:
        """Take a step; see `train_step`.

        Args:
            given: from `make_input`, on the device.
            estimate: whether this step estimates mutual information.
            factor: of the scheduled learning rates.
        """
        key = (*given.shape, given.stride, estimate)
        shape = self._shapes.get(key)
        if shape is None or not shape.holds():
            if key not in self._graphs:  # a function of its own per shape: the compiler counts graphs per function
                self._graphs[key] = one_graph(_forward, backend=self.backend), one_graph(_finish, backend=self.backend)
            shape = self._shapes[key] = _Shape(self, given, estimate, *self._graphs[key])
        return shape.step(given, factor)


class _Shape:
    """The graphs of steps of one shape, and what they write."""

    def __init__(
        self,
        owner: GraphStep,
        given: GraphInput,
        estimate: bool,
        forward: Callable[..., Any],
        finish: Callable[..., Any],
    ) -> None:
        self.owner, self.estimate, self.forward, self.finish = owner, estimate, forward, finish
        device = given.rows_V.device
        self.parameters = [p for group in owner.optimizer.param_groups for p in group["params"]]
        self.groups = _groups(owner.optimizer)
        # The tensors themselves: `buffers_of` returns views, which a compiler takes for others.
        self.buffers = [owner.module.get_buffer(name) for name in buffers_of(owner.module)]
        # A leaf of zeros that is added to the rows: its gradient is theirs, and the lookup is in the graph.
        self.leaf_VD = torch.zeros(len(given.rows_V), owner.table.width, device=device, requires_grad=True)
        self.zeros = [torch.zeros_like(p) for p in self.parameters]
        self.one = torch.ones((), device=device)
        # One element each: the compiler takes float64 scalars of a CPU for numbers, which nothing can be written to.
        self.factor = torch.ones(1, dtype=torch.float64, device=device)
        self.updates = owner.table.updates.view(1)
        self.static = given.map(torch.clone) if owner.recorded else given
        self.calls = 0
        self.result: StepResult | None = None
        self.recording: torch.cuda.CUDAGraph | None = None

    def holds(self) -> bool:
        """Return whether Adam's state is still the one that the graphs update; loading a checkpoint replaces it."""
        return all(
            self.owner.optimizer.state[group.parameters[0]]["exp_avg"] is group.first[0] for group in self.groups
        )

    def step(self, given: GraphInput, factor: float) -> StepResult:
        """Take a step with these inputs."""
        self.factor.fill_(factor)
        if not self.owner.recorded:
            return self._run(given)
        torch._foreach_copy_(self.static.tensors(), given.tensors())
        self.calls += 1
        if self.calls <= _WARMUP:
            # Recording wants the first calls on another stream than the default one.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                result = self._run(self.static)
            torch.cuda.current_stream().wait_stream(stream)
            return result
        if self.recording is None:
            self.recording = torch.cuda.CUDAGraph()
            # Another thread pins memory meanwhile, which only this thread may not do.
            with torch.cuda.graph(self.recording, capture_error_mode="thread_local"):
                self.result = self._run(self.static)
        self.recording.replay()
        assert self.result is not None
        return self.result

    def _run(self, given: GraphInput) -> StepResult:
        owner, table = self.owner, self.owner.table
        loss, sums, averages, mixture = self.forward(
            owner.module, given, self.leaf_VD, table.rows_rD, owner.seen_r, owner.held, self.buffers, self.estimate
        )
        *found, grad_VD = torch.autograd.grad(loss, [*self.parameters, self.leaf_VD], self.one, allow_unused=True)
        # A parameter that the loss does not reach counts as zero: one count of updates serves all moments.
        gradients = [zero if grad is None else grad.contiguous() for grad, zero in zip(found, self.zeros, strict=True)]
        row_norm, norm, applied, skip, control = self.finish(
            gradients,
            grad_VD,
            sums,
            self.buffers,
            averages,
            [group.counter for group in self.groups],
            self.updates,
            self.factor,
            table.base_rate,
            owner.engine.clip,
            owner.tally.flat,
        )
        at = 0
        for group in self.groups:
            grads, at = gradients[at : at + len(group.parameters)], at + len(group.parameters)
            group.update(grads, skip)
        table.apply(given.rows_V, grad_VD, control)
        owner.engine.keep_norm(norm)
        # The loop and the monitor read the mean weights alone.
        intra_MK, inter_M, shared_M = mixture
        fused = Fused(self.one, self.one, intra_MK, inter_M, shared_M, self.one, self.one)
        return StepResult(sums, fused, applied, row_norm)


class _Counter(NamedTuple):
    """Number of updates and learning rate of one group of Adam's parameters, float32 scalars on the device.

    `rate` is the initial learning rate; the schedule leaves it alone unless `scheduled`.
    """

    updates: Tensor
    lr: Tensor
    rate: float
    scheduled: bool


class _Group(NamedTuple):
    """A group of Adam's parameters with its state."""

    parameters: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    decay: float
    counter: _Counter

    def update(self, gradients: list[Tensor], skip: Tensor) -> None:
        """Move the parameters, unless `skip` is 1: one launch for all of them."""
        torch._fused_adam_(
            self.parameters,
            gradients,
            self.first,
            self.second,
            [],
            [self.counter.updates] * len(gradients),
            lr=self.counter.lr,
            beta1=BETAS[0],
            beta2=BETAS[1],
            weight_decay=self.decay,
            eps=EPSILON["adam"],
            amsgrad=False,
            maximize=False,
            found_inf=skip,
        )


def _groups(optimizer: torch.optim.Optimizer) -> list[_Group]:
    """Return the groups of a plain Adam with its state, created if there is none; one count serves a group."""
    out = []
    for group in optimizer.param_groups:
        members: list[Tensor] = group["params"]
        for p in members:
            if not optimizer.state[p]:
                optimizer.state[p] = {"step": torch.zeros((), device=p.device)}
                optimizer.state[p] |= {name: torch.zeros_like(p) for name in MOMENTS}
        count = optimizer.state[members[0]]["step"]
        for p in members:
            optimizer.state[p]["step"] = count
        first, second = ([optimizer.state[p][name] for p in members] for name in MOMENTS)
        rate = float(group.get("initial_lr", group["lr"]))
        lr = torch.full((), rate, device=members[0].device)
        counter = _Counter(count, lr, rate, bool(group.get("scheduled", True)))
        out.append(_Group(members, first, second, float(group["weight_decay"]), counter))
    return out


def _forward(
    module: StepModule,
    given: GraphInput,
    leaf_VD: Tensor,
    rows_rD: Tensor,
    seen_r: Tensor,
    held: dict[str, tuple[Tensor, Tensor, Tensor]],
    buffers: list[Tensor],
    estimate: bool,
) -> tuple[Tensor, Tensor, list[Tensor], tuple[Tensor, ...]]:
    """Return the loss, the sums of `pack_stats`, the moving averages as they were before, and the mean weights."""
    averages = [value.clone() for value in buffers]
    model, real_V = module.model, given.rows_V >= 0
    rows_V = given.rows_V.clamp_min(0)
    raw, present = dict(given.raw), dict(given.present)
    for name, (values, index, has) in held.items():
        present[name] = has.index_select(0, rows_V) & real_V
        raw[name] = values.index_select(0, index.index_select(0, rows_V)).float() * present[name][:, None]
    if "structure" in model.modalities:
        raw["structure"] = rows_rD.index_select(0, rows_V).float() + leaf_VD
        seen_V = seen_r.index_select(0, rows_V) & real_V
        if len(given.drawn_V) and present:
            seen_V = seen_V & ~(given.drawn_V & torch.stack(list(present.values())).any(0))
        present["structure"] = seen_V
    raw = {name: raw[name] for name in model.modalities}
    present_MV = torch.stack([present[name] for name in model.modalities])
    halves = Halves(given.stride, given.train_T, given.held_out_H)
    fused = model.encode(raw, present_MV, halves, alone, estimate)
    loss, stats = completion_loss(
        take(fused.z_VD, given.source_Gb),
        model.relations(given.relation_Gb),
        given.sign_Gb,
        take(fused.z_VD, given.target_Gb),
        take(fused.z_VD, given.pool_GN),
        given.allowed_GbN,
        given.weight_Gb,
        module.loss,
    )
    mixture = fused.intra_MK.detach(), fused.inter_M.detach(), fused.shared_M.detach()
    return loss / given.total + fused.loss, pack_stats(stats, fused.loss).detach(), averages, mixture


def _finish(
    gradients: list[Tensor],
    grad_VD: Tensor,
    sums: Tensor,
    buffers: list[Tensor],
    averages: list[Tensor],
    counters: list[_Counter],
    updates: Tensor,
    factor: Tensor,
    row_rate: float,
    clip: float,
    tallied: Tensor,
) -> tuple[Tensor, ...]:
    """Clip, decide whether the step is applied, and count; see `clip_plain` and `train_step`.

    Returns:
        Norms of the rows' and of the dense gradients, whether the step is applied, 1 if it is not (float32), and the
        row kernel's control.
    """
    row_square = grad_VD.double().square().sum()
    square = torch.stack([grad.float().square().sum() for grad in gradients]).double().sum()
    total = (square + row_square).sqrt()
    finite = torch.isfinite(total) & torch.isfinite(sums).all()
    scale = torch.where(finite, clip_factor(total, clip), 0.0)
    if clip:
        for grad in gradients:
            grad.mul_(scale.to(grad.dtype))
    for value, before in zip(buffers, averages, strict=True):
        value.copy_(torch.where(finite, value, before))
    for counter in counters:
        counter.updates.add_(finite)
        if counter.scheduled:
            counter.lr.copy_(factor[0] * counter.rate)
    updates.add_(finite)
    tallied.copy_(tallied_with(tallied, sums, finite))
    control = make_control(scale, updates[0], factor[0] * row_rate)
    return row_square.sqrt(), square.sqrt(), finite, (~finite).float(), control
