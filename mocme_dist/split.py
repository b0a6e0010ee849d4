"""`mocme split FACTS OUT_DIR` (or `python -m mocme_dist.split`): cuts one list of facts into train, valid and test."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mocme_dist.commands import run_command

if TYPE_CHECKING:
    from mocme_dist.data.triples import Integers

DESCRIPTION = """\
Cut one file of facts (tab-separated head, relation, tail, .gz accepted) into train.txt, valid.txt and test.txt.
Facts are drawn by seed; every entity and every relation keeps at least one fact in train, and duplicate facts are
written once. The last line printed is a JSON object: the size of each split, and the number of test facts whose
entities are linked in train.

  mocme split facts.tsv mygraph
  mocme split facts.tsv mygraph --valid 0.05 --test 0.05 --seed 7"""

SPLITS = ("train", "valid", "test")


def split_facts(facts: Path, out: Path, valid: float = 0.1, test: float = 0.1, seed: int = 0) -> dict[str, object]:
    """Write train.txt, valid.txt and test.txt into `out`.

    Args:
        facts: lines of head, relation, tail.
        out: folder, created if it is absent; it must not hold files of these names.
        valid, test: shares of all distinct facts.
        seed: seed of the draw; the same facts, shares and seed give the same files.

    Returns:
        Number of facts per split, and of test facts that train gives away.

    Raises:
        ConfigError: the shares leave nothing for train, or `out` already holds a split.
        DataError: a line is malformed, or the shares cannot be held out.
        StorageError: `out` cannot be written.
    """
    from mocme_dist.data.triples import KeySpace, cut_development_set, distinct, leakage, read_splits
    from mocme_dist.data.tsv import RawFile
    from mocme_dist.errors import ConfigError, DataError

    if not (0 < valid < 1 and 0 < test < 1 and valid + test < 1):
        raise ConfigError(f"--valid {valid:g} --test {test:g}: expected shares above 0 with a sum below 1")
    if taken := [f"{split}.txt" for split in SPLITS if (out / f"{split}.txt").exists()]:
        raise ConfigError(f"{out.absolute()}: {taken[0]} exists already; give a new folder or move it away")
    if not facts.is_file():
        raise DataError(f"{facts.absolute()}: file not found; give a file of facts: head, relation, tail")
    with tempfile.TemporaryDirectory(prefix="mocme-split-") as work:
        entities, relations, splits = read_splits({"facts": RawFile(facts)}, None, Path(work))
    triples_T3 = splits["facts"]
    keys = KeySpace(len(entities), len(relations))
    triples_T3 = distinct(triples_T3, keys)
    total = len(triples_T3)
    rest, test_T3 = cut_development_set(triples_T3, test, seed, keys, "--test ")
    train_T3, valid_T3 = cut_development_set(rest, min(1.0, valid * total / len(rest)), seed + 1, keys, "--valid ")
    parts = dict(zip(SPLITS, (train_T3, valid_T3, test_T3), strict=True))
    for split, part_T3 in parts.items():
        _write(out / f"{split}.txt", part_T3, list(entities), list(relations))
    given_away = leakage(train_T3, valid_T3, test_T3, keys)
    counts: dict[str, object] = {split: len(part_T3) for split, part_T3 in parts.items()}
    return counts | {name: given_away[name] for name in ("test_pairs_in_train", "test_inverse_pairs_in_train")}


def _write(path: Path, triples_T3: Integers, entities: list[bytes], relations: list[bytes]) -> None:
    from mocme_dist.data.files import atomic_path

    with atomic_path(path) as temporary, temporary.open("wb") as file:
        for head, relation, tail in triples_T3.tolist():
            file.write(b"\t".join((entities[head], relations[relation], entities[tail])) + b"\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, split, print the sizes."""
    parser = argparse.ArgumentParser(
        prog="mocme split", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("facts", type=Path, metavar="FACTS", help="file of tab-separated head, relation, tail")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="folder for the three files")
    parser.add_argument("--valid", type=float, default=0.1, metavar="SHARE", help="share of all facts; default 0.1")
    parser.add_argument("--test", type=float, default=0.1, metavar="SHARE", help="share of all facts; default 0.1")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the draw; default 0")
    args = parser.parse_args(arguments)
    print(json.dumps(split_facts(args.facts, args.out, args.valid, args.test, args.seed)), flush=True)


if __name__ == "__main__":
    run_command(main)
