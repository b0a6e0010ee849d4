"""The engine of the dense parameters under DeepSpeed: ZeRO 0-3, float32 or bfloat16. The only file that knows deepspeed.

Whatever the stage, it is used as the plain twin is (plain_engine has the contract), and its state is that twin's.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mocme_dist.config.schema import DeepSpeedConfig
from mocme_dist.errors import ConfigError
from mocme_dist.parallel.comm import Comm
from mocme_dist.training.plain_engine import (
    MOMENTS,
    Engine,
    TorchEngine,
    buffers_of,
    check_state,
    clip_factor,
    clip_plain,
    load_plain_state,
    make_adam,
    plain_apart,
    plain_state,
    set_plain_apart,
    together,
)

log = logging.getLogger(__name__)


class DeepSpeedEngine:
    """DeepSpeed with ZeRO 0-3. The configuration it gets is made here, key by key: it ignores what it does not know."""

    def __init__(
        self, module: nn.Module, groups: list[dict[str, Any]], clip: float, config: DeepSpeedConfig, comm: Comm, apart: str | None
    ) -> None:
        os.environ.setdefault("DS_ACCELERATOR", comm.device.type)
        # Launchers set it; DeepSpeed asks for it even where there is none and this process is the only rank.
        os.environ.setdefault("LOCAL_RANK", str(comm.device.index or 0))
        deepspeed = _import_deepspeed()
        # DeepSpeed's own optimizer for bf16 at stage 0 shows neither masters nor moments; stage 1 gives equal numbers.
        self.stage = max(config.stage, 1) if config.bf16 else config.stage
        self.comm, self.clip, self.apart, self._offloads = comm, clip, apart, config.offload_optimizer == "cpu"
        optimizer = make_adam(groups)
        exact = [buffer.clone() for buffer in module.buffers()]
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=_settings(config, self.stage, clip), dist_init_required=False
        )
        self.module, self.plain, self._norm, self._outside = module, optimizer, 0.0, 0.0
        self._adding = False
        self._count_outside()
        # The engine casts buffers along with the parameters; statistics and moving averages need their digits.
        for buffer, value in zip(module.buffers(), exact, strict=True):
            buffer.data = value
        self._make_moments()

    def __call__(self, *args: Any) -> Any:
        """Forward."""
        return self.engine(*args)

    def _count_outside(self) -> None:
        """Make the optimizer's own norm, which it clips and judges by, that of the rows outside as well."""
        if self._is_plain():
            return
        if self.stage == 3:
            groups = self.optimizer._get_norm_groups

            def norms() -> list[Tensor]:
                found = [norm.detach().clone() for norm in groups()]
                self._norm = _total(found)
                return [*found, found[0].new_tensor(self._outside)]

            self.optimizer._get_norm_groups = norms
            return
        whole = self.optimizer.scaled_global_norm

        def norm() -> Tensor:
            found = whole()
            self._norm = _total([found])
            return found.new_tensor(math.hypot(self._norm, self._outside))

        self.optimizer.scaled_global_norm = norm

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Through the engine: plain backward is refused at stage 0."""
        if not self._adding:
            self._forget_last()
        self._adding = not last
        self.engine.set_gradient_accumulation_boundary(last)
        # A part's loss is its share of the whole step's: it must not be divided again, nor its rows' gradient.
        self.engine.backward(loss, scale_wrt_gas=False)

    def _forget_last(self) -> None:
        """Where a parameter is out of reach of this loss, its last gradient would be applied once more."""
        if self.stage == 3:
            self.optimizer.grad_partitions_flat_buffer.zero_()
        if self._offloads:
            for flat in self._masters():
                if flat.grad is not None:
                    flat.grad.zero_()

    def _masters(self) -> list[Tensor]:
        """This rank's flat float32 masters, one a group; not where the engine is plain."""
        return list(self.optimizer.fp32_partitioned_groups_flat if self.stage == 3 else self.optimizer.single_partition_of_fp32_groups)

    def step(self, outside: float = 0.0) -> float:
        """Clip and update. Plain Adam would step on whatever it finds; the engine's own optimizers look first."""
        if self._is_plain():
            self._norm, factor = clip_plain(self.module, self.clip, outside)
            if factor:
                self.engine.step()
            else:
                self.engine.zero_grad()
            return factor
        self._norm, self._outside = math.nan, outside
        self.engine.step()
        return clip_factor(math.hypot(self._norm, outside), self.clip) if self.engine.was_step_applied() else 0.0

    def skip(self) -> None:
        """Forget them. The engine keeps reduced gradients in places of its own; a norm that is none makes it drop them all."""
        self.step(math.nan)

    def gradient_norm(self) -> float:
        """Of the last step."""
        return self._norm

    def apart_range(self) -> tuple[int, int]:
        """An equal part a rank; all of it where the engine is plain."""
        p = self.module.get_parameter(str(self.apart))
        size = getattr(p, "ds_numel", p.numel())
        if self._is_plain():
            return 0, size
        part = size // self.comm.world_size
        return part * self.comm.rank, part * (self.comm.rank + 1)

    def apart_state(self) -> dict[str, Tensor]:
        """See `Engine`; masters and moments where the engine keeps them."""
        if self._is_plain():
            return plain_apart(self.module, self.plain, self.apart)
        p = self.module.get_parameter(str(self.apart))
        if self.stage == 3:
            return {n: self.optimizer.get_local_fp32_param(p, None if n == "value" else n).detach() for n in ("value", *MOMENTS)}
        mapping, (begin, end) = p._hp_mapping, self.apart_range()  # type: ignore[attr-defined]
        place = mapping.lp_fragment_address
        assert (place.start, place.numel) == (begin, end - begin), "the parameter apart is its group's only one, and divides evenly"
        return {n: mapping.get_hp_fragment(None if n == "value" else n).detach() for n in ("value", *MOMENTS)}

    def set_apart(self, state: dict[str, Tensor]) -> None:
        """Into masters and moments, then into the copies that the forward pass reads."""
        if self._is_plain():
            set_plain_apart(self.module, self.plain, self.apart, state)
            return
        p = self.module.get_parameter(str(self.apart))
        with torch.no_grad():
            for name, value in state.items():
                if self.stage == 3:
                    self.optimizer.set_local_hp_param(value, p, None if name == "value" else name)
                else:
                    self.apart_state()[name].copy_(value)
            if self.stage < 3:
                self.optimizer.update_lp_params()
                return
            # As at the end of a step: parts from masters, and what is small enough is gathered for good.
            self.optimizer._partition_all_parameters()
            for number in range(len(self.optimizer.fp16_groups)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(number)
            if kept := self.optimizer.persistent_parameters:
                kept[0].all_gather(kept)

    def state(self) -> dict[str, Tensor]:
        """Full tensors at any stage; every rank takes part."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self._is_plain():
            return plain_state(self.module, self.plain, self.apart)
        out = {f"buffer/{name}": value.detach().float().cpu().clone() for name, value in buffers_of(self.module).items()}
        for name, p in together(self.module, self.apart):
            out[f"value/{name}"] = safe_get_full_fp32_param(p).float().cpu().clone()
            for moment in MOMENTS:
                value = safe_get_full_optimizer_state(p, moment)
                out[f"{moment}/{name}"] = torch.zeros_like(out[f"value/{name}"]) if value is None else value.float().cpu().clone()
        return out

    def load_state(self, state: dict[str, Tensor], num_updates: int) -> None:
        """Full tensors into whatever parts this stage keeps."""
        if self._is_plain():
            load_plain_state(self.module, self.plain, self.apart, state, num_updates)
            return
        check_state(self.module, self.apart, state)
        with torch.no_grad():
            for name, buffer in buffers_of(self.module).items():
                buffer.copy_(state[f"buffer/{name}"])
            for name, p in together(self.module, self.apart):
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
        for flat in self._masters():
            self.plain.state[flat] = {
                "step": torch.tensor(0.0, device=flat.device),
                **{moment: torch.zeros_like(flat) for moment in MOMENTS},
            }
        if self.stage < 3:
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _is_plain(self) -> bool:
        """Stage 0 in float32 leaves parameters and optimizer as they are."""
        return self.optimizer is self.plain


def _settings(config: DeepSpeedConfig, stage: int, clip: float) -> dict[str, Any]:
    """DeepSpeed's configuration, made key by key: it ignores what it does not know."""
    zero: dict[str, Any] = {"stage": stage}
    if config.offload_optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        # In plain float32 at stage 0 we clip, because the engine sees no gradients but its own.
        "gradient_clipping": clip if stage else 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": config.bf16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
    }


