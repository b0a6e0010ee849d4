"""What a search found, as a table or as RDF.

Facts with labels, probabilities and reasons, and pairs of near-equal entities.
"""

from __future__ import annotations

import csv
import heapq
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from mocme_dist.data.files import atomic_path
from mocme_dist.data.progress import Progress
from mocme_dist.errors import ConfigError
from mocme_dist.serving.discover import ALL, ANSWERS, TRAIN, Found, Search, Settings, run_units
from mocme_dist.serving.reasons import Reasons, question_of

if TYPE_CHECKING:
    import pandas

    from mocme_dist.serving.bundle import Bundle

COLUMNS = (
    *("head", "head_label", "relation", "relation_label", "tail", "tail_label"),
    *("probability", "score", "rank_tail", "rank_head", "reason"),
)
FORMATS = (".csv", ".parquet", ".jsonl", ".nt")
_ROWS = 512  # that are explained together
_SAMPLE = 512  # entities that an answer is compared with in its short reason
_BLOCK = 512
_SOURCES = 1 << 16  # whose answers by frequency are held at once
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:[^\s<>\"{}|\\^`]+")
_BLANK = re.compile(r"_:[A-Za-z0-9]+")
Row = dict[str, Any]


def facts_of(search: Search, weights: NDArray[np.float64]) -> Iterator[Row]:
    """The facts that were found with at least the wanted probability, likeliest first, without names and reasons."""

    def of_relation(relation: int) -> Iterator[tuple[float, int, int, int, Row]]:
        found, chance = search.facts(relation, ALL, weights)
        found = found.take(np.arange(min(search.settings.per_relation, len(chance))))  # all relations are merged
        direction = search.first_direction(relation)
        for at in range(len(found.source)):
            if chance[at] < search.settings.min_probability:
                return
            ends = [int(found.source[at]), int(found.answer[at])]
            ranks = [float(found.rank_a[at]), float(found.rank_b[at])]
            head, tail = ends[::-1] if direction else ends
            rank_tail, rank_head = ranks[::-1] if direction else ranks
            row = {"head": head, "relation": relation, "tail": tail, "probability": float(chance[at])}
            row |= {"score": float(found.score_a[at]), "rank_tail": rank_tail, "rank_head": rank_head}
            yield -float(chance[at]), relation, head, tail, row | {"direction": direction}

    for *_, row in heapq.merge(*map(of_relation, search.settings.relations), key=_place):
        yield row


def frame(bundle: Bundle, relations: Iterable[int], min_probability: float, per_relation: int) -> pandas.DataFrame:
    """Return what a search in this process finds, with a row per fact."""
    import pandas

    settings = Settings(tuple(relations), per_relation, min_probability)
    with TemporaryDirectory(prefix="mocme-discover-") as folder:
        search = Search(bundle, settings, Path(folder))
        for step in (0, 1):
            run_units(search, step)
        weights, _ = search.fitted()
        return pandas.DataFrame(list(named(bundle, facts_of(search, weights))), columns=list(COLUMNS))


def _place(item: tuple[float, int, int, int, Row]) -> tuple[float, int, int, int]:
    return item[:4]


def named(bundle: Bundle, facts: Iterable[Row]) -> Iterator[Row]:
    """Facts with ids, labels and a short reason, some hundreds at a time."""
    waiting: list[Row] = []
    for row in facts:
        waiting.append(row)
        if len(waiting) == _ROWS:
            yield from _named(bundle, waiting)
            waiting = []
    yield from _named(bundle, waiting)


def _named(bundle: Bundle, rows: list[Row]) -> Iterator[Row]:
    reasons = _short_reasons(bundle, rows)
    ends = {side: np.array([row[side] for row in rows], np.int64) for side in ("head", "tail")}
    names = {side: bundle.entities.take(ids) for side, ids in ends.items()}
    relations = bundle.relations.take(np.array([row["relation"] for row in rows], np.int64))
    for at, row in enumerate(rows):
        yield {
            "head": names["head"][at],
            "head_label": bundle.label(row["head"]),
            "relation": relations[at],
            "relation_label": bundle.relation_label(row["relation"]),
            "tail": names["tail"][at],
            "tail_label": bundle.label(row["tail"]),
            "probability": round(row["probability"], 4),
            "score": round(row["score"], 4),
            "rank_tail": row["rank_tail"],
            "rank_head": row["rank_head"],
            "reason": reasons[at],
        }


def _short_reasons(bundle: Bundle, rows: list[Row]) -> list[str]:
    """One sentence per fact, as the question that was asked first is answered.

    What a question needs is prepared once.
    """
    out = [""] * len(rows)
    groups: dict[tuple[int, int, int], list[int]] = {}
    for at, row in enumerate(rows):
        source = row["tail"] if row["direction"] else row["head"]
        groups.setdefault((source, row["relation"], row["direction"]), []).append(at)
    for (source, relation, direction), places in groups.items():
        reasons = Reasons(bundle, question_of(bundle, source, relation, direction), candidates=_SAMPLE, best=0)
        for at in places:
            out[at] = reasons.short(rows[at]["head"] if direction else rows[at]["tail"])
    return out


