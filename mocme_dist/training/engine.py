"""The engine of the dense parameters: DeepSpeed, and its plain twin where DeepSpeed is not installed.

Both average gradients over ranks, clip, step Adam and give or take the full dense state by name, whatever the ZeRO
stage. The only file that knows deepspeed.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mocme_dist.config.schema import DeepSpeedConfig
from mocme_dist.errors import CheckpointError, ConfigError
from mocme_dist.parallel.comm import Comm

log = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine(Protocol):
    """What the loop needs of an engine."""

    module: nn.Module

    def __call__(self, *args: Any) -> Any:
        """Forward through the wrapped module."""

    def backward(self, loss: Tensor) -> None:
        """Gradients of the dense parameters, and of any leaf in the graph."""

    def step(self) -> bool:
        """Average, clip, update, forget the gradients; collective.

        Returns:
            Whether it was applied, the same on every rank: when a gradient of any rank is not finite, nothing moves.
        """

    def skip(self) -> None:
        """Forget the gradients of a step that is not to be applied; called by all ranks."""

    def gradient_norm(self) -> float:
        """Global norm of the dense gradients of the last step, before clipping."""

    def state(self) -> dict[str, Tensor]:
        """Full values, moments and buffers by name, float32 on the CPU; collective, the same on every rank."""

    def load_state(self, state: dict[str, Tensor], num_updates: int) -> None:
        """Take what `state` gave, at any stage and number of ranks; collective.

        Args:
            num_updates: steps that were applied so far, for Adam's bias correction.

        Raises:
            CheckpointError: tensors of `state` are missing here, or have other shapes than here.
        """


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """Persistent buffers only: the others are derived."""
    parameters = dict(module.named_parameters())
    return {name: value for name, value in module.state_dict().items() if name not in parameters}


def _check_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Refuse a state of another model; under ZeRO-3 a parameter's own shape is that of its part."""
    here = {f"buffer/{name}": tuple(value.shape) for name, value in buffers_of(module).items()}
    for name, p in module.named_parameters():
        here |= {f"{kind}/{name}": tuple(getattr(p, "ds_shape", p.shape)) for kind in ("value", *MOMENTS)}
    there = {name: tuple(value.shape) for name, value in state.items()}
    differing = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if differing:
        shown = "; ".join(f"{name}: checkpoint {there.get(name, 'nothing')}, now {here.get(name, 'nothing')}" for name in differing[:4])
        raise CheckpointError(
            f"dense state: {len(differing)} tensors differ from this model's: {shown}; the settings or the widths of the "
            "features have changed; use another run.dir or the settings of then"
        )


