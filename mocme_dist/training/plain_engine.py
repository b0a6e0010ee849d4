"""The engine's contract, and its plain twin: what DeepSpeed is compared with, and what runs where it is not installed.

An engine averages dense gradients over ranks, clips, steps Adam and gives or takes the full dense state by name. One
global norm serves clipping and the finite check: that of the dense gradients and of the rows outside the engine together.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mocme_dist.errors import CheckpointError
from mocme_dist.parallel.comm import Comm

MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine(Protocol):
    """What the loop needs of an engine; it is made with the name of a parameter to keep apart, or None.

    That one is too large to be gathered: it is trained as any other, but `state` leaves it out and gives no rank all of it.
    """

    module: nn.Module

    def __call__(self, *args: Any) -> Any:
        """Forward through the wrapped module."""

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Add gradients of the dense parameters, and of any leaf in the graph.

        Args:
            last: the last part of a step; parts before it only add up.
        """

    def step(self, outside: float = 0.0) -> float:
        """Average, clip, update, forget the gradients; collective.

        Args:
            outside: norm of the gradients that belong to this step and are not the engine's, the same on every rank.

        Returns:
            What clipping multiplied the gradients by, the same on every rank. 0: a gradient of any rank, or `outside`,
            is not finite, and nothing moved.
        """

    def skip(self) -> None:
        """Forget the gradients of a step that is not to be applied; after a backward with `last`, by all ranks."""

    def gradient_norm(self) -> float:
        """Global norm of the dense gradients of the last step, before clipping."""

    def apart_range(self) -> tuple[int, int]:
        """Elements of the parameter apart that this rank's state of it holds, as a range of the whole, flat."""

    def apart_state(self) -> dict[str, Tensor]:
        """This rank's part of its float32 value and moments ("value", "exp_avg", "exp_avg_sq"), flat, not copied."""

    def set_apart(self, state: dict[str, Tensor]) -> None:
        """Take what `apart_state` gives; collective."""

    def state(self) -> dict[str, Tensor]:
        """Full values, moments and buffers by name, but for the parameter apart; float32 on the CPU, the same on every rank.

        Collective.
        """

    def load_state(self, state: dict[str, Tensor], num_updates: int) -> None:
        """Take what `state` gave, at any stage and number of ranks; collective.

        Args:
            num_updates: steps that were applied so far, for Adam's bias correction.

        Raises:
            CheckpointError: tensors of `state` are missing here, or have other shapes than here.
        """


def clip_factor(norm: float, clip: float) -> float:
    """What gradients of a global norm are multiplied by so that it stays under `clip`, 0 is off; as torch's clip_grad_norm_."""
    return min(1.0, clip / (norm + 1e-6)) if clip else 1.0


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """Persistent buffers only: the others are derived."""
    parameters = dict(module.named_parameters())
    return {name: value for name, value in module.state_dict().items() if name not in parameters}


def together(module: nn.Module, apart: str | None) -> list[tuple[str, nn.Parameter]]:
    """Parameters by name, but for the one apart."""
    return [(name, p) for name, p in module.named_parameters() if name != apart]


def check_state(module: nn.Module, apart: str | None, state: dict[str, Tensor]) -> None:
    """Refuse a state of another model; under ZeRO-3 a parameter's own shape is that of its part.

    Raises:
        CheckpointError: the tensors that differ, with both shapes.
    """
    here = {f"buffer/{name}": tuple(value.shape) for name, value in buffers_of(module).items()}
    for name, p in together(module, apart):
        here |= {f"{kind}/{name}": tuple(getattr(p, "ds_shape", p.shape)) for kind in ("value", *MOMENTS)}
    there = {name: tuple(value.shape) for name, value in state.items()}
    differing = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if differing:
        shown = "; ".join(f"{name}: checkpoint {there.get(name, 'nothing')}, now {here.get(name, 'nothing')}" for name in differing[:4])
        raise CheckpointError(
            f"dense state: {len(differing)} tensors differ from this model's: {shown}; the settings or the widths of the "
            "features have changed; use another run.dir or the settings of then"
        )


