"""The engine of the dense parameters: DeepSpeed, and its plain twin where DeepSpeed is not installed.

Both average gradients over ranks, clip, step Adam and give or take the full dense state by name, whatever the ZeRO
stage. The only file that knows deepspeed.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mocme_dist.config.schema import DeepSpeedConfig
from mocme_dist.errors import ConfigError
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

    def gradients_finite(self) -> bool:
        """Whether this rank sees only finite dense gradients; True where the engine checks by itself."""

    def zero_grad(self) -> None:
        """Forget the gradients of a skipped step."""

    def step(self) -> None:
        """Average, clip, update, forget the gradients."""

    def gradient_norm(self) -> float:
        """Global norm of the dense gradients of the last step, before clipping."""

    def state(self) -> dict[str, Tensor]:
        """Full values, moments and buffers by name, float32 on the CPU; collective, the same on every rank."""

    def load_state(self, state: dict[str, Tensor], num_updates: int) -> None:
        """Take what `state` gave, at any stage and number of ranks; collective."""


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """Persistent buffers only: the others are derived."""
    return {name: value for name, value in module.state_dict().items() if name not in dict(module.named_parameters())}


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
        if self.comm.world_size == 1:
            return
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        # A parameter that no rank's graph reached must still be reduced: all ranks reduce the same flat vector.
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])
        flat = self.comm.sum(flat) / self.comm.world_size
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)

    def gradients_finite(self) -> bool:
        """Checked here: plain Adam would poison the weights."""
        return all(bool(torch.isfinite(p.grad).all()) for p in self.module.parameters() if p.grad is not None)

    def zero_grad(self) -> None:
        """Forget them."""
        self.optimizer.zero_grad()

    def step(self) -> None:
        """Clip and update."""
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        self._norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.clip or float("inf")))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradient_norm(self) -> float:
        """Of the last step."""
        return self._norm

    def state(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return _plain_state(self.module, self.optimizer)

    def load_state(self, state: dict[str, Tensor], num_updates: int) -> None:
        """See `Engine`."""
        _load_values(self.module, state)
        _load_plain_moments(self.module, self.optimizer, state, num_updates)


def _plain_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    out = {f"buffer/{name}": value.detach().float().cpu().clone() for name, value in _buffers(module).items()}
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
        for name, buffer in _buffers(module).items():
            buffer.copy_(state[f"buffer/{name}"])


def _load_plain_moments(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Tensor], num_updates: int) -> None:
    for name, p in module.named_parameters():
        moments = {moment: state[f"{moment}/{name}"].to(p.device, p.dtype) for moment in MOMENTS}
        optimizer.state[p] = {"step": torch.tensor(float(num_updates)), **moments}


class DeepSpeedEngine:
    """DeepSpeed with ZeRO 0-3. The configuration it gets is made here, key by key: it ignores what it does not know."""

    def __init__(self, module: nn.Module, groups: list[dict[str, Any]], clip: float, config: DeepSpeedConfig, comm: Comm) -> None:
        os.environ.setdefault("DS_ACCELERATOR", comm.device.type)
        deepspeed = _import_deepspeed()
        self.stage, self.clip, self.comm = config.stage, clip, comm
        self.names = {id(p): name for name, p in module.named_parameters()}
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": clip,
            "zero_optimization": {"stage": config.stage},
            "bf16": {"enabled": config.bf16},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**62,
        }
        optimizer = torch.optim.Adam(groups)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self.module = module
        self.plain = optimizer
        # The engine casts buffers along with the parameters; moving averages need their digits.
        for buffer in module.buffers():
            if buffer.dtype == torch.bfloat16:
                buffer.data = buffer.data.float()

    def __call__(self, *args: Any) -> Any:
        """Forward."""
        return self.engine(*args)

    def backward(self, loss: Tensor) -> None:
        """Through the engine: plain backward is refused at stage 0."""
        self.engine.backward(loss)

    def gradients_finite(self) -> bool:
        """Stage 0 steps on whatever it finds, so it is checked here; the others skip by themselves."""
        if self.stage:
            return True
        return all(bool(torch.isfinite(p.grad).all()) for p in self.module.parameters() if p.grad is not None)

    def zero_grad(self) -> None:
        """Of engine and optimizer."""
        self.engine.zero_grad()
        self.optimizer.zero_grad()

    def step(self) -> None:
        """Clip and update."""
        self.engine.step()

    def gradient_norm(self) -> float:
        """Of the last step; 0 where the stage does not compute it."""
        norm = self.engine.get_global_grad_norm()
        return float(norm) if norm is not None else 0.0

    def state(self) -> dict[str, Tensor]:
        """Full tensors at any stage; every rank takes part."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self._is_plain():
            return _plain_state(self.module, self.plain)
        out = {f"buffer/{name}": value.detach().float().cpu().clone() for name, value in _buffers(self.module).items()}
        for name, p in self.module.named_parameters():
            out[f"value/{name}"] = safe_get_full_fp32_param(p).float().cpu().clone()
            for moment in MOMENTS:
                value = safe_get_full_optimizer_state(p, moment)
                out[f"{moment}/{name}"] = torch.zeros_like(out[f"value/{name}"]) if value is None else value.float().cpu().clone()
        return out

    def load_state(self, state: dict[str, Tensor], num_updates: int) -> None:
        """Full tensors into whatever parts this stage keeps."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if self._is_plain():
            _load_values(self.module, state)
            _load_plain_moments(self.module, self.plain, state, num_updates)
            return
        with torch.no_grad():
            for name, buffer in _buffers(self.module).items():
                buffer.copy_(state[f"buffer/{name}"])
        for name, p in self.module.named_parameters():
            safe_set_full_fp32_param(p, state[f"value/{name}"].to(self.comm.device))
            for moment in MOMENTS:
                safe_set_full_optimizer_state(p, state[f"{moment}/{name}"].to(self.comm.device), moment)
        for values in self.plain.state.values():
            if "step" in values:
                values["step"] = torch.tensor(float(num_updates)) if isinstance(values["step"], Tensor) else num_updates

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
