"""The contract of an engine, and the plain engine: the reference for DeepSpeed, and its replacement without DeepSpeed.

An engine averages dense gradients over ranks, clips them, applies Adam, and returns or loads the full dense state by
name. One global norm, of the dense gradients and the rows outside the engine together, serves clipping and the finite
check.
"""

from __future__ import annotations

import re
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mocme_dist.errors import CheckpointError
from mocme_dist.parallel.comm import Comm

MOMENTS = ("exp_avg", "exp_avg_sq")
# A modality's share in the name of a parameter of `DividedExperts`.
_MODALITY = re.compile(r"\.by_modality\.\d+\.")


class Engine(Protocol):
    """Engine of the dense parameters. Its constructor takes the name of a parameter to keep apart, or None.

    The parameter apart is too large to be gathered. It is trained like the others, but `state` leaves it out.
    """

    module: nn.Module
    clip: float

    def __call__(self, *args: Any) -> Any:
        """Forward through the wrapped module."""

    @property
    def plain_adam(self) -> torch.optim.Optimizer | None:
        """Adam if it updates whole float32 parameters of the module; None if an optimizer of ZeRO is between."""

    def keep_norm(self, norm: Tensor) -> None:
        """Make `gradient_norm` return the norm of a step that was taken without `step`."""

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Add gradients of the dense parameters and of any leaf in the graph.

        Args:
            last: whether this is the last micro-batch of a step; gradients of earlier ones are only summed.
        """

    def step(self, outside: Tensor, finite: Tensor) -> Tensor:
        """Average, clip, update, and discard the gradients; collective.

        Args:
            outside: norm of this step's gradients outside the engine, float64 scalar, the same on every rank.
            finite: bool scalar, the same on every rank; False discards the gradients and updates nothing.

        Returns:
            The factor by which clipping multiplied the gradients, float64 scalar, the same on every rank. 0 if a
            gradient of any rank or `outside` is not finite, or `finite` is False; nothing is updated then.
        """

    def scale_rates(self, factor: float) -> None:
        """Make the next steps use `factor` times the initial learning rates of the groups, unless `scheduled` is
        false."""

    def gradient_norm(self) -> float:
        """Return the global norm of the dense gradients of the last step, before clipping; waits for the device."""

    def apart_range(self) -> tuple[int, int]:
        """Return the range of elements of the flat parameter apart that this rank holds."""

    def apart_state(self) -> dict[str, Tensor]:
        """Return this rank's part of its float32 value and moments ("value", "exp_avg", "exp_avg_sq"), flat, not
        copied."""

    def set_apart(self, state: dict[str, Tensor]) -> None:
        """Load what `apart_state` returns; collective."""

    def state(self) -> dict[str, Tensor]:
        """Return full values, moments and buffers by name, without the parameter apart; collective.

        They are float32 on the CPU, the same on every rank.
        """

    def load_state(self, state: dict[str, Tensor], num_updates: int) -> None:
        """Load what `state` returned at any stage and number of ranks; collective.

        Args:
            num_updates: number of steps applied so far, for Adam's bias correction.

        Raises:
            CheckpointError: names or shapes differ from those of this model.
        """


def clip_factor(norm: Tensor, clip: float) -> Tensor:
    """Return the factor that limits a global norm to `clip` (0 is off), as torch's clip_grad_norm_ does."""
    return (clip / (norm + 1e-6)).clamp(max=1.0) if clip else torch.ones_like(norm)


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the persistent buffers by name; the others are derived."""
    parameters = dict(module.named_parameters())
    return {name: value for name, value in module.state_dict().items() if name not in parameters}


def together(module: nn.Module, apart: str | None) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters by name, without the one apart."""
    return [(name, p) for name, p in module.named_parameters() if name != apart]


