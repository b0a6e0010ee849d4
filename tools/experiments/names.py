"""Names of entities as features: hashed character n-grams, for graphs whose only text is a name in any script.

    python -m tools.experiments.names RAW_DIR

writes RAW_DIR/features/text.npy and text.ids, which `mocme pack` takes as the vectors of text. Each n-gram of 1 to 3
characters is weighted by its inverse document frequency and hashed into a random direction: names that share characters
get vectors that point alike. No network and no download.
"""

from __future__ import annotations

import argparse
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

WIDTH = 256
# N-grams of fewer names are left out: they make nobody alike.
_MIN_NAMES = 2


def ngrams(name: str) -> set[str]:
    """N-grams of 1 to 3 characters, with marks at both ends of the name."""
    marked = f"^{name}$"
    return {marked[at : at + size] for size in (1, 2, 3) for at in range(len(marked) - size + 1)} - {"^", "$"}


def name_vectors(names: list[str], width: int = WIDTH) -> NDArray[np.float32]:
    """(n, width) vectors of length 1; zeros for names that share nothing with any other."""
    grams = [ngrams(name) for name in names]
    frequency = Counter(gram for found in grams for gram in found)
    directions: dict[str, NDArray[np.float32]] = {}
    out = np.zeros((len(names), width), np.float32)
    for row, found in zip(out, grams, strict=True):
        for gram in sorted(found):
            if frequency[gram] >= _MIN_NAMES:
                if gram not in directions:
                    seed = zlib.crc32(gram.encode("utf8"))
                    directions[gram] = np.random.default_rng(seed).standard_normal(width).astype(np.float32)
                row += np.log(len(names) / frequency[gram]) * directions[gram]
    length = np.linalg.norm(out, axis=1, keepdims=True)
    return (out / np.where(length > 0, length, 1)).astype(np.float32)


def entity_names(raw: Path) -> list[str]:
    """Entities of all splits, in order of their names."""
    names: set[str] = set()
    for split in ("train", "valid", "test"):
        for line in (raw / f"{split}.txt").read_text(encoding="utf8").splitlines():
            if line.strip():
                head, _, tail = line.split("\t")
                names |= {head, tail}
    return sorted(names)


def main() -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path, metavar="RAW_DIR")
    raw = parser.parse_args().raw
    names = entity_names(raw)
    (raw / "features").mkdir(exist_ok=True)
    np.save(raw / "features" / "text.npy", name_vectors(names))
    (raw / "features" / "text.ids").write_text("".join(f"{name}\n" for name in names), encoding="utf8")


if __name__ == "__main__":
    main()