class TorchEngine:
    """Plain Adam and one flat all-reduce: the twin that parity tests compare with, and the engine without DeepSpeed."""

    def __init__(self, module: nn.Module, groups: list[dict[str, Any]], clip: float, comm: Comm) -> None:
        self.module, self.clip, self.comm = module, clip, comm
        self.optimizer = torch.optim.Adam(groups)
        self._norm = 0.0

    def __call__(self, *args: Any) -> Any:
        """Forward."""
        return self.module(*args)

    def backward(self, loss: Tensor) -> None:
        """Local gradients, then their mean over ranks."""
        loss.backward()
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        # A parameter that this rank's graph did not reach counts as zero, as it does under DeepSpeed: all ranks reduce
        # the same flat vector, and one count of updates serves all moments.
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])
        flat = self.comm.sum(flat) / self.comm.world_size
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)

    def step(self) -> bool:
        """Clip and update; plain Adam would poison the weights with what is not finite."""
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        self._norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.clip or float("inf")))
        applied = math.isfinite(self._norm)
        if applied:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return applied

    def skip(self) -> None:
        """Forget them."""
        self.optimizer.zero_grad()

    def gradient_norm(self) -> float:
        """Of the last step."""
        return self._norm

    def state(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return _plain_state(self.module, self.optimizer)

    def load_state(self, state: dict[str, Tensor], num_updates: int) -> None:
        """See `Engine`."""
        _check_state(self.module, state)
        _load_values(self.module, state)
        _load_plain_moments(self.module, self.optimizer, state, num_updates)


def _plain_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    out = {f"buffer/{name}": value.detach().float().cpu().clone() for name, value in buffers_of(module).items()}
    for name, p in module.named_parameters():
        out[f"value/{name}"] = p.detach().float().cpu().clone()
        for moment in MOMENTS:
            value = optimizer.state.get(p, {}).get(moment)
            out[f"{moment}/{name}"] = torch.zeros_like(out[f"value/{name}"]) if value is None else value.detach().float().cpu().clone()
    return out


def _load_values(module: nn.Module, state: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(state[f"value/{name}"])
        for name, buffer in buffers_of(module).items():
            buffer.copy_(state[f"buffer/{name}"])


def _load_plain_moments(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Tensor], num_updates: int) -> None:
    for name, p in module.named_parameters():
        moments = {moment: state[f"{moment}/{name}"].to(p.device, p.dtype, copy=True) for moment in MOMENTS}
        optimizer.state[p] = {"step": torch.tensor(float(num_updates)), **moments}


class DeepSpeedEngine:
    """DeepSpeed with ZeRO 0-3. The configuration it gets is made here, key by key: it ignores what it does not know."""

    def __init__(self, module: nn.Module, groups: list[dict[str, Any]], clip: float, config: DeepSpeedConfig, comm: Comm) -> None:
        os.environ.setdefault("DS_ACCELERATOR", comm.device.type)
        # Launchers set it; DeepSpeed asks for it even where there is none and this process is the only rank.
        os.environ.setdefault("LOCAL_RANK", str(comm.device.index or 0))
        deepspeed = _import_deepspeed()
        # DeepSpeed's own optimizer for bf16 at stage 0 shows neither masters nor moments; stage 1 gives equal numbers.
        self.stage = max(config.stage, 1) if config.bf16 else config.stage
        self.comm = comm
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": clip,
            "zero_optimization": {"stage": self.stage},
            "bf16": {"enabled": config.bf16},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**62,
        }
        optimizer = torch.optim.Adam(groups)
        exact = [buffer.clone() for buffer in module.buffers()]
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self.module, self.plain, self._norm = module, optimizer, 0.0
        # The engine casts buffers along with the parameters; statistics and moving averages need their digits.
        for buffer, value in zip(module.buffers(), exact, strict=True):
            buffer.data = value
        self._make_moments()

    def __call__(self, *args: Any) -> Any:
        """Forward."""
        return self.engine(*args)

    def backward(self, loss: Tensor) -> None:
        """Through the engine: plain backward is refused at stage 0."""
        if self.stage == 3:
            # Where a parameter is out of reach of this loss, its last gradient would be applied once more.
            self.optimizer.grad_partitions_flat_buffer.zero_()
        self.engine.backward(loss)

    def step(self) -> bool:
        """Clip and update. Plain Adam would step on whatever it finds; the engine's own optimizers look first."""
        if self._is_plain():
            self._norm = float(torch.nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None]))
            if not math.isfinite(self._norm):
                self.skip()
                return False
        self.engine.step()
        return bool(self.engine.was_step_applied())

    def skip(self) -> None:
        """Forget them. The engine keeps reduced gradients in places of its own and adds the next ones to those."""
        if self._is_plain():
            self.engine.zero_grad()
            return
        # NaN makes the engine skip on every rank and clean up as it does after an overflow.
        if self.stage == 3:
            self.optimizer.grad_partitions_flat_buffer.fill_(float("nan"))
        else:
            from deepspeed.utils import safe_set_full_grad

            p = next(p for p in self.module.parameters() if p.requires_grad)
            safe_set_full_grad(p, torch.full_like(p, float("nan")))
        self.engine.step()

    def gradient_norm(self) -> float:
        """Of the last step."""
        norm = self._norm if self._is_plain() else self.engine.get_global_grad_norm()
        return float(norm) if norm is not None else 0.0

    def state(self) -> dict[str, Tensor]:
        """Full tensors at any stage; every rank takes part."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self._is_plain():
            return _plain_state(self.module, self.plain)
        out = {f"buffer/{name}": value.detach().float().cpu().clone() for name, value in buffers_of(self.module).items()}
        for name, p in self.module.named_parameters():
            out[f"value/{name}"] = safe_get_full_fp32_param(p).float().cpu().clone()
            for moment in MOMENTS:
                value = safe_get_full_optimizer_state(p, moment)
                out[f"{moment}/{name}"] = torch.zeros_like(out[f"value/{name}"]) if value is None else value.float().cpu().clone()
        return out

    def load_state(self, state: dict[str, Tensor], num_updates: int) -> None:
        """Full tensors into whatever parts this stage keeps."""
        _check_state(self.module, state)
        if self._is_plain():
            _load_values(self.module, state)
            _load_plain_moments(self.module, self.plain, state, num_updates)
            return
        with torch.no_grad():
            for name, buffer in buffers_of(self.module).items():
                buffer.copy_(state[f"buffer/{name}"])
            for name, p in self.module.named_parameters():
                self._set_full(p, state[f"value/{name}"].to(self.comm.device), None)
                for moment in MOMENTS:
                    self._set_full(p, state[f"{moment}/{name}"].to(self.comm.device), moment)
        if self.stage < 3:
            # What is set are the float32 masters; the parameters that the forward pass reads are copies of them.
            self.optimizer.update_lp_params()
        for values in self.plain.state.values():
            values["step"].fill_(num_updates)

    def _set_full(self, p: nn.Parameter, value: Tensor, moment: str | None) -> None:
        """Put this rank's part of `value` where the stage keeps it: the master of `p` or one of its moments."""
        if self.stage < 3:
            p.set_full_hp_param(value, moment)  # type: ignore[attr-defined]
            return
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param, safe_set_local_optimizer_state

        # Parts are padded to one size; deepspeed's own full setters fail where a parameter does not divide evenly.
        size = safe_get_local_fp32_param(p).numel()
        padded = torch.nn.functional.pad(value.flatten(), (0, size * self.comm.world_size - value.numel()))
        part = padded[size * self.comm.rank : size * (self.comm.rank + 1)]
        if moment is not None:
            safe_set_local_optimizer_state(p, part, moment)
            return
        import deepspeed

        safe_set_local_fp32_param(p, part)
        with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
            p.copy_(value)

    def _make_moments(self) -> None:
        """Give Adam the state that its first step would make: until then DeepSpeed can neither show nor take moments."""
        if self._is_plain():
            return
        flats = (
            self.optimizer.fp32_partitioned_groups_flat if self.stage == 3 else [p for g in self.plain.param_groups for p in g["params"]]
        )
        for flat in flats:
            self.plain.state[flat] = {"step": torch.tensor(0.0), **{moment: torch.zeros_like(flat) for moment in MOMENTS}}
        if self.stage < 3:
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _is_plain(self) -> bool:
        """Stage 0 in float32 leaves parameters and optimizer as they are."""
        return self.optimizer is self.plain


