"""Imports one graph of mmkb (FB15K, DB15K, YAGO15K): `mocme import mmkb SOURCE OUT [--split 0.8,0.1,0.1 --seed 0]`.

SOURCE holds NAME_EntityTriples.txt and maybe NAME_NumericalTriples.txt, NAME_ImageIndex.txt with NAME_ImageData.h5 (a
vector for each image; needs h5py). mmkb publishes one list of triples: it is split here by seed, so that train shows
every entity and relation.
"""

from __future__ import annotations

import argparse
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mocme_dist.errors import ConfigError, DataError
from mocme_dist.importers.raw_folder import RawWriter, lines, optional

_LITERAL = re.compile(r'"(?P<value>[^"]*)"(?:\^\^\S+)?$')
Triple = tuple[str, str, str]


def import_mmkb(source: Path, out: Path, split: str = "0.8,0.1,0.1", seed: int = 0) -> dict[str, Any]:
    """Write the raw folder.

    Args:
        split: shares of train, valid and test.
        seed: seed of the split.

    Returns:
        Counts of lines by file.

    Raises:
        ConfigError: the shares are invalid, or h5py is missing and there are image vectors.
        DataError: a file is missing or malformed.
    """
    triples_file = _only(source, "_EntityTriples.txt")
    name = triples_file.name.removesuffix(".gz").removesuffix("_EntityTriples.txt")
    triples = list(dict.fromkeys(_triples(triples_file)))
    entities = {entity for head, _, tail in triples for entity in (head, tail)}
    with RawWriter(out, source, f"mmkb {name}") as writer:
        for part, rows in split_triples(triples, parse_shares(split), seed).items():
            writer.triples(part, rows)
        numbers = optional(source, f"{name}_NumericalTriples.txt")
        if numbers is not None:
            writer.table("numeric.tsv", _numbers(numbers, entities), header=("entity", "attribute", "value"))
        index = optional(source, f"{name}_ImageIndex.txt")
        vectors = optional(source, f"{name}_ImageData.h5")
        if index is not None and vectors is not None:
            _write_images(writer, index, vectors, entities)
        return writer.counts


def split_triples(triples: list[Triple], shares: tuple[float, float, float], seed: int) -> dict[str, list[Triple]]:
    """Split by seed; a triple whose removal would leave an entity or relation unseen stays in train."""
    order = list(triples)
    random.Random(seed).shuffle(order)
    left = Counter(key for head, relation, tail in order for key in (("e", head), ("e", tail), ("r", relation)))
    wanted = {"test": round(shares[2] * len(order)), "valid": round(shares[1] * len(order))}
    parts: dict[str, list[Triple]] = {"train": [], "valid": [], "test": []}
    for head, relation, tail in order:
        keys = Counter((("e", head), ("e", tail), ("r", relation)))
        part = next((name for name, count in wanted.items() if len(parts[name]) < count), "train")
        if part != "train" and any(left[key] <= count for key, count in keys.items()):
            part = "train"
        if part != "train":
            left -= keys
        parts[part].append((head, relation, tail))
    return parts


def parse_shares(text: str) -> tuple[float, float, float]:
    """Return the shares of train, valid and test from a text such as "0.8,0.1,0.1".

    Raises:
        ConfigError: they are not three shares that add up to 1.
    """
    try:
        train, valid, test = (float(share) for share in text.split(","))
    except ValueError:
        train = valid = test = -1.0
    if min(train, valid, test) < 0 or abs(train + valid + test - 1) > 1e-6:
        raise ConfigError(f"--split {text}: expected three shares that add up to 1, as in 0.8,0.1,0.1")
    return train, valid, test


def _only(source: Path, ending: str) -> Path:
    if not source.is_dir():
        raise DataError(f"{source.absolute()}: folder not found; give the folder of one graph of mmkb")
    found = sorted(path for path in source.iterdir() if path.name.removesuffix(".gz").endswith(ending))
    if len(found) != 1:
        raise DataError(f"{source.absolute()}: {len(found)} files end in {ending}; expected one, as in DB15K{ending}")
    return found[0]


def _bare(term: str) -> str:
    """Return a term without angle brackets."""
    return term[1:-1] if term.startswith("<") and term.endswith(">") else term


def _terms(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield three terms per line, with or without the closing dot; the third may hold spaces inside quotes."""
    for number, line in lines(path):
        text = line.strip()
        fields = text.removesuffix(".").rstrip().split(None, 2) if text.endswith((" .", "\t.")) else text.split(None, 2)
        if len(fields) != 3:
            raise DataError(f"{path.absolute()}:{number}: expected three terms, got {line[:80]!r}")
        yield number, fields


def _triples(path: Path) -> Iterator[Triple]:
    for _, (head, relation, tail) in _terms(path):
        yield _bare(head), _bare(relation), _bare(tail)


def _numbers(path: Path, entities: set[str]) -> Iterator[tuple[str, str, str]]:
    for number, (entity, attribute, value) in _terms(path):
        literal = _LITERAL.match(value)
        text = literal["value"] if literal else _bare(value)
        try:
            float(text)
        except ValueError:
            raise DataError(f"{path.absolute()}:{number}: expected a number, got {value[:80]!r}") from None
        if _bare(entity) in entities:
            yield _bare(entity), _bare(attribute), text


def _write_images(writer: RawWriter, index: Path, vectors: Path, entities: set[str]) -> None:
    """Write features/image.npy: the vector of each entity whose image has one."""
    try:
        import h5py
    except ImportError:
        raise ConfigError(
            f"{vectors.absolute()}: reading it needs h5py; pip install h5py, or move the file away to go without"
        ) from None
    names = []
    found = []
    try:
        with h5py.File(vectors, "r") as file:
            for number, line in lines(index):
                fields = line.split()
                if len(fields) != 2:
                    raise DataError(f"{index.absolute()}:{number}: expected an entity and its image, got {line[:80]!r}")
                entity = _bare(fields[0])
                image = fields[1]
                if entity in entities and image in file:
                    names.append(entity)
                    found.append(np.asarray(file[image], dtype=np.float32).ravel())
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:  # as h5py says it
        raise DataError(f"{vectors.absolute()}: cannot be read as HDF5 vectors: {error}") from None
    if len({len(vector) for vector in found}) > 1:
        raise DataError(f"{vectors.absolute()}: vectors of several lengths; expected one")
    if not found:
        raise DataError(f"{index.absolute()}: names no image that {vectors.name} has for an entity of the graph")
    path = writer.work / "image.npy"
    np.save(path, np.stack(found), allow_pickle=False)
    writer.feature_file("image", path, names)
    path.unlink()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this importer."""
    parser.add_argument(
        "--split", default="0.8,0.1,0.1", metavar="TRAIN,VALID,TEST", help="shares; default 0.8,0.1,0.1"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split; default 0")