# -- precision


def precision(search: Search, weights: NDArray[np.float64], count: int = 1000) -> dict[str, Any] | None:
    """How many of the likeliest facts are held-out ones if only train is known, beside the frequency baseline."""
    if TRAIN not in search.variants:
        return None
    chances, hits, tests = [np.zeros(0)], [np.zeros(0, bool)], [np.zeros(0, bool)]
    by_count, count_hits = [np.zeros(0)], [np.zeros(0, bool)]
    for relation in search.settings.relations:
        found, chance = search.facts(relation, TRAIN, weights)
        found, chance = found.take(np.arange(min(count, len(chance)))), chance[:count]
        chances.append(chance)
        hits.append(search.is_in(found, relation, ("valid", "test")))
        tests.append(search.is_in(found, relation, ("test",)))
        score, hit = _by_frequency(search, relation, count)
        by_count.append(score)
        count_hits.append(hit)
    order = np.argsort(-np.concatenate(chances), kind="stable")[:count]
    best = np.argsort(-np.concatenate(by_count), kind="stable")[:count]
    return {
        "facts": len(order),
        "held_out": int(np.concatenate(hits)[order].sum()),
        "of_test": int(np.concatenate(tests)[order].sum()),
        "expected": float(np.concatenate(chances)[order].sum()),
        "frequency_held_out": int(np.concatenate(count_hits)[best].sum()),
    }


