"""The engines.

DeepSpeed at every stage gives the losses and the states of its plain twin, and resumes from any other's.
"""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mocme_dist.config.schema import DeepSpeedConfig
from mocme_dist.errors import CheckpointError, ConfigError
from mocme_dist.model.experts import Experts
from mocme_dist.training.deepspeed_engine import make_engine
from mocme_dist.training.engine import Engine, check_state, divide_experts, join_experts

# How the dense part may be held: engine, ZeRO stage, bf16.
FLOAT = [("torch", 0, False), *(("deepspeed", stage, False) for stage in range(4))]
BF16 = [("deepspeed", stage, True) for stage in range(4)]
OFFLOAD = [("offload", stage, False) for stage in (1, 2, 3)]
STEPS, SAMPLES = 5, 6


class Tiny(nn.Module):
    """Odd sizes, so that no stage divides them evenly; a parameter that every other step reaches.

    A buffer that bf16 would cut.
    """

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)
        self.sometimes = nn.Parameter(torch.ones(3))
        self.register_buffer("scale", torch.tensor(1.0009765))

    def forward(self, rows_VD: Tensor, reach: bool) -> Tensor:
        """Sum over the rank's samples, divided by the number of all."""
        hidden = torch.tanh(self.first(rows_VD.to(self.first.weight.dtype)))
        out = self.second(hidden).float() * self.scale
        return (out * self.sometimes.float() if reach else out).square().sum() / SAMPLES


def make(comm: Any, kind: tuple[str, int, bool], clip: float = 0.0, parts: int = 1) -> Engine:
    module = Tiny()
    slow = [p for name, p in module.named_parameters() if name.startswith("second")]
    fast = [p for name, p in module.named_parameters() if not name.startswith("second")]
    groups: list[dict[str, Any]] = [{"params": fast, "lr": 0.05}, {"params": slow, "lr": 0.01, "scheduled": False}]
    engine, stage, bf16 = kind
    config: dict[str, Any] = (
        {"engine": "deepspeed", "offload_optimizer": "cpu"} if engine == "offload" else {"engine": engine}
    )
    config |= {"stage": stage, "bf16": bf16, "gradient_accumulation_steps": parts}
    return make_engine(module, groups, clip, DeepSpeedConfig(**config), comm)


def forward(engine: Engine, comm: Any, step: int) -> tuple[Tensor, Tensor]:
    """This rank's rows of the step's global batch, outside the engine, and its share of the loss."""
    rows_BD = torch.randn(SAMPLES, 5, generator=torch.Generator().manual_seed(step))
    rows_VD = rows_BD[comm.rank :: comm.world_size].clone().requires_grad_()
    return rows_VD, engine(rows_VD, step % 2 == 0) * comm.world_size


def update(engine: Engine, outside: float = 0.0, finite: bool = True) -> float:
    """The engine's step; the factor of its gradients."""
    return float(engine.step(torch.tensor(outside, dtype=torch.float64), torch.tensor(finite)))


def take_step(engine: Engine, comm: Any, step: int) -> float:
    """One step; the global loss before it. The engine leaves the rank's own rows as they are."""
    rows_VD, loss = forward(engine, comm, step)
    before = rows_VD.detach().clone()
    engine.backward(loss)
    engine.scale_rates(1 / (1 + step))
    assert update(engine)
    assert torch.equal(rows_VD, before) and rows_VD.grad is not None and bool(rows_VD.grad.abs().sum() > 0)
    return float(comm.sum(loss)) / comm.world_size


def assert_states_equal(left: dict[str, Tensor], right: dict[str, Tensor], **tolerance: float) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def check_losses(comm: Any, kinds: list[tuple[str, int, bool]]) -> tuple[list[list[float]], dict[str, Tensor]]:
    """Losses of each kind and the plain twin's last state; every kind ends in the state of the first."""
    losses, states = [], []
    for kind in kinds:
        engine = make(comm, kind, clip=0.5)
        losses.append([take_step(engine, comm, step) for step in range(STEPS)])
        states.append(engine.state())
        assert {value.dtype for value in states[-1].values()} == {torch.float32}
        assert engine.gradient_norm() > 0
    for state in states[1:]:
        assert_states_equal(states[0], state, rtol=1e-5, atol=1e-6)
    return losses, states[0]


