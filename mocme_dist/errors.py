"""The kinds of error a user can meet, and the exit code of each.

A message is one line that says where, what was expected, what came and what to do. Commands print it as one
block and leave with the kind's code; the traceback goes to the debug log only.
"""

from __future__ import annotations


class MocmeError(Exception):
    """Anything a user can mend; `exit_code` is what the command leaves with."""

    exit_code = 70


class ConfigError(MocmeError):
    """A configuration or a command line is wrong."""

    exit_code = 2


class DataError(MocmeError):
    """A raw file, a shard or a feature part is not what it should be."""

    exit_code = 3


class ShardError(DataError):
    """A tar shard is cut, damaged or not the one that was packed; `on_bad_shard: skip` leaves such a shard out."""


class CheckpointError(MocmeError):
    """A checkpoint is torn, of another run, or absent."""

    exit_code = 4


class DivergedError(MocmeError):
    """Training left the finite numbers and did not come back."""

    exit_code = 5


class LockedError(MocmeError):
    """Another run holds the output directory."""

    exit_code = 6


class StorageError(MocmeError):
    """A path cannot be written, or the disk is full."""

    exit_code = 7


class RankError(MocmeError):
    """One or more ranks failed; all ranks raise it together."""

    exit_code = 70


class ShapeError(MocmeError):
    """A tensor has not the shape that its name promises."""

    exit_code = 70


class Preempted(MocmeError):
    """The run was asked to stop and has saved a checkpoint."""

    exit_code = 75


def error_block(error: BaseException) -> str:
    """The text a user sees for `error`: its kind and its one line."""
    return f"error: {type(error).__name__}: {error}"


def one_line(error: BaseException, length: int = 300) -> str:
    """Return the message of a library's error in one line of at most `length` characters."""
    return " ".join(str(error).split())[:length] or type(error).__name__