def _by_frequency(search: Search, relation: int, count: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Scores of the likeliest facts of a relation by frequency, and which of them are held out.

    The questions are those of the search; the score is the chance that such a question misses an answer, times the
    share of the answer among the facts of train.
    """
    direction = search.first_direction(relation)
    place = 2 * relation + direction
    source, (answer, times) = search.sources(place), search.bundle.facts_of_train.answers(place)
    most = np.argsort(-times, kind="stable")[:ANSWERS]
    answer, share = answer[most], times[most] / max(1, int(times.sum()))
    chances = search.open_chances(relation)[direction]
    best = np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64)
    for start in range(0, len(source), _SOURCES):
        some = source[start : start + _SOURCES]
        columns = (some, np.full(len(some), relation), np.full(len(some), direction))
        offsets, targets = search.bundle.known_in["train"].lookup(*columns)
        score = chances[(np.diff(offsets) == 0).astype(int)][:, None] * share
        score[some[:, None] == answer] = 0
        # Known answers do not count: pairs of a question and one of these answers.
        owner, column = np.repeat(np.arange(len(some)), np.diff(offsets)), np.searchsorted(np.sort(answer), targets)
        column = np.argsort(answer)[np.minimum(column, len(answer) - 1)] if len(answer) else column[:0]
        there = answer[column] == targets[: len(column)]
        score[owner[: len(column)][there], column[there]] = 0
        row, which = np.divmod(np.argsort(-score.ravel(), kind="stable")[:count], max(1, len(answer)))
        joined = [
            np.concatenate(pair) for pair in zip(best, (score[row, which], some[row], answer[which]), strict=True)
        ]
        kept = np.argsort(-joined[0], kind="stable")[:count]
        best = joined[0][kept], joined[1][kept], joined[2][kept]
    none = np.zeros(len(best[0]), np.float32)
    found = Found(best[1], best[2], none, none, none, none > 0, none, none, none, none > 0)
    return best[0], search.is_in(found, relation, ("valid", "test"))


# -- near-equal entities


def duplicates(bundle: Bundle, min_cosine: float, min_modalities: int = 2) -> Iterator[Row]:
    """Pairs of entities with near-equal vectors in several modalities, most modalities and highest mean cosine first.

    Every pair is compared, by blocks: time grows with the square of the number of entities, memory does not.

    Raises:
        ConfigError: the bundle has one modality only.
    """
    if not bundle.view_parts:
        raise ConfigError(f"{bundle.directory}: has one modality; near-equal entities need two or more that agree")
    found: list[tuple[int, float, int, int, list[float]]] = []
    blocks = range(0, bundle.num_entities, _BLOCK)
    with Progress("comparing entities", bundle.num_entities, "entities") as progress:
        for start in blocks:
            own = _directions(bundle, start)
            for other in range(start, bundle.num_entities, _BLOCK):
                found += _near(own, start, _directions(bundle, other), other, min_cosine, min_modalities)
            progress.add(len(own[0]))
    for count, mean, one, two, cosines in sorted(found, key=_most_alike):
        names = bundle.entities.take(np.array([one, two]))
        yield {
            "entity": names[0],
            "entity_label": bundle.label(one),
            "other": names[1],
            "other_label": bundle.label(two),
            "modalities": count,
            "mean_cosine": round(mean, 4),
            **{
                f"cosine_{name}": None if np.isnan(cosine) else round(cosine, 4)
                for name, cosine in zip(bundle.modalities, cosines, strict=True)
            },
        }


def _most_alike(pair: tuple[int, float, int, int, list[float]]) -> tuple[int, float, int, int]:
    return -pair[0], -pair[1], pair[2], pair[3]


def _directions(bundle: Bundle, start: int) -> NDArray[np.float32]:
    """(M, n, d) unit vectors of a block of entities by each modality; 0 where an entity lacks it."""
    ids = np.arange(start, min(start + _BLOCK, bundle.num_entities))
    rows = []
    for m in range(len(bundle.modalities)):
        view_nd = bundle.rows([views[m] for views in bundle.view_parts], ids)
        length_n1 = np.linalg.norm(view_nd, axis=1, keepdims=True)
        rows.append(view_nd / np.where(length_n1 > 0, length_n1, 1.0))
    return np.stack(rows)


def _near(
    own_Mnd: NDArray[np.float32], start: int, other_Mkd: NDArray[np.float32], other: int, least: float, count: int
) -> list[tuple[int, float, int, int, list[float]]]:
    """Pairs of two blocks that at least `count` modalities find near-equal.

    Count, mean cosine, rows and all cosines.
    """
    cosine_Mnk = np.matmul(own_Mnd, other_Mkd.transpose(0, 2, 1))
    there_Mnk: NDArray[np.bool_] = np.any(own_Mnd, axis=2)[:, :, None] & np.any(other_Mkd, axis=2)[:, None]
    agree_nk: NDArray[np.int64] = ((cosine_Mnk >= least) & there_Mnk).sum(0)
    if start == other:
        agree_nk = np.triu(agree_nk, 1)
    found = []
    enough_nk = np.asarray(agree_nk >= count)
    for row, column in zip(*np.nonzero(enough_nk), strict=True):
        cosine_M = np.where(there_Mnk[:, row, column], cosine_Mnk[:, row, column], np.nan)
        mean = float(np.nanmean(cosine_M))
        found.append((int(agree_nk[row, column]), mean, start + int(row), other + int(column), cosine_M.tolist()))
    return found


# -- files


def write_rows(path: Path, rows: Iterable[Row], ending: str | None = None) -> int:
    """Write rows to a file and return how many there were; the file appears when it is complete.

    Args:
        ending: format; None takes that of the file's name.

    Raises:
        ConfigError: the ending is unknown, or the rows are not facts and it is .nt.
    """
    ending = ending or path.suffix.lower()
    if ending not in FORMATS:
        raise ConfigError(f"--output {path}: expected a file that ends in {', '.join(FORMATS)}")
    writer = {".csv": _csv_file, ".parquet": _parquet_file, ".jsonl": _json_file, ".nt": _nt_file}[ending]
    count = 0
    with atomic_path(path) as temporary, writer(temporary) as write:
        for row in rows:
            write(row)
            count += 1
    return count


@contextmanager
def _csv_file(path: Path) -> Iterator[Callable[[Row], None]]:
    with path.open("w", encoding="utf8", newline="") as file:
        writer = csv.writer(file)
        headed: list[bool] = []

        def write(row: Row) -> None:
            if not headed:
                headed.append(True)
                writer.writerow(row)
            writer.writerow(row.values())

        yield write


@contextmanager
def _json_file(path: Path) -> Iterator[Callable[[Row], None]]:
    with path.open("w", encoding="utf8") as file:

        def write(row: Row) -> None:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

        yield write


@contextmanager
def _parquet_file(path: Path) -> Iterator[Callable[[Row], None]]:
    import pyarrow
    import pyarrow.parquet

    waiting: list[Row] = []
    writers: list[Any] = []

    def flush() -> None:
        if not writers:
            table = pyarrow.Table.from_pylist(waiting) if waiting else pyarrow.table({})
            writers.append(pyarrow.parquet.ParquetWriter(path, table.schema))
        if waiting:
            writers[0].write_table(pyarrow.Table.from_pylist(waiting, schema=writers[0].schema))
            waiting.clear()

    def write(row: Row) -> None:
        waiting.append(row)
        if len(waiting) >= 1 << 14:
            flush()

    try:
        yield write
        flush()
    finally:
        for writer in writers:
            writer.close()


@contextmanager
def _nt_file(path: Path) -> Iterator[Callable[[Row], None]]:
    with path.open("w", encoding="utf8", newline="\n") as file:

        def write(row: Row) -> None:
            if "tail" not in row:
                raise ConfigError(
                    "--output: .nt holds facts; pairs of near-equal entities need .csv, .parquet or .jsonl"
                )
            terms = (iri(row["head"], "entity"), iri(row["relation"], "relation"), iri(row["tail"], "entity"))
            file.write(f"# probability {row['probability']}\n{' '.join(terms)} .\n")

        yield write


def iri(name: str, kind: str) -> str:
    """A name as a term of N-Triples: itself if it is an IRI or a blank node, else urn:mocme:KIND.

    And the name, escaped.
    """
    if _BLANK.fullmatch(name) and kind == "entity":
        return name
    if _URI.fullmatch(name) and name.isprintable():
        return f"<{name}>"
    return f"<urn:mocme:{kind}:{quote(name, safe='')}>"