def check_resume(comm: Any, kinds: list[tuple[str, int, bool]], tolerance: float) -> None:
    """A state taken after two steps, loaded into a new engine of every kind before its first step.

    The rest is as it was.
    """
    for saved_as in kinds:
        source = make(comm, saved_as)
        for step in range(2):
            take_step(source, comm, step)
        saved = source.state()
        expected = [take_step(source, comm, step) for step in range(2, STEPS)]
        final = source.state()
        for loaded_as in kinds if saved_as in (kinds[0], kinds[-1]) else [saved_as]:
            engine = make(comm, loaded_as)
            engine.load_state(saved, 2)
            assert_states_equal(saved, engine.state(), rtol=0, atol=0)
            losses = [take_step(engine, comm, step) for step in range(2, STEPS)]
            bound = 0.0 if loaded_as == saved_as else tolerance
            assert losses == pytest.approx(expected, rel=bound, abs=bound), (saved_as, loaded_as)
            assert_states_equal(final, engine.state(), rtol=bound, atol=bound)


def check_skips(comm: Any, kinds: list[tuple[str, int, bool]]) -> None:
    """A skipped step leaves no trace, neither now nor in the gradients of the next step."""
    for kind in kinds:
        undisturbed, engine = make(comm, kind), make(comm, kind)
        for step in range(2):
            take_step(undisturbed, comm, step)
            take_step(engine, comm, step)
        before = engine.state()
        # The caller found something not finite elsewhere: gradients are there and must go.
        _, loss = forward(engine, comm, 90)
        engine.backward(loss)
        assert not update(engine, finite=False)
        assert_states_equal(before, engine.state(), rtol=0, atol=0)
        # What lies outside is not finite, or a later part of the step.
        _, loss = forward(engine, comm, 92)
        engine.backward(loss)
        assert not update(engine, math.nan)
        engine.backward(forward(engine, comm, 93)[1], last=False)
        engine.backward(forward(engine, comm, 94)[1] * (math.inf if comm.rank == 0 else 1))
        assert not update(engine, finite=False)
        assert_states_equal(before, engine.state(), rtol=0, atol=0)
        # One rank's gradient is not finite: all ranks refuse.
        rows_VD, loss = forward(engine, comm, 91)
        if comm.rank == comm.world_size - 1:
            loss = loss * float("inf") + (rows_VD * 0).sum()
        engine.backward(loss)
        assert not update(engine)
        assert_states_equal(before, engine.state(), rtol=0, atol=0)
        for step in range(2, STEPS):
            assert take_step(engine, comm, step) == take_step(undisturbed, comm, step), kind
        assert_states_equal(undisturbed.state(), engine.state(), rtol=0, atol=0)


def check_parts_and_outside(comm: Any, kinds: list[tuple[str, int, bool]]) -> None:
    """Parts of a step add up to the whole, and clipping is by the norm with what lies outside.

    The plain engine is first.
    """
    states = []
    for kind in kinds:
        whole, cut = make(comm, kind, clip=0.5), make(comm, kind, clip=0.5, parts=2)
        bound = 1e-2 if kind[2] else 1e-5
        for step in range(3):
            outside = 0.7 * step
            whole.backward(forward(whole, comm, step)[1] + forward(whole, comm, step + 50)[1])
            expected = update(whole, outside)
            cut.backward(forward(cut, comm, step)[1], last=False)
            cut.backward(forward(cut, comm, step + 50)[1], last=True)
            factor = update(cut, outside)
            assert 0 < factor < 1 and factor == pytest.approx(expected, rel=bound), kind
            assert factor == pytest.approx(0.5 / math.hypot(cut.gradient_norm(), outside), rel=1e-5)
        tolerance = {"rtol": 2 * bound, "atol": 2 * bound} if kind[2] else {"rtol": 1e-5, "atol": 1e-6}
        assert_states_equal(whole.state(), cut.state(), **tolerance)
        states.append(cut.state())
        assert_states_equal(states[0], cut.state(), **tolerance)


def check_bf16(comm: Any) -> list[list[float]]:
    """Losses of each stage; masters and buffers keep the digits that bf16 has not."""
    losses = []
    for kind in BF16:
        engine = make(comm, kind)
        plain = make(comm, FLOAT[0]).state()
        state = engine.state()
        assert state["buffer/scale"].item() == torch.tensor(1.0009765).item()
        assert {buffer.dtype for buffer in engine.module.buffers()} == {torch.float32}
        # The first masters are bf16's rounding of the plain values.
        assert_states_equal(plain, state, rtol=2**-8, atol=0)
        losses.append([take_step(engine, comm, step) for step in range(STEPS)])
        master = engine.state()["value/first.weight"]
        assert not torch.equal(master, master.bfloat16().float())
    return losses


