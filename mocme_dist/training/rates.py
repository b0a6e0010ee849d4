"""Learning rates: Adam's parameter groups, and the schedule that scales their rates at each step.

The factor of a step is a function of the step and the last step alone, so a resumed run continues bit for bit, and a
run with more epochs follows the longer schedule from there on.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from mocme_dist.config.model import MineConfig, RelationsConfig
from mocme_dist.config.schema import EntitiesConfig
from mocme_dist.config.train import TrainConfig


@dataclass(frozen=True)
class Schedule:
    """Factor of all learning rates except that of the statistics networks.

    Attributes:
        kind: constant, linear or cosine; the latter two reach 0 at `last_step`.
        warmup_steps: steps over which the factor rises linearly to 1.
        last_step: number of steps of the whole run.
    """

    kind: str = "constant"
    warmup_steps: int = 0
    last_step: int = 0

    def factor(self, step: int) -> float:
        """Return the factor of the rates at a step, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        done = (step - self.warmup_steps) / max(self.last_step - self.warmup_steps, 1)
        return 1 - done if self.kind == "linear" else (1 + math.cos(math.pi * done)) / 2

    def __str__(self) -> str:
        warmup = f", warm-up {self.warmup_steps} steps" if self.warmup_steps else ""
        return self.kind + ("" if self.kind == "constant" else f" to zero at step {self.last_step}") + warmup

    def to_json(self) -> dict[str, Any]:
        """Return the fields that a checkpoint keeps."""
        return asdict(self)

    def changed_from(self, saved: dict[str, Any] | None, step: int) -> str | None:
        """Return a sentence on what resuming at `step` changes, None if the rest of the run is as planned.

        Args:
            saved: the fields that the checkpoint keeps.
        """
        before = Schedule(**(saved or {}))
        same = (before.kind, before.warmup_steps) == (self.kind, self.warmup_steps)
        if same and (self.kind == "constant" or before.last_step == self.last_step):
            return None
        return (
            f"the schedule of the learning rates is now {self}, and was {before}; from step {step} they are "
            f"{self.factor(step):.3g} of the full ones, and would have been {max(before.factor(step), 0.0):.3g}"
        )


def parameter_groups(
    module: nn.Module, train: TrainConfig, entities: EntitiesConfig, relations: RelationsConfig, mine: MineConfig
) -> list[dict[str, Any]]:
    """Return Adam's groups of the dense parameters; a group with `scheduled` false keeps its rate.

    The statistics networks ascend at a constant rate, because they follow views that change until the end.
    """
    groups: dict[str, dict[str, Any]] = {
        "others": {"lr": train.learning_rate},
        "relations": {"lr": relations.learning_rate or train.learning_rate},
        "networks": {"lr": mine.learning_rate, "scheduled": False},
        "rows": {"lr": entities.learning_rate or train.learning_rate, "weight_decay": entities.row_weight_decay},
    }
    members: dict[str, list[nn.Parameter]] = {name: [] for name in groups}
    for name, p in module.named_parameters():
        members[_group_of(name)].append(p)
    return [{"params": members[name], **settings} for name, settings in groups.items() if members[name]]


def _group_of(name: str) -> str:
    if name == "rows.weight":
        return "rows"
    if ".mine." in name:
        return "networks"
    return "relations" if ".relations." in name else "others"
