"""Why an attempt at a run ended, and whether to make another one. Knows Ray's errors by name only.

Lost workers are restarted from the last checkpoint `launch.max_failures` times. The same error at the same step is
not: it would come a third time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mocme_dist.errors import RankError
from mocme_dist.training.pulse import Sign

# What a rank says that lost another one, or whose process group Ray took down for the sake of another one; that one knows why.
_FOLLOWER = re.compile(
    r"connection|broken pipe|peer|socket|timed out waiting|remote process exited|SIGTERM"
    r"|process group has not been initialized|invalid process group|group .* (is not registered|does not exist)",
    re.IGNORECASE,
)
_GONE, _HUNG = "WorkerHealthCheckFailedError", "WorkerHealthCheckTimeoutError"


@dataclass(frozen=True)
class Failure:
    """The first cause of an attempt's end.

    Attributes:
        text: rank, process, host, step and what happened, in words.
        step: the step that was being made, where known.
        error: the exception that a rank raised by itself; None when a process was lost or hung.
        hung: ranks that stopped to answer.
        trace: of `error`.
    """

    text: str
    step: int | None
    error: str | None
    hung: tuple[int, ...] = ()
    trace: str = ""


def find_failure(failures: Mapping[int, BaseException], error: BaseException, signs: Sequence[Sign]) -> Failure:
    """The first cause among what Ray saw and what the ranks wrote themselves.

    Args:
        failures: Ray's error by rank.
        error: what Ray raised, for when no rank is known to have failed.
        signs: of all ranks of the attempt.
    """
    by_rank = {sign.rank: sign for sign in signs}
    # Those that lost a peer in a step know that step exactly; the lost one wrote it a second ago at best.
    step = max((sign.step for sign in signs if sign.step is not None), default=None)
    kinds = {rank: type(cause).__name__ for rank, cause in failures.items()}
    own = {rank: f"{type(cause).__name__}: {cause}" for rank, cause in failures.items() if kinds[rank] not in (_GONE, _HUNG)}
    own |= {sign.rank: sign.error for sign in signs if sign.error}
    first = {rank: text for rank, text in own.items() if not _FOLLOWER.search(text)}
    if first:
        rank, text = min(first.items())
        where, trace = (by_rank[rank].step, by_rank[rank].trace) if rank in by_rank else (step, "")
        return Failure(f"{_name(rank, by_rank)} failed at step {_or_unknown(where)}: {_one_line(text)}", where, text, trace=trace)
    if hung := tuple(rank for rank, kind in kinds.items() if kind == _HUNG):
        names = ", ".join(_name(rank, by_rank) for rank in hung)
        return Failure(f"{names} did not answer any more after step {_or_unknown(step)}", step, None, hung)
    gone = [rank for rank, kind in kinds.items() if kind == _GONE]
    # Ray may hear the complaint of a peer before it notices the loss: who did not complain is who is lost.
    gone = gone or [sign.rank for sign in signs if sign.error is None and own]
    if gone:
        names = ", ".join(_name(rank, by_rank) for rank in sorted(gone))
        return Failure(f"{names} was lost at step {_or_unknown(step)} (killed, out of memory, or its node is gone)", step, None)
    text = next(iter(own.values()), f"{type(error).__name__}: {error}")
    return Failure(f"the workers failed at step {_or_unknown(step)}: {_one_line(text)}", step, text)


def _name(rank: int, signs: Mapping[int, Sign]) -> str:
    return str(signs[rank]) if rank in signs else f"rank {rank}"


def _or_unknown(step: int | None) -> str:
    return "0 or before" if step is None else str(step)


def _one_line(text: str) -> str:
    """Kind and last line: Ray wraps a trace around what it passes on."""
    lines = [line for line in text.splitlines() if line.strip()] or [text]
    return lines[0] if len(lines) == 1 else f"{lines[0].strip()} ... {lines[-1].strip()}"


class Restarts:
    """Counts failures and says when to stop."""

    def __init__(self, max_failures: int) -> None:
        self.max_failures, self.count = max_failures, 0
        self._last: Failure | None = None

    def add(self, failure: Failure, last_checkpoint: str) -> None:
        """Count one more.

        Raises:
            RankError: it was one too many, or the same error at the same step as before.
        """
        before, self._last = self._last, failure
        self.count += 1
        where = f"last checkpoint: {last_checkpoint}"
        if before is not None and failure.error is not None and (before.error, before.step) == (failure.error, failure.step):
            raise RankError(f"{failure.text}; the same error came twice at this step, so it is not tried again; {where}")
        if self.count > self.max_failures:
            raise RankError(f"the workers failed {self.count} times (launch.max_failures={self.max_failures}): {failure.text}; {where}")
