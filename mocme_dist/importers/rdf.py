"""Imports an RDF file: `mocme import rdf FILE.nt|.ttl OUT`.

FILE is N-Triples or Turtle (.nt, .ttl; .nq and .trig are read without their graph names), plain or .gz. A triple
between two resources is a fact. Labels, comments and other names become text.tsv, numbers and years numeric.tsv, and
links to pictures images.tsv where the picture lies beside FILE; other links are listed in image_links.tsv. Labels of
predicates become relations.tsv.
The file is streamed: memory holds the names and three integers per fact, and texts wait on disk. Needs pyoxigraph: the
extra `rdf`.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import sqlite3
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np

from mocme_dist.data.triples import KeySpace, cut_development_set, distinct
from mocme_dist.data.tsv import unpack
from mocme_dist.errors import ConfigError, DataError
from mocme_dist.importers.mmkb import parse_shares
from mocme_dist.importers.raw_folder import SPLITS, RawWriter, one_line

_RDFS = "http://www.w3.org/2000/01/rdf-schema#"
_SKOS = "http://www.w3.org/2004/02/skos/core#"
_FOAF = "http://xmlns.com/foaf/0.1/"
_DBO = "http://dbpedia.org/ontology/"
_XSD = "http://www.w3.org/2001/XMLSchema#"
_OWL = "http://www.w3.org/2002/07/owl#"
_SCHEMAS = ("http://schema.org/", "https://schema.org/")
_DCTERMS = "http://purl.org/dc/terms/"

COLUMNS = ("label", "description", "aliases")
# Predicates of each text column, best first.
_TEXT: dict[str, tuple[int, int]] = {
    name: (column, place)
    for column, names in enumerate(
        (
            (
                _RDFS + "label",
                _SKOS + "prefLabel",
                *(base + "name" for base in _SCHEMAS),
                _FOAF + "name",
                _DCTERMS + "title",
            ),
            (
                _RDFS + "comment",
                *(base + "description" for base in _SCHEMAS),
                _DCTERMS + "description",
                _DBO + "abstract",
                _SKOS + "definition",
            ),
            (_SKOS + "altLabel", *(base + "alternateName" for base in _SCHEMAS)),
        )
    )
    for place, name in enumerate(names)
}
_IMAGES = {
    _FOAF + "depiction",
    _FOAF + "img",
    _DBO + "thumbnail",
    *(base + "image" for base in _SCHEMAS),
    "http://www.wikidata.org/prop/direct/P18",
}
# Links to the same thing elsewhere are no facts of the graph.
_SKIPPED = {_OWL + "sameAs", _RDFS + "seeAlso", _FOAF + "isPrimaryTopicOf", _FOAF + "page", _FOAF + "homepage"}
_NUMBERS = {
    _XSD + name
    for name in (
        *("integer", "decimal", "double", "float", "int", "long", "short", "byte"),
        *("nonNegativeInteger", "positiveInteger", "negativeInteger", "nonPositiveInteger"),
        *("unsignedInt", "unsignedLong", "unsignedShort", "unsignedByte"),
    )
}
_YEARS = {_XSD + name for name in ("gYear", "gYearMonth", "date", "dateTime")}
_YEAR = re.compile(r"-?\d{4,}")
_BATCH = 20_000
_ALIASES = 5

_TABLES = """
CREATE TABLE text (entity INTEGER, column INTEGER, place INTEGER, value TEXT);
CREATE TABLE number (entity INTEGER, attribute TEXT, value TEXT);
CREATE TABLE image (entity INTEGER, link TEXT);
"""


def import_rdf(
    source: Path,
    out: Path,
    languages: str = "en",
    blank_nodes: str = "skip",
    skip: str = "",
    max_text: int = 2000,
    split: str = "0.8,0.1,0.1",
    seed: int = 0,
) -> dict[str, Any]:
    """Write the raw folder.

    Args:
        source: the file.
        languages: codes, best first, as in "en,de"; "*" accepts every language. A literal without a language comes
            last.
        blank_nodes: "skip" leaves out triples with a blank node, "keep" makes entities `_:0`, `_:1`, ... of them in
            order.
        skip: predicates that are left out, with commas between.
        max_text: characters of a literal that are kept.
        split: shares of train, valid and test. seed: of the split.

    Returns:
        Rows per file, and how many triples were left out, by reason.

    Raises:
        ConfigError: an argument is out of range, or pyoxigraph is missing.
        DataError: the file is missing or malformed (with its line), or holds no fact between two resources.
    """
    if max_text < 1:
        raise ConfigError(f"--max-text {max_text}: expected 1 or more characters")
    shares = parse_shares(split)
    wanted = tuple(code.strip().lower() for code in languages.split(",") if code.strip())
    skipped = _SKIPPED | {name.strip().strip("<>") for name in skip.split(",") if name.strip()}
    triples = _read(source)
    with RawWriter(out, source, "rdf") as writer:
        spool = writer.work / "spool.sqlite"
        with closing(sqlite3.connect(spool)) as database:
            database.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + _TABLES)
            reader = _Reader(database, wanted, blank_nodes == "keep", skipped, max_text)
            for triple in triples:
                reader.add(triple)
            reader.flush()
            in_graph = _write_facts(writer, reader, source, shares, seed)
            _write_texts(writer, reader, in_graph)
            writer.table("numeric.tsv", reader.numbers(in_graph), header=("entity", "attribute", "value"))
            _write_images(writer, reader, in_graph, source)
        spool.unlink()
        for name in ("text.tsv", "numeric.tsv"):
            if not writer.counts[name]:
                (writer.work / name).unlink()
                del writer.counts[name]
        return {**writer.counts, "left_out": dict(sorted(reader.left_out.items()))}


class _Reader:
    """Sorts triples into facts (in memory, as integers) and what is said of single entities (on disk)."""

    def __init__(
        self,
        database: sqlite3.Connection,
        languages: tuple[str, ...],
        keep_blank: bool,
        skipped: set[str],
        max_text: int,
    ) -> None:
        self.database, self.languages, self.keep_blank = database, languages, keep_blank
        self.skipped, self.max_text = skipped, max_text
        self.entities: dict[str, int] = {}
        self.relations: dict[str, int] = {}
        self.facts = array("q")
        self.left_out: Counter[str] = Counter()
        self._blank: dict[str, int] = {}
        self._waiting: dict[str, list[tuple[Any, ...]]] = {"text": [], "number": [], "image": []}

    def add(self, triple: tuple[Any, str, Any]) -> None:
        """Take one triple of subject, predicate and object as pyoxigraph gives them."""
        subject, predicate, value = triple
        head = self._name(subject)
        if head is None:
            self.left_out["blank node"] += 1
        elif predicate in self.skipped:
            self.left_out["skipped predicate"] += 1
        elif predicate in _IMAGES:
            self._wait("image", (self._entity(head), value.value))
        elif hasattr(value, "datatype"):
            self._literal(head, predicate, value)
        else:
            tail = self._name(value)
            if tail is None:
                self.left_out["blank node"] += 1
                return
            relation = self.relations.setdefault(predicate, len(self.relations))
            self.facts.extend((self._entity(head), relation, self._entity(tail)))

    def _name(self, node: Any) -> str | None:
        """Name of a resource; None for a blank node that is left out, and for a quoted triple."""
        kind = type(node).__name__
        if kind == "NamedNode":
            return str(node.value)
        if kind == "BlankNode" and self.keep_blank:
            return f"_:{self._blank.setdefault(node.value, len(self._blank))}"
        return None

    def _entity(self, name: str) -> int:
        return self.entities.setdefault(name, len(self.entities))

    def _literal(self, head: str, predicate: str, value: Any) -> None:
        if predicate in _TEXT:
            column, place = _TEXT[predicate]
            rank = self._language_rank(value.language)
            text = one_line(value.value.replace("\x00", " "))[: self.max_text].rstrip()
            if rank is None:
                self.left_out["other language"] += 1
            elif text:
                self._wait("text", (self._entity(head), column, rank * 100 + place, text))
            return
        number = _number(value)
        if number is None:
            self.left_out["literal that is no number"] += 1
        else:
            self._wait("number", (self._entity(head), predicate, number))

    def _language_rank(self, language: str | None) -> int | None:
        """Place of a literal's language among the wanted ones; None where it is not wanted."""
        if language is None:
            return len(self.languages)
        base = language.lower()
        for rank, code in enumerate(self.languages):
            if code == "*" or base == code or base.startswith(f"{code}-"):
                return rank
        return None

    def _wait(self, table: str, row: tuple[Any, ...]) -> None:
        rows = self._waiting[table]
        rows.append(row)
        if len(rows) >= _BATCH:
            self._insert(table)

    def _insert(self, table: str) -> None:
        rows = self._waiting[table]
        if rows:
            self.database.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)
        rows.clear()

    def flush(self) -> None:
        """Write what waits."""
        for table in self._waiting:
            self._insert(table)

    def texts(self) -> Iterator[tuple[int, list[list[str]]]]:
        """Every entity with a text, and the values of each column, best first."""
        rows = self.database.execute("SELECT entity, column, value FROM text ORDER BY entity, column, place, rowid")
        entity, found = -1, [[] for _ in COLUMNS]  # type: tuple[int, list[list[str]]]
        for owner, column, value in rows:
            if owner != entity:
                if entity >= 0:
                    yield entity, found
                entity, found = owner, [[] for _ in COLUMNS]
            if value not in found[column]:
                found[column].append(value)
        if entity >= 0:
            yield entity, found

    def numbers(self, in_graph: Callable[[int], str | None]) -> Iterator[tuple[str, str, str]]:
        """Rows of numeric.tsv; attributes have the last part of their IRI as name, or the whole where two share it."""
        attributes = [iri for (iri,) in self.database.execute("SELECT DISTINCT attribute FROM number")]
        times = Counter(map(short_name, attributes))
        shown = {iri: short_name(iri) if times[short_name(iri)] == 1 else iri for iri in attributes}
        for entity, attribute, value in self.database.execute(
            "SELECT entity, attribute, value FROM number ORDER BY rowid"
        ):
            name = in_graph(entity)
            if name is not None:
                yield name, shown[attribute], value

    def images(self) -> Iterator[tuple[int, str]]:
        """Links of entities to pictures."""
        yield from self.database.execute("SELECT DISTINCT entity, link FROM image ORDER BY entity, rowid")