def make_adam(groups: list[dict[str, Any]]) -> torch.optim.Adam:
    """Adam of the dense parameters, in one pass over each of them, where torch's default makes a dozen."""
    return torch.optim.Adam(groups, fused=True)


class TorchEngine:
    """Plain Adam and one flat all-reduce: the twin that parity tests compare with, and the engine without DeepSpeed."""

    def __init__(self, module: nn.Module, groups: list[dict[str, Any]], clip: float, comm: Comm, apart: str | None = None) -> None:
        self.module, self.clip, self.comm, self.apart = module, clip, comm, apart
        self.optimizer = make_adam(groups)
        self._norm = 0.0

    def __call__(self, *args: Any) -> Any:
        """Forward."""
        return self.module(*args)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Local gradients, and after the last part their mean over ranks."""
        loss.backward()
        if not last:
            return
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        # A parameter that this rank's graph did not reach counts as zero, as it does under DeepSpeed: all ranks reduce
        # the same flat vector, and one count of updates serves all moments.
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])
        flat = self.comm.sum(flat) / self.comm.world_size
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)

    def step(self, outside: float = 0.0) -> float:
        """Clip and update; plain Adam would poison the weights with what is not finite."""
        self._norm, factor = clip_plain(self.module, self.clip, outside)
        if factor:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return factor

    def skip(self) -> None:
        """Forget them."""
        self.optimizer.zero_grad()

    def gradient_norm(self) -> float:
        """Of the last step."""
        return self._norm

    def apart_range(self) -> tuple[int, int]:
        """All of it."""
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


def clip_plain(module: nn.Module, clip: float, outside: float) -> tuple[float, float]:
    """Clip gradients that lie where torch puts them, already averaged.

    Returns:
        Their norm, and what they were multiplied by; 0 when it or `outside` is not finite.
    """
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    total = math.hypot(norm, outside)
    if not math.isfinite(total):
        return norm, 0.0
    factor = clip_factor(total, clip)
    if factor < 1:
        torch._foreach_mul_(gradients, factor)
    return norm, factor


def _moments(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> dict[str, Tensor]:
    """Adam's moments of a parameter, made as its first step would make them where there are none yet."""
    if not optimizer.state[p]:
        optimizer.state[p] = {"step": torch.tensor(0.0, device=p.device), **{moment: torch.zeros_like(p) for moment in MOMENTS}}
    return {moment: optimizer.state[p][moment] for moment in MOMENTS}


def plain_apart(module: nn.Module, optimizer: torch.optim.Optimizer, apart: str | None) -> dict[str, Tensor]:
    """`Engine.apart_state` where parameters and moments are whole on every rank."""
    p = module.get_parameter(str(apart))
    return {"value": p.detach().flatten(), **{name: value.flatten() for name, value in _moments(optimizer, p).items()}}


def set_plain_apart(module: nn.Module, optimizer: torch.optim.Optimizer, apart: str | None, state: dict[str, Tensor]) -> None:
    """`Engine.set_apart` where parameters and moments are whole on every rank."""
    for name, target in plain_apart(module, optimizer, apart).items():
        target.copy_(state[name])


def plain_state(module: nn.Module, optimizer: torch.optim.Optimizer, apart: str | None) -> dict[str, Tensor]:
    """`Engine.state` where parameters and moments are whole on every rank."""
    out = {f"buffer/{name}": value.detach().float().cpu().clone() for name, value in buffers_of(module).items()}
    for name, p in together(module, apart):
        out[f"value/{name}"] = p.detach().float().cpu().clone()
        for moment in MOMENTS:
            value = optimizer.state.get(p, {}).get(moment)
            out[f"{moment}/{name}"] = torch.zeros_like(out[f"value/{name}"]) if value is None else value.detach().float().cpu().clone()
    return out


def load_plain_state(
    module: nn.Module, optimizer: torch.optim.Optimizer, apart: str | None, state: dict[str, Tensor], num_updates: int
) -> None:
    """`Engine.load_state` where parameters and moments are whole on every rank."""
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