def body(comm: Any) -> Any:
    """All checks in one launch: importing DeepSpeed costs seconds. Three ranks try what pads: the two ends of FLOAT."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    kinds = FLOAT if comm.world_size < 3 else [FLOAT[0], FLOAT[3], FLOAT[4]]
    losses, state = check_losses(comm, kinds)
    check_resume(comm, kinds, 1e-6)
    check_skips(comm, [*kinds, *(BF16 + OFFLOAD if comm.world_size == 2 else [])])
    check_parts_and_outside(comm, [*kinds, *(BF16 + OFFLOAD if comm.world_size == 2 else [])])
    check_losses(comm, [*kinds[:1], *OFFLOAD])
    check_resume(comm, [kinds[0], *OFFLOAD] if comm.world_size == 2 else [], 1e-6)
    bf16 = check_bf16(comm) if comm.world_size < 3 else []
    check_resume(comm, BF16[1:] if comm.world_size == 2 else [], 1e-2)
    return losses, bf16, state


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3])
def test_losses_states_and_resumed_losses_are_equal_at_every_stage(run_ranks, world):
    expected, final = run_ranks(1, reference)[0]
    assert len(set(expected)) == STEPS
    for losses, bf16, state in run_ranks(world, body):
        for got in losses:
            assert got == pytest.approx(expected, rel=1e-6)
        for got in bf16:
            assert got == pytest.approx(expected, rel=0.05)
        assert_states_equal(final, state, rtol=1e-5, atol=1e-6)


def check_rates(comm: Any) -> None:
    """Adam's first step is as long as the rate: the scheduled group's is scaled, the other one's is not."""
    engine = make(comm, FLOAT[0])
    before = engine.state()
    engine.scale_rates(0.1)
    engine.backward(forward(engine, comm, 0)[1])
    assert update(engine)
    moved = {name: float((value - before[name]).abs().max()) for name, value in engine.state().items()}
    assert moved["value/first.weight"] == pytest.approx(0.005, rel=1e-3)
    assert moved["value/second.weight"] == pytest.approx(0.01, rel=1e-3)


def test_a_factor_scales_the_rates_of_scheduled_groups_only(run_ranks):
    run_ranks(1, check_rates)


def reference(comm: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and last state of the plain engine on one rank."""
    losses, state = check_losses(comm, FLOAT[:1])
    return losses[0], state


def test_torch_engine_refuses_what_is_not_finite_and_counts_unreached_parameters(run_ranks):
    run_ranks(2, check_skips, FLOAT[:1])
    run_ranks(2, check_parts_and_outside, FLOAT[:1])
    run_ranks(1, check_resume, FLOAT[:1], 0.0)


def check_refusals(comm: Any) -> None:
    engine = make(comm, FLOAT[0])
    state = engine.state()
    with pytest.raises(CheckpointError, match=r"value/second.bias: checkpoint nothing, now \(3,\)"):
        engine.load_state({name: value for name, value in state.items() if name != "value/second.bias"}, 1)
    with pytest.raises(CheckpointError, match=r"value/first.bias: checkpoint \(9,\), now \(7,\)"):
        engine.load_state({**state, "value/first.bias": torch.zeros(9)}, 1)
    with pytest.raises(ConfigError, match="bf16"):
        make(comm, ("torch", 1, True))
    with pytest.raises(ConfigError, match="offload"):
        make_engine(Tiny(), [], 0, DeepSpeedConfig(engine="torch", offload_optimizer="cpu"), comm)


def test_a_state_of_another_model_is_refused_by_name(run_ranks):
    run_ranks(1, check_refusals)


def test_divided_experts_are_joined_under_the_names_and_values_of_the_whole():
    module = nn.Module()
    module.experts = Experts(3, 2, 4, 0.0, False, torch.Generator().manual_seed(0))
    whole = {f"value/{name}": p.detach().clone() for name, p in module.named_parameters()}
    module.experts = module.experts.divided()
    named = divide_experts(module, {**whole, "buffer/other": torch.ones(3)})
    assert named.keys() == {f"value/{name}" for name, _ in module.named_parameters()} | {"buffer/other"}
    for name, p in module.named_parameters():
        assert torch.equal(named[f"value/{name}"], p)
    back = join_experts(named)
    assert list(back) == [*whole, "buffer/other"] and not named
    assert all(torch.equal(back[name], value) for name, value in whole.items())


def test_a_checkpoint_of_fewer_modalities_is_refused_with_both_shapes():
    module, saved = nn.Module(), nn.Module()
    module.experts = Experts(3, 2, 4, 0.0, False, torch.Generator()).divided()
    saved.experts = Experts(2, 2, 4, 0.0, False, torch.Generator())
    kinds = ("value", "exp_avg", "exp_avg_sq")
    fewer = {f"{kind}/{name}": p.detach() for name, p in saved.named_parameters() for kind in kinds}
    with pytest.raises(CheckpointError, match=r"experts.by_modality.2.first_MDH: checkpoint nothing, now \(1, 4, 8\)"):
        check_state(module, None, divide_experts(module, fewer))