def _read(source: Path) -> Iterator[tuple[Any, str, Any]]:
    """Triples of the file, one after another.

    Raises:
        ConfigError: pyoxigraph is missing. DataError: the file is missing, of another form, or malformed.
    """
    try:
        import pyoxigraph
    except ImportError:
        raise ConfigError("reading RDF needs pyoxigraph; pip install 'mocme-dist[rdf]'") from None
    kinds = pyoxigraph.RdfFormat
    endings = {".nt": kinds.N_TRIPLES, ".ttl": kinds.TURTLE, ".nq": kinds.N_QUADS, ".trig": kinds.TRIG}
    if not source.is_file():
        raise DataError(f"{source.absolute()}: file not found; give an RDF file (.nt or .ttl, also .gz)")
    ending = Path(source.name.removesuffix(".gz")).suffix
    if ending not in endings:
        raise DataError(
            f"{source.absolute()}: expected a name that ends in .nt or .ttl (also .gz), found {source.name!r}"
        )

    def triples() -> Iterator[tuple[Any, str, Any]]:
        try:
            with source.open("rb") as packed:
                file = unpack(packed, source) if source.suffix == ".gz" else packed
                base = source.absolute().as_uri()
                for quad in pyoxigraph.parse(file, format=endings[ending], base_iri=base):
                    yield quad.subject, quad.predicate.value, quad.object
        except (SyntaxError, ValueError) as error:
            line = getattr(error, "lineno", None)
            where = f"{source.absolute()}:{line}" if line else str(source.absolute())
            raise DataError(f"{where}: not valid RDF ({' '.join(str(error).split())[:200]})") from None
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{source.absolute()}: cannot be read: {error}") from None

    return triples()


