"""Why an attempt at a run ended, and whether to start another one. Knows Ray's errors by name only.

Lost workers are restarted from the last checkpoint up to `launch.max_failures` times. The same error at the same step
is not restarted a second time: it would come again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mocme_dist.errors import RankError
from mocme_dist.runs.heartbeat import RankStatus

# Errors of a rank that lost another one, or whose process group Ray shut down because of another one.
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
        step: the step during which it happened, if known.
        error: the exception that a rank raised by itself; None if a process was lost or hung.
        hung: ranks that did not answer.
        trace: stack trace of `error`.
    """

    text: str
    step: int | None
    error: str | None
    hung: tuple[int, ...] = ()
    trace: str = ""


def find_failure(
    failures: Mapping[int, BaseException], error: BaseException, statuses: Sequence[RankStatus]
) -> Failure:
    """Return the first cause among the errors that Ray saw and the heartbeats of the ranks.

    Args:
        failures: Ray's error by rank.
        error: the exception that Ray raised, used if no rank is known to have failed.
        statuses: last heartbeats of all ranks of the attempt.
    """
    by_rank = {status.rank: status for status in statuses}
    # Ranks that lost a peer in a step know that step exactly; the lost rank wrote its last step up to a second before.
    step = max((status.step for status in statuses if status.step is not None), default=None)
    kinds = {rank: type(cause).__name__ for rank, cause in failures.items()}
    own = {
        rank: f"{type(cause).__name__}: {cause}"
        for rank, cause in failures.items()
        if kinds[rank] not in (_GONE, _HUNG)
    }
    own |= {status.rank: status.error for status in statuses if status.error}
    first = {rank: text for rank, text in own.items() if not _FOLLOWER.search(text)}
    if first:
        rank, text = min(first.items())
        where, trace = (by_rank[rank].step, by_rank[rank].trace) if rank in by_rank else (step, "")
        return Failure(
            f"{_name(rank, by_rank)} failed at step {_or_unknown(where)}: {_one_line(text)}", where, text, trace=trace
        )
    if hung := tuple(rank for rank, kind in kinds.items() if kind == _HUNG):
        names = ", ".join(_name(rank, by_rank) for rank in hung)
        return Failure(f"{names} stopped answering after step {_or_unknown(step)}", step, None, hung)
    gone = [rank for rank, kind in kinds.items() if kind == _GONE]
    # Ray may receive the error of a peer before it notices the loss: the rank without an error is the lost one.
    gone = gone or [status.rank for status in statuses if status.error is None and own]
    if gone:
        names = ", ".join(_name(rank, by_rank) for rank in sorted(gone))
        return Failure(
            f"{names} was lost at step {_or_unknown(step)} (killed, out of memory, or its node is gone)", step, None
        )
    text = next(iter(own.values()), f"{type(error).__name__}: {error}")
    return Failure(f"the workers failed at step {_or_unknown(step)}: {_one_line(text)}", step, text)


def _name(rank: int, statuses: Mapping[int, RankStatus]) -> str:
    return str(statuses[rank]) if rank in statuses else f"rank {rank}"


def _or_unknown(step: int | None) -> str:
    return "0 or before" if step is None else str(step)


def _one_line(text: str) -> str:
    """Return kind and last line of an error that Ray has wrapped in a stack trace."""
    lines = [line for line in text.splitlines() if line.strip()] or [text]
    return lines[0] if len(lines) == 1 else f"{lines[0].strip()} ... {lines[-1].strip()}"


class Restarts:
    """Counts failures and decides when to give up."""

    def __init__(self, max_failures: int) -> None:
        self.max_failures, self.count = max_failures, 0
        self._last: Failure | None = None

    def add(self, failure: Failure, last_checkpoint: str) -> None:
        """Count one more failure.

        Raises:
            RankError: it was one too many, or the same error at the same step as before.
        """
        before, self._last = self._last, failure
        self.count += 1
        where = f"last checkpoint: {last_checkpoint}"
        same = before is not None and (before.error, before.step) == (failure.error, failure.step)
        if same and failure.error is not None:
            raise RankError(
                f"{failure.text}; the same error came twice at this step, so it is not tried again; {where}"
            )
        if self.count > self.max_failures:
            raise RankError(
                f"the workers failed {self.count} times (launch.max_failures={self.max_failures}): {failure.text}; "
                f"{where}"
            )