def _total(norms: list[Tensor]) -> float:
    """Norm of several groups; DeepSpeed writes -1 for one that is not finite."""
    values = [float(norm) for norm in norms]
    return math.hypot(*(value if value >= 0 else math.nan for value in values))


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


def make_engine(
    module: nn.Module, groups: list[dict[str, Any]], clip: float, config: DeepSpeedConfig, comm: Comm, apart: str | None = None
) -> Engine:
    """The engine that the configuration asks for.

    Args:
        module: the dense part; on `comm.device` already.
        groups: Adam's parameter groups.
        clip: largest gradient norm, 0 is off.
        apart: name of a parameter that no rank gathers (see `Engine`), alone in its group.

    Raises:
        ConfigError: DeepSpeed is asked for and not installed, or bf16 or offloading without it.
    """
    installed = importlib.util.find_spec("deepspeed") is not None
    if config.engine == "torch" or (config.engine == "auto" and not installed):
        if config.bf16:
            raise ConfigError("deepspeed.bf16: the torch engine is float32; install deepspeed or set deepspeed.bf16=false")
        if config.offload_optimizer != "none":
            raise ConfigError("deepspeed.offload_optimizer: the torch engine has none; install deepspeed or set it to none")
        if config.engine == "auto":
            log.warning("deepspeed is not installed: the dense part runs under its plain torch twin, without ZeRO")
        return TorchEngine(module, groups, clip, comm, apart)
    if not installed:
        raise ConfigError("deepspeed.engine: deepspeed is not installed; pip install deepspeed, or set deepspeed.engine=torch")
    return DeepSpeedEngine(module, groups, clip, config, comm, apart)