def _number(value: Any) -> str | None:
    """Text of a finite number, or of the year of a date; None for any other literal."""
    kind = value.datatype.value
    if kind in _YEARS:
        year = _YEAR.match(value.value)
        return str(int(year[0])) if year else None
    if kind not in _NUMBERS or len(value.value) > 400:
        return None
    try:
        number = float(value.value)
    except ValueError:
        return None
    return value.value.strip() if math.isfinite(number) else None


def short_name(iri: str) -> str:
    """The last part of an IRI: `http://dbpedia.org/ontology/birthPlace` gives `birthPlace`."""
    tail = re.split(r"[/#]", iri.rstrip("/#"))[-1]
    return one_line(unquote(tail)) or iri


def _words(iri: str) -> str:
    """The last part of an IRI as words: `birthPlace` gives `birth place`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", short_name(iri)).replace("_", " ").lower()


def _write_facts(
    writer: RawWriter, reader: _Reader, source: Path, shares: tuple[float, float, float], seed: int
) -> Callable[[int], str | None]:
    """Write the splits; returns the name of an entity by its number, or None where it is in no fact."""
    if not reader.facts:
        raise DataError(f"{source.absolute()}: no triple between two resources; a graph needs facts")
    keys = KeySpace(len(reader.entities), len(reader.relations))
    rest_T3 = distinct(np.frombuffer(reader.facts, np.int64).reshape(-1, 3), keys)
    total, parts = len(rest_T3), {}
    for turn, name in enumerate(("test", "valid")):
        wanted = min(1.0, shares[2 - turn] * total / len(rest_T3))
        parts[name] = rest_T3[:0]
        if wanted > 0:
            rest_T3, parts[name] = cut_development_set(rest_T3, wanted, seed + turn, keys, "--split ")
    parts["train"] = rest_T3
    entities, relations = list(reader.entities), list(reader.relations)
    for name in SPLITS:
        rows = ((entities[h], relations[r], entities[t]) for h, r, t in parts[name].tolist())
        writer.triples(name, rows)
    there = np.zeros(len(entities), bool)
    there[rest_T3[:, [0, 2]].ravel()] = True  # train keeps every entity
    return lambda entity: entities[entity] if there[entity] else None


def _write_texts(writer: RawWriter, reader: _Reader, in_graph: Callable[[int], str | None]) -> None:
    """Write text.tsv, and relations.tsv with the labels of predicates."""
    labels: dict[str, str] = {}
    names = list(reader.entities)

    def rows() -> Iterator[tuple[str, ...]]:
        for entity, (label, description, aliases) in reader.texts():
            if names[entity] in reader.relations and label:
                labels[names[entity]] = label[0]
            if (entity_name := in_graph(entity)) is not None:
                others = [name.replace("|", "/") for name in (label[1:] + aliases)[:_ALIASES]]
                yield entity_name, *(found[0] if found else "" for found in (label, description)), "|".join(others)

    writer.table("text.tsv", rows(), header=("entity", *COLUMNS))
    relations = ((name, labels.get(name) or _words(name)) for name in reader.relations)
    writer.table("relations.tsv", relations, header=("id", "label"))


def _write_images(writer: RawWriter, reader: _Reader, in_graph: Callable[[int], str | None], source: Path) -> None:
    """Write images.tsv for pictures beside the file, and image_links.tsv for the others."""
    folder = source.absolute().parent
    here, elsewhere = [], []
    taken: dict[Path, str] = {}
    for entity, link in reader.images():
        name = in_graph(entity)
        if name is None:
            continue
        path = _local(link, folder)
        if path is None:
            elsewhere.append((name, one_line(link)))
            continue
        if path not in taken:
            taken[path] = f"images/{len(taken):06d}{path.suffix.lower()}"
            (writer.work / "images").mkdir(exist_ok=True)
            _take(path, writer.work / taken[path])
        here.append((name, taken[path]))
    if here:
        writer.table("images.tsv", here, header=("entity", "file"))
    if elsewhere:
        writer.table("image_links.tsv", elsewhere, header=("entity", "link"))


def _local(link: str, folder: Path) -> Path | None:
    """The file that a link names inside the folder of the RDF file; None for any other."""
    parts = urlsplit(link)
    if parts.scheme not in ("", "file"):
        return None
    path = (folder / unquote(parts.path)).resolve()
    return path if path.is_file() and path.is_relative_to(folder.resolve()) else None


def _take(path: Path, target: Path) -> None:
    """A hard link where the disk allows, else a copy."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this importer's own options."""
    parser.add_argument(
        "--languages", default="en", metavar="CODES", help="of texts, best first, as in en,de; * takes all; default en"
    )
    parser.add_argument(
        "--blank-nodes", choices=("skip", "keep"), default="skip", help="leave out triples with blank nodes (default)"
    )
    parser.add_argument("--skip", default="", metavar="IRIS", help="predicates to leave out, with commas between")
    parser.add_argument(
        "--max-text", type=int, default=2000, metavar="N", help="characters kept of a text; default 2000"
    )
    parser.add_argument(
        "--split", default="0.8,0.1,0.1", metavar="TRAIN,VALID,TEST", help="shares; default 0.8,0.1,0.1"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split; default 0")
