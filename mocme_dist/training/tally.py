"""What a run counts on the device of its steps, so that the host waits for the device once per log interval only."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

STAT_NAMES = (
    "loss",
    "positive",
    "negative",
    "allowed",
    "positive_score",
    "queries",
    "mine_loss",
    "easy",
    "ambiguous",
    "hard",
)
# A loss so many times that of the first step has exploded: a model that ignores all facts has about that of the first.
EXPLODED = 1e3


class Counts(NamedTuple):
    """Values of a tally on the host.

    Attributes:
        sums: over ranks and the applied steps of an interval, in the order of STAT_NAMES.
        steps: number of steps since this process began.
        skipped: number of skipped steps of the whole run.
        in_row, most_in_row: number of skipped steps in a row up to now, and the most there were.
        last_skipped: number of the last skipped step among `steps`.
        exploded, most_exploded: as in_row and most_in_row, of applied steps whose loss exploded.
        first_loss: mean loss of the first applied step of the run; 0 before it.
    """

    sums: list[float]
    steps: int
    skipped: int
    in_row: int
    most_in_row: int
    last_skipped: int
    exploded: int
    most_exploded: int
    first_loss: float


_NUM_COUNTS = len(Counts._fields) - 1


class Tally:
    """Sums of an interval of steps and counts of skipped steps, float64 on a device."""

    def __init__(self, device: torch.device) -> None:
        self.flat = torch.zeros(len(STAT_NAMES) + _NUM_COUNTS, dtype=torch.float64, device=device)

    def add(self, sums: Tensor, applied: Tensor) -> None:
        """Count a step; the host does not wait. Arguments as in `tallied_with`."""
        self.flat.copy_(tallied_with(self.flat, sums, applied))

    def read(self) -> Counts:
        """Return the values; this is the one copy of an interval."""
        values = self.flat.tolist()
        return Counts._make([values[: len(STAT_NAMES)], *map(int, values[len(STAT_NAMES) : -1]), values[-1]])

    def restart(self) -> None:
        """Begin an interval: sums are 0 again, counts go on."""
        self.flat[: len(STAT_NAMES)] = 0.0

    def restore(self, sums: list[float], skipped: int, in_row: int, first_loss: float = 0.0, exploded: int = 0) -> None:
        """Continue with the values of an earlier process, whose steps are not counted; sums of other names are 0."""
        if len(sums) != len(STAT_NAMES):
            sums = [0.0] * len(STAT_NAMES)
        self.flat.copy_(
            torch.tensor([*sums, 0, skipped, in_row, in_row, 0, exploded, exploded, first_loss], dtype=torch.float64)
        )


def tallied_with(flat: Tensor, sums: Tensor, applied: Tensor) -> Tensor:
    """Return the values of `Tally.flat` after a step.

    Args:
        flat: the values before it.
        sums: over ranks, in the order of STAT_NAMES.
        applied: bool scalar, whether the step was applied; the sums of a skipped step do not count.
    """
    kept, counts = flat.split([len(STAT_NAMES), _NUM_COUNTS])
    steps, skipped, in_row, most, last, exploded, most_exploded, first = counts.unbind()
    missed = (~applied).double()
    steps, in_row = steps + 1, (in_row + 1) * missed
    most, last = torch.maximum(most, in_row), torch.where(applied, last, steps)
    loss = sums[0] / sums[STAT_NAMES.index("queries")]
    first = torch.where(applied & (first == 0), loss.abs(), first)
    exploded = torch.where(applied, (exploded + 1) * (loss > EXPLODED * first.clamp(min=1.0)).double(), exploded)
    counts = [steps, skipped + missed, in_row, most, last, exploded, torch.maximum(most_exploded, exploded), first]
    return torch.cat([kept + torch.where(applied, sums, 0.0), torch.stack(counts)])
