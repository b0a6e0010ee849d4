"""Guards an extraction against files that crash the process that decodes them.

Ray restarts a shard whose actor died on another actor, without limit, so a file that crashes its decoder would kill one
actor after the other. Each actor keeps a marker file while it works on a shard, in the folder of the heartbeats. If it
finds the marker of a dead actor, it decodes one file at a time and records which; a file at which two actors died is
poisoned: it is counted as bad and never decoded again. One death is not enough, because actors also die of other
    causes.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections import Counter
from pathlib import Path

from mocme_dist.errors import DataError

SUFFIX = ".begun"
_PROOF = 2  # deaths at one file that make it poisoned
_LIMIT = 8  # other deaths over one shard: each costs a start of an actor and the work on the shard


class CrashGuard:
    """Marker of one actor's work on one shard of one modality, or on `part` of it; a context manager.

    Attributes:
        isolate: an earlier actor died over this shard: decode one file at a time, and record it by `at`.
        poisoned: files ("ENTITY/NAME") at which at least two actors died.
    """

    def __init__(self, folder: Path, kind: str, shard: int, part: str = "") -> None:
        self._path = folder / f"{part}{kind}-{shard:06d}.{uuid.uuid4().hex}{SUFFIX}"
        self._name = f"shard {shard} of {kind}"
        died_at = []
        for path in folder.glob(f"{part}{kind}-{shard:06d}.*{SUFFIX}"):
            with contextlib.suppress(OSError):  # its actor has just finished: not dead
                died_at.append(path.read_text(encoding="utf8", errors="replace").strip())
        at = Counter(name for name in died_at if name)
        self.isolate = bool(died_at)
        self.poisoned = frozenset(name for name, deaths in at.items() if deaths >= _PROOF)
        self._unexplained = len(died_at) - sum(at[name] for name in self.poisoned)
        self._file: int | None = None

    def check(self) -> None:
        """Raise DataError after too many deaths that are not due to a poisoned file."""
        if self._unexplained >= _LIMIT:
            raise DataError(
                f"{self._name}: {self._unexplained} workers died over it, at no file in particular; most likely memory "
                "is too short: fewer encoders.actors, a smaller batch_size or smaller shards (data.shard_rows)"
            )

    def at(self, name: str) -> None:
        """Record the file that is being decoded; "" when it is done."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # on a full disk this protection is lost, not the job
                os.ftruncate(self._file, 0)
                os.pwrite(self._file, name.encode("utf8"), 0)

    def __enter__(self) -> CrashGuard:
        with contextlib.suppress(OSError):
            self._file = os.open(self._path, os.O_CREAT | os.O_WRONLY, 0o600)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)
        with contextlib.suppress(OSError):
            self._path.unlink()
