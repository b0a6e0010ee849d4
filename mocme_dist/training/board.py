"""The launcher's folder for ranks that cannot see it: where a run is at a URL, its machines share no disk.

An actor on the launcher's machine writes what the ranks tell it into the attempt's folder, where the supervisor looks,
and says in return whether the run is asked to stop.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

# A rank that ends waits so long for its last word to be heard.
LAST_WORD_S = 10.0


class Board:
    """The actor's body; one an attempt."""

    def __init__(self, folder: str, stop_file: str) -> None:
        self.folder, self.stop_file = Path(folder), Path(stop_file)

    def put(self, name: str, text: str) -> bool:
        """Write a file of the attempt; whether a stop is asked for."""
        path = self.folder / name
        if self.folder not in path.resolve().parents:
            raise ValueError(f"{name}: outside the attempt's folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".posted")  # not a name that a rank on this machine writes by itself
        temporary.write_text(text)
        temporary.replace(path)
        return self.stop_file.exists()


def open_board(folder: Path, stop_file: Path) -> Any:
    """A board on this machine; ends with the driver."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Board).options(num_cpus=0, scheduling_strategy=here).remote(str(folder.resolve()), str(stop_file))


class Post:
    """A rank's way to the board; never waits for it but with its last word."""

    def __init__(self, board: Any) -> None:
        self._board, self._stop = board, False
        self._sent: Any = None

    def __call__(self, name: str, text: str, wait: bool = False) -> None:
        """Have `text` written as the attempt's file `name`; left out while an earlier one is still on its way."""
        import ray
        from ray.exceptions import RayError

        with contextlib.suppress(RayError):  # a launcher that is gone takes its ranks with it
            if self._sent is not None and not wait:
                done, _ = ray.wait([self._sent], timeout=0)
                if not done:
                    return
                self._stop = bool(ray.get(done[0]))
            self._sent = self._board.put.remote(name, text)
            if wait:
                self._stop = bool(ray.get(self._sent, timeout=LAST_WORD_S))

    def stop_asked(self) -> bool:
        """Whether the launcher asked to stop, as of the last answer."""
        return self._stop
