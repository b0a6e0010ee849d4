"""What earlier actors died of: a file a begun shard, gone when it ends, in the folder of the heartbeats.

Ray gives a shard whose actor died to another one, without end. A decoder that crashes on one file would so kill one
actor after the other. Whoever finds the leavings of a dead attempt therefore decodes slowly, one file at a time, and
writes down which one it is at; a file that two attempts died at is counted as bad and never touched again. A second
death asks for proof because machines and memory kill actors too, wherever they happen to be.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections import Counter
from pathlib import Path

from mocme_dist.errors import DataError

SUFFIX = ".begun"
_PROOF = 2  # deaths at one file
_LIMIT = 8  # deaths over one shard that no file explains: every one costs a start and the shard's work


class Attempt:
    """One actor's try at one shard of one modality; a context manager.

    Attributes:
        careful: an earlier try ended in its actor's death: decode one file at a time, and say which by `at`.
        deadly: files ("ENTITY/NAME") that are proven to kill.
    """

    def __init__(self, folder: Path, kind: str, shard: int) -> None:
        self._path = folder / f"{kind}-{shard:06d}.{uuid.uuid4().hex}{SUFFIX}"
        self._name = f"shard {shard} of {kind}"
        died_at = []
        for path in folder.glob(f"{kind}-{shard:06d}.*{SUFFIX}"):
            with contextlib.suppress(OSError):  # ended just now: not dead
                died_at.append(path.read_text(encoding="utf8", errors="replace").strip())
        at = Counter(name for name in died_at if name)
        self.careful = bool(died_at)
        self.deadly = frozenset(name for name, deaths in at.items() if deaths >= _PROOF)
        self._unexplained = len(died_at) - sum(at[name] for name in self.deadly)
        self._file: int | None = None

    def check(self) -> None:
        """Raise DataError after too many deaths that no file explains."""
        if self._unexplained >= _LIMIT:
            raise DataError(
                f"{self._name}: {self._unexplained} workers died over it, at no file in particular; most likely memory is too short: "
                "fewer encoders.actors, a smaller batch_size or smaller shards (data.shard_rows)"
            )

    def at(self, name: str) -> None:
        """This file is decoded now; "" when it is done."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk costs this protection, not the job
                os.ftruncate(self._file, 0)
                os.pwrite(self._file, name.encode("utf8"), 0)

    def __enter__(self) -> Attempt:
        with contextlib.suppress(OSError):
            self._file = os.open(self._path, os.O_CREAT | os.O_WRONLY, 0o600)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)
        with contextlib.suppress(OSError):
            self._path.unlink()
