"""Completes multi-modal knowledge graphs: pack, extract, train, evaluate, export, query."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from mocme_dist.serving.bundle import Bundle

__version__ = "0.1.0"


def load_bundle(directory: str | Path) -> Bundle:
    """Open what `python -m mocme_dist.export` wrote; ask it with `.predict(head=..., relation=..., top=10)`.

    Raises:
        DataError: the folder is no bundle, or a file of it is missing or has another size.
    """
    # imported here: `import mocme_dist` itself stays a matter of milliseconds
    from mocme_dist.serving.bundle import Bundle

    return Bundle.open(directory)