def join_experts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state with the experts of all modalities joined, so that its names do not depend on the stage.

    Empties `state`, because two copies of it may not fit into memory.
    """
    names: dict[str, list[str]] = {}
    for name in state:
        names.setdefault(_MODALITY.sub(".", name), []).append(name)
    out: dict[str, Tensor] = {}
    for whole, found in names.items():
        values = [state.pop(name) for name in found]
        out[whole] = values[0] if len(values) == 1 else torch.cat(values)
    return out


def divide_experts(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a joined state with the names of this module: the inverse of `join_experts`, without copies."""
    divided: dict[str, list[str]] = {}
    for name, _ in module.named_parameters():
        divided.setdefault(_MODALITY.sub(".", name), []).append(name)
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        kind, _, whole = name.partition("/")
        names = divided.get(whole, [])
        pieces = value.chunk(len(names)) if len(names) > 1 else (value,)
        out |= {f"{kind}/{own}": piece for own, piece in zip(names or [whole], pieces, strict=False)}
    return out


def check_state(module: nn.Module, apart: str | None, state: dict[str, Tensor]) -> None:
    """Refuse a state of another model. Under ZeRO-3 the shape of a parameter is that of its part.

    Raises:
        CheckpointError: tensors differ; with both shapes.
    """
    here = {f"buffer/{name}": tuple(value.shape) for name, value in buffers_of(module).items()}
    for name, p in together(module, apart):
        here |= {f"{kind}/{name}": tuple(getattr(p, "ds_shape", p.shape)) for kind in ("value", *MOMENTS)}
    there = {name: tuple(value.shape) for name, value in state.items()}
    differing = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if differing:
        shown = "; ".join(
            f"{name}: checkpoint {there.get(name, 'nothing')}, now {here.get(name, 'nothing')}"
            for name in differing[:4]
        )
        raise CheckpointError(
            f"dense state: {len(differing)} tensors differ from this model's: {shown}; the settings or "
            "the widths of the "
            "features have changed; use another run.dir or the earlier settings"
        )


def make_adam(groups: list[dict[str, Any]]) -> torch.optim.Adam:
    """Return Adam of the dense parameters, fused: one pass over each parameter instead of a dozen."""
    return torch.optim.Adam(groups, fused=True)


def scale_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Implement `Engine.scale_rates` for an optimizer with the groups of the engine."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
        if group.get("scheduled", True):
            group["lr"] = group["initial_lr"] * factor


