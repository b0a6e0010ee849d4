"""The engine of the dense parameters under DeepSpeed: ZeRO 0-3, float32 or bfloat16. The owner of deepspeed.

At every stage it has the contract and the state of the plain engine (see `engine`).
"""

from __future__ import annotations

import importlib.util
import logging
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mocme_dist.config.schema import DeepSpeedConfig
from mocme_dist.environment import set_defaults
from mocme_dist.errors import ConfigError
from mocme_dist.parallel.comm import Comm
from mocme_dist.training.engine import (
    MOMENTS,
    Engine,
    TorchEngine,
    buffers_of,
    check_state,
    clip_factor,
    clip_plain,
    divide_experts,
    join_experts,
    load_plain_state,
    make_adam,
    plain_apart,
    plain_state,
    scale_rates,
    set_plain_apart,
    together,
)

log = logging.getLogger(__name__)

# Numbers that are reduced or gathered together, 80 MB in float32; with DeepSpeed's 5 * 10^8 its copies are as large as
# the model.
BUCKET = 20_000_000


class DeepSpeedEngine:
    """DeepSpeed with ZeRO 0-3."""

    def __init__(
        self,
        module: nn.Module,
        groups: list[dict[str, Any]],
        clip: float,
        config: DeepSpeedConfig,
        comm: Comm,
        apart: str | None,
    ) -> None:
        # Launchers set LOCAL_RANK; DeepSpeed reads it even if this process is the only rank and has no launcher.
        set_defaults({"DS_ACCELERATOR": comm.device.type, "LOCAL_RANK": str(comm.device.index or 0)})
        deepspeed = _import_deepspeed()
        # DeepSpeed's own optimizer for bf16 at stage 0 exposes neither masters nor moments; stage 1 gives equal
        # numbers.
        self.stage = max(config.stage, 1) if config.bf16 else config.stage
        self.comm, self.clip, self.apart, self._offloads = comm, clip, apart, config.offload_optimizer == "cpu"
        optimizer = make_adam(groups)
        exact = [buffer.clone() for buffer in module.buffers()]
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=_settings(config, self.stage, clip, largest_module(module)),
            dist_init_required=False,
        )
        self.module, self.plain, self._outside = module, optimizer, 0.0
        self._norm: float | Tensor = 0.0
        self._adding = False
        self._count_outside()
        # The engine casts buffers along with the parameters; statistics and moving averages need full precision.
        for buffer, value in zip(module.buffers(), exact, strict=True):
            buffer.data = value
        self._make_moments()

    def __call__(self, *args: Any) -> Any:
        """Forward."""
        return self.engine(*args)

    @property
    def plain_adam(self) -> torch.optim.Optimizer | None:
        """See `Engine`."""
        return self.plain if self._is_plain() else None

    def keep_norm(self, norm: Tensor) -> None:
        """See `Engine`."""
        self._norm = norm

    def _count_outside(self) -> None:
        """Include the rows outside in the optimizer's own norm, which it uses for clipping and the finite check."""
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
            return found.new_tensor(math.hypot(float(self._norm), self._outside))

        self.optimizer.scaled_global_norm = norm

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """See `Engine`; through DeepSpeed, because it refuses a plain backward at stage 0."""
        if not self._adding:
            self._forget_last()
        self._adding = not last
        self.engine.set_gradient_accumulation_boundary(last)
        # The loss of a micro-batch is its share of the whole step: neither it nor the gradient of its rows may be
        # divided again.
        self.engine.backward(loss, scale_wrt_gas=False)

    def _forget_last(self) -> None:
        """Clear gradients: otherwise the last gradient of a parameter that this loss does not reach would be applied
        again."""
        if self.stage == 3:
            self.optimizer.grad_partitions_flat_buffer.zero_()
        if self._offloads:
            for flat in self._masters():
                if flat.grad is not None:
                    flat.grad.zero_()

    def _masters(self) -> list[Tensor]:
        """Return this rank's flat float32 masters, one per group; not for a plain engine."""
        return list(
            self.optimizer.fp32_partitioned_groups_flat
            if self.stage == 3
            else self.optimizer.single_partition_of_fp32_groups
        )

    def step(self, outside: Tensor, finite: Tensor) -> Tensor:
        """See `Engine`. DeepSpeed's own optimizers check on the host whether gradients are finite: this waits for the
        device. They keep reduced gradients internally; NaN as the norm makes them skip the update and drop them."""
        if self._is_plain():
            self._norm, factor = clip_plain(self.module, self.clip, outside, finite)
            self.plain.found_inf = (factor == 0).float()  # type: ignore[attr-defined]
            self.engine.step()
            return factor
        self._norm, self._outside = math.nan, float(torch.where(finite, outside, math.nan))
        self.engine.step()
        factor = clip_factor(outside.new_tensor(math.hypot(self._norm, self._outside)), self.clip)
        return factor if self.engine.was_step_applied() else torch.zeros_like(factor)

    def scale_rates(self, factor: float) -> None:
        """See `Engine`; DeepSpeed's own optimizers share the groups of the plain one."""
        scale_rates(self.plain, factor)

    def gradient_norm(self) -> float:
        """See `Engine`."""
        return float(self._norm)

    def apart_range(self) -> tuple[int, int]:
        """See `Engine`; equal parts per rank, all of it for a plain engine."""
        p = self.module.get_parameter(str(self.apart))
        size = getattr(p, "ds_numel", p.numel())
        if self._is_plain():
            return 0, size
        part = size // self.comm.world_size
        return part * self.comm.rank, part * (self.comm.rank + 1)

    def apart_state(self) -> dict[str, Tensor]:
        """See `Engine`; masters and moments in DeepSpeed's own storage."""
        if self._is_plain():
            return plain_apart(self.module, self.plain, self.apart)
        p = self.module.get_parameter(str(self.apart))
        if self.stage == 3:
            return {
                n: self.optimizer.get_local_fp32_param(p, None if n == "value" else n).detach()
                for n in ("value", *MOMENTS)
            }
        mapping, (begin, end) = p._hp_mapping, self.apart_range()  # type: ignore[attr-defined]
        place = mapping.lp_fragment_address
        assert (place.start, place.numel) == (begin, end - begin), (
            "the parameter apart is its group's only one, and divides evenly"
        )
        return {n: mapping.get_hp_fragment(None if n == "value" else n).detach() for n in ("value", *MOMENTS)}

    def set_apart(self, state: dict[str, Tensor]) -> None:
        """See `Engine`; sets masters and moments, then the copies that the forward pass reads."""
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
            # As at the end of a step: parts are copied from masters, and small parameters are gathered permanently.
            self.optimizer._partition_all_parameters()
            for number in range(len(self.optimizer.fp16_groups)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(number)
            if kept := self.optimizer.persistent_parameters:
                kept[0].all_gather(kept)

    def state(self) -> dict[str, Tensor]:
        """See `Engine`."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self._is_plain():
            return plain_state(self.module, self.plain, self.apart)
        out = {
            f"buffer/{name}": value.detach().float().cpu().clone() for name, value in buffers_of(self.module).items()
        }
        for name, p in together(self.module, self.apart):
            out[f"value/{name}"] = safe_get_full_fp32_param(p).float().cpu().clone()
            for moment in MOMENTS:
                value = safe_get_full_optimizer_state(p, moment)
                out[f"{moment}/{name}"] = (
                    torch.zeros_like(out[f"value/{name}"]) if value is None else value.float().cpu().clone()
                )
        return join_experts(out)

    def load_state(self, state: dict[str, Tensor], num_updates: int) -> None:
        """See `Engine`; loads full tensors into the parts that this stage keeps."""
        if self._is_plain():
            load_plain_state(self.module, self.plain, self.apart, state, num_updates)
            return
        state = divide_experts(self.module, state)
        check_state(self.module, self.apart, state)
        with torch.no_grad():
            for name, buffer in buffers_of(self.module).items():
                buffer.copy_(state[f"buffer/{name}"])
            for name, p in together(self.module, self.apart):
                self._set_full(p, state[f"value/{name}"].to(self.comm.device), None)
                for moment in MOMENTS:
                    self._set_full(p, state[f"{moment}/{name}"].to(self.comm.device), moment)
        if self.stage < 3:
            # The float32 masters are set; the parameters that the forward pass reads are copies of them.
            self.optimizer.update_lp_params()
        for values in self.plain.state.values():
            values["step"].fill_(num_updates)

    def _set_full(self, p: nn.Parameter, value: Tensor, moment: str | None) -> None:
        """Set this rank's part of the master of `p`, or of one of its moments, to that of `value`."""
        if self.stage < 3:
            p.set_full_hp_param(value, moment)  # type: ignore[attr-defined]
            return
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param, safe_set_local_optimizer_state

        # Parts are padded to one size; deepspeed's own full setters fail if a parameter does not divide evenly.
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
        """Create Adam's state as its first step would: until then DeepSpeed can neither return nor load moments."""
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
        """Return whether DeepSpeed leaves parameters and optimizer as they are: stage 0 in float32."""
        return self.optimizer is self.plain


def largest_module(module: nn.Module) -> int:
    """Return the largest number of parameters that one module has itself; ZeRO-3 gathers them together."""
    return max(sum(p.numel() for p in part.parameters(recurse=False)) for part in module.modules())


def _settings(config: DeepSpeedConfig, stage: int, clip: float, largest: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration, made key by key, because it ignores unknown keys.

    Args:
        largest: number of parameters in the largest module; at stage 3 those of about two such modules are whole at a
            time, the one that runs and the next. By default DeepSpeed keeps 10^9 numbers, which is every model.
    """
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "stage3_prefetch_bucket_size": BUCKET,
        "stage3_max_live_parameters": 2 * largest,
        "stage3_max_reuse_distance": 0,
    }
    if config.offload_optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        # In plain float32 at stage 0 we clip, because DeepSpeed knows no gradients but its own.
        "gradient_clipping": clip if stage else 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": config.bf16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
    }


def _total(norms: list[Tensor]) -> float:
    """Return the norm of several groups; DeepSpeed writes -1 for one that is not finite."""
    values = [float(norm) for norm in norms]
    return math.hypot(*(value if value >= 0 else math.nan for value in values))


def _import_deepspeed() -> Any:
    import deepspeed
    import deepspeed.ops

    # On a CPU, joining a group would build a shared-memory extension with the C++ compiler for a minute or two, and
    # fail without one; gloo is used instead. The name is private, so its absence is no error.
    compatible = getattr(deepspeed.ops, "__compatible_ops__", {})
    compatible["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if dist.is_initialized() and not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=None, verbose=False)
    return deepspeed


def make_engine(
    module: nn.Module,
    groups: list[dict[str, Any]],
    clip: float,
    config: DeepSpeedConfig,
    comm: Comm,
    apart: str | None = None,
) -> Engine:
    """Return the engine that the configuration asks for.

    Args:
        module: the dense parameters, on `comm.device`.
        groups: Adam's parameter groups.
        clip: largest gradient norm; 0 is off.
        apart: name of a parameter that is not gathered (see `Engine`), alone in its group.

    Raises:
        ConfigError: DeepSpeed, bf16 or offloading is asked for, and DeepSpeed is not installed.
    """
    installed = importlib.util.find_spec("deepspeed") is not None
    # One rank has nothing to share, and on a GPU its step is recorded, which DeepSpeed's step between would prevent.
    alone = comm.world_size == 1 and comm.device.type == "cuda" and not config.bf16
    alone = alone and config.offload_optimizer == "none" and config.gradient_accumulation_steps == 1
    if config.engine == "torch" or (config.engine == "auto" and (alone or not installed)):
        if config.bf16:
            raise ConfigError(
                "deepspeed.bf16: the torch engine is float32; install deepspeed or set deepspeed.bf16=false"
            )
        if config.offload_optimizer != "none":
            raise ConfigError(
                "deepspeed.offload_optimizer: the torch engine has none; install deepspeed or set it to none"
            )
        if config.engine == "auto" and not installed:
            log.warning(
                "deepspeed is not installed: the dense parameters are updated by its plain torch twin, without ZeRO"
            )
        return TorchEngine(module, groups, clip, comm, apart)
    if not installed:
        raise ConfigError(
            "deepspeed.engine: deepspeed is not installed; pip install deepspeed, or set deepspeed.engine=torch"
        )
    return DeepSpeedEngine(module, groups, clip, config, comm, apart)