def _import_deepspeed() -> Any:
    import deepspeed
    import deepspeed.ops

    # On a CPU, joining a group would build a shared-memory extension with the C++ compiler for a minute or two, and
    # fail without one; gloo serves us. A private name, so its absence is no error.
    compatible = getattr(deepspeed.ops, "__compatible_ops__", {})
    compatible["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if dist.is_initialized() and not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=None, verbose=False)
    return deepspeed


def make_engine(module: nn.Module, groups: list[dict[str, Any]], clip: float, config: DeepSpeedConfig, comm: Comm) -> Engine:
    """The engine that the configuration asks for.

    Args:
        module: the dense part; on `comm.device` already.
        groups: Adam's parameter groups.
        clip: largest gradient norm, 0 is off.

    Raises:
        ConfigError: DeepSpeed is asked for and not installed, or bf16 without it.
    """
    installed = importlib.util.find_spec("deepspeed") is not None
    if config.engine == "torch" or (config.engine == "auto" and not installed):
        if config.bf16:
            raise ConfigError("deepspeed.bf16: the torch engine is float32; install deepspeed or set deepspeed.bf16=false")
        if config.engine == "auto":
            log.warning("deepspeed is not installed: the dense part runs under its plain torch twin, without ZeRO")
        return TorchEngine(module, groups, clip, comm)
    if not installed:
        raise ConfigError("deepspeed.engine: deepspeed is not installed; pip install deepspeed, or set deepspeed.engine=torch")
    return DeepSpeedEngine(module, groups, clip, config, comm)