class TorchEngine:
    """Plain Adam and one flat all-reduce: the twin that parity tests compare with, and the engine without DeepSpeed."""

    def __init__(
        self, module: nn.Module, groups: list[dict[str, Any]], clip: float, comm: Comm, apart: str | None = None
    ) -> None:
        self.module, self.clip, self.comm, self.apart = module, clip, comm, apart
        self.optimizer = make_adam(groups)
        self._norm = torch.zeros(())

    def __call__(self, *args: Any) -> Any:
        """Forward."""
        return self.module(*args)

    @property
    def plain_adam(self) -> torch.optim.Optimizer | None:
        """See `Engine`."""
        return self.optimizer

    def keep_norm(self, norm: Tensor) -> None:
        """See `Engine`."""
        self._norm = norm

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """See `Engine`; after the last micro-batch, gradients are averaged over ranks."""
        loss.backward()
        if not last:
            return
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        # A parameter that this rank's graph did not reach counts as zero, as it does under DeepSpeed: all ranks reduce
        # the same flat vector, and one count of updates serves all moments.
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])
        flat = self.comm.sum(flat).div_(self.comm.world_size)
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)

    def step(self, outside: Tensor, finite: Tensor) -> Tensor:
        """See `Engine`."""
        self._norm, factor = clip_plain(self.module, self.clip, outside, finite)
        step_if(self.optimizer, factor > 0)
        self.optimizer.zero_grad()
        return factor

    def scale_rates(self, factor: float) -> None:
        """See `Engine`."""
        scale_rates(self.optimizer, factor)

    def gradient_norm(self) -> float:
        """See `Engine`."""
        return float(self._norm)

    def apart_range(self) -> tuple[int, int]:
        """See `Engine`; every rank holds all of it."""
        return 0, self.module.get_parameter(str(self.apart)).numel()

    def apart_state(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return plain_apart(self.module, self.optimizer, self.apart)

    def set_apart(self, state: dict[str, Tensor]) -> None:
        """See `Engine`."""
        set_plain_apart(self.module, self.optimizer, self.apart, state)

    def state(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return plain_state(self.module, self.optimizer, self.apart)

    def load_state(self, state: dict[str, Tensor], num_updates: int) -> None:
        """See `Engine`."""
        load_plain_state(self.module, self.optimizer, self.apart, state, num_updates)


def clip_plain(module: nn.Module, clip: float, outside: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
    """Clip averaged gradients in the `grad` fields of the parameters.

    Returns:
        Their norm, and the factor by which they were multiplied, float64 scalar; 0 if the norm or `outside` is not
        finite, or `finite` is False: the gradients must not be applied then.
    """
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    total = torch.hypot(norm.double(), outside)
    factor = torch.where(finite & torch.isfinite(total), clip_factor(total, clip), 0.0)
    if clip:
        torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))
    return norm, factor


def step_if(optimizer: torch.optim.Optimizer, applied: Tensor) -> None:
    """Take a step of a fused optimizer if a bool scalar is True, without a look at it: as torch's GradScaler does."""
    optimizer.found_inf = (~applied).float()  # type: ignore[attr-defined]
    optimizer.step()


def _moments(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> dict[str, Tensor]:
    """Return Adam's moments of a parameter, created as Adam's first step would if there are none yet."""
    if not optimizer.state[p]:
        optimizer.state[p] = {
            "step": torch.tensor(0.0, device=p.device),
            **{moment: torch.zeros_like(p) for moment in MOMENTS},
        }
    return {moment: optimizer.state[p][moment] for moment in MOMENTS}


def plain_apart(module: nn.Module, optimizer: torch.optim.Optimizer, apart: str | None) -> dict[str, Tensor]:
    """Implement `Engine.apart_state` for parameters and moments that are whole on every rank."""
    p = module.get_parameter(str(apart))
    return {"value": p.detach().flatten(), **{name: value.flatten() for name, value in _moments(optimizer, p).items()}}


def set_plain_apart(
    module: nn.Module, optimizer: torch.optim.Optimizer, apart: str | None, state: dict[str, Tensor]
) -> None:
    """Implement `Engine.set_apart` for parameters and moments that are whole on every rank."""
    for name, target in plain_apart(module, optimizer, apart).items():
        target.copy_(state[name])


def plain_state(module: nn.Module, optimizer: torch.optim.Optimizer, apart: str | None) -> dict[str, Tensor]:
    """Implement `Engine.state` for parameters and moments that are whole on every rank."""
    out = {f"buffer/{name}": value.detach().float().cpu().clone() for name, value in buffers_of(module).items()}
    for name, p in together(module, apart):
        out[f"value/{name}"] = p.detach().float().cpu().clone()
        for moment in MOMENTS:
            value = optimizer.state.get(p, {}).get(moment)
            out[f"{moment}/{name}"] = (
                torch.zeros_like(out[f"value/{name}"]) if value is None else value.detach().float().cpu().clone()
            )
    return join_experts(out)


def load_plain_state(
    module: nn.Module, optimizer: torch.optim.Optimizer, apart: str | None, state: dict[str, Tensor], num_updates: int
) -> None:
    """Implement `Engine.load_state` for parameters and moments that are whole on every rank."""
    state = divide_experts(module, state)
    check_state(module, apart, state)
    with torch.no_grad():
        for name, p in together(module, apart):
            p.copy_(state[f"value/{name}"])
        for name, buffer in buffers_of(module).items():
            buffer.copy_(state[f"buffer/{name}"])
    for name, p in together(module, apart):
        moments = {moment: state[f"{moment}/{name}"].to(p.device, p.dtype, copy=True) for moment in MOMENTS}
        optimizer.state[p] = {"step": torch.tensor(float(num_updates), device=p.device), **moments}
    if apart is not None:
        p = module.get_parameter(apart)
        _moments(optimizer, p)
        optimizer.state[p]["step"].fill_(float(num_updates))
