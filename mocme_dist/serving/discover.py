"""The likeliest facts of the whole graph that are not known, found relation by relation in two passes over questions.

A fact has two questions, by its head and by its tail. The first pass asks those of the side that has fewer answers per
question and keeps the best answers of each; the second asks the other side's and looks up the score and rank of what
the first one found. A logistic regression makes one probability of both, fitted on valid: facts of valid count as right
among what the same search finds if valid is not known. It also knows the chance that a question of its kind misses an
answer at all.

A question is asked where train makes it plausible (`plausible`). Work is cut into units of one relation, pass and range
of questions; a unit writes one file, so an interrupted search continues, and workers share nothing but the folder.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mocme_dist.data.files import atomic_path
from mocme_dist.data.progress import Progress
from mocme_dist.errors import ConfigError
from mocme_dist.serving.calibration import Standing, fit_near, gap_to, probability, sigmoid
from mocme_dist.serving.plausible import PlausibleSources
from mocme_dist.serving.scorer import Asked, all_scores, answers_in, rotated

if TYPE_CHECKING:
    from mocme_dist.serving.bundle import Bundle

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
# What counts as known: everything; everything but valid, to fit probabilities; train, to measure precision.
ALL, WITHOUT_VALID, TRAIN = "all", "without_valid", "train"
ANSWERS = 20  # of a question of the first pass
_KEPT = 50  # candidates per fact of the result that outlive the first pass
_SCORES = 1 << 24  # that are held at once: 64 MiB
_PLACES = 4  # whose sources are kept
_FITTED = 1_000_000  # candidates that the probability is fitted on
# Weights that the fit is drawn towards, and how strongly: those of the demo.
_PRIOR = np.array([2.5, 0.9, 0.9, 0.5, 1.2])
_PRECISION = 4.0


class Settings(NamedTuple):
    """Settings of a search.

    Attributes:
        relations: rows, ascending.
        per_relation: most facts of one relation.
        min_probability: least probability of a fact.
        questions: most questions of one relation and pass, the most plausible first; 0 asks all.
        per_unit: questions of a unit.
    """

    relations: tuple[int, ...]
    per_relation: int = 1000
    min_probability: float = 0.5
    questions: int = 0
    per_unit: int = 2048


class Unit(NamedTuple):
    """Questions [start, stop) of one relation in pass 0 or 1."""

    relation: int
    step: int
    start: int
    stop: int

    @property
    def file(self) -> str:
        """Name of the unit's file."""
        return f"{self.relation:06d}-{self.step}-{self.start:010d}.npz"


class Found(NamedTuple):
    """Candidate facts of one relation; columns of equal length.

    Attributes:
        source, answer: rows, as the first pass asked. score_a, rank_a, gap_a: there. open_a: whether the question had
            no known answer.
        score_b, rank_b, gap_b, open_b: the same of the other side's question.
    """

    source: Integers
    answer: Integers
    score_a: Floats
    rank_a: Floats
    gap_a: Floats
    open_a: NDArray[np.bool_]
    score_b: Floats
    rank_b: Floats
    gap_b: Floats
    open_b: NDArray[np.bool_]

    def take(self, index: NDArray[Any]) -> Found:
        """Return some of them."""
        return Found(*(column[index] for column in self))


def join(parts: Sequence[Found]) -> Found:
    """Return the rows of several, one after another."""
    empty = Found(
        *(np.zeros(0, kind) for kind in (np.int64, np.int64, *(np.float32, np.float32, np.float32, bool) * 2))
    )
    return Found(*(np.concatenate(columns) for columns in zip(empty, *parts, strict=True)))


class Search:
    """A search over a bundle whose units write into `folder`.

    Args:
        bundle: an opened bundle.
        settings: what is searched.
        folder: of the units' files.

    Raises:
        ConfigError: the bundle has no calibration.
    """

    def __init__(self, bundle: Bundle, settings: Settings, folder: Path) -> None:
        if bundle.manifest["calibration"] is None:
            raise ConfigError(
                f"{bundle.directory}: the bundle has no calibrated probabilities; export it with a development set"
            )
        self.bundle, self.settings, self.folder = bundle, settings, folder
        splits = {name: len(known.keys) > 0 for name, known in bundle.known_in.items()}
        self.variants = [ALL]
        self.variants += [WITHOUT_VALID] if splits["valid"] else []
        self.variants += [TRAIN] if splits["valid"] or splits["test"] else []
        self._sources: OrderedDict[int, Integers] = OrderedDict()
        self._counts: dict[int, int] = {}
        self._first: dict[tuple[int, str], Found] = {}

    # -- units

    @cached_property
    def _plausible(self) -> PlausibleSources:
        return PlausibleSources(self.bundle)

    def sources(self, place: int) -> Integers:
        """Rows of the entities that are asked at a place, ascending; those of a few places are kept."""
        if place not in self._sources:
            self._sources[place] = self._plausible.sources(place, self.settings.questions)
            self._counts[place] = len(self._sources[place])
            while len(self._sources) > _PLACES:
                self._sources.popitem(last=False)
        return self._sources[place]

    def _count(self, place: int) -> int:
        """Number of the entities that are asked at a place."""
        if place not in self._counts:
            self.sources(place)
        return self._counts[place]

    def first_direction(self, relation: int) -> int:
        """The direction whose questions have fewer answers; ties ask for tails."""
        facts = self.bundle.facts_of_train
        return 0 if len(facts.sources(2 * relation)) >= len(facts.sources(2 * relation + 1)) else 1

    def units(self, step: int) -> list[Unit]:
        """The units of a pass."""
        return [unit for relation in self.settings.relations for unit in self._units_of(relation, step)]

    def _units_of(self, relation: int, step: int) -> list[Unit]:
        """The units of a relation in a pass."""
        direction = self.first_direction(relation) ^ step
        count, size = self._count(2 * relation + direction), self.settings.per_unit
        return [Unit(relation, step, start, min(start + size, count)) for start in range(0, count, size)]

    def run(self, unit: Unit) -> None:
        """Do a unit unless its file is there."""
        path = self.folder / unit.file
        if not path.is_file():
            columns = self._ask_first(unit) if unit.step == 0 else self._look_up(unit)
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                np.savez(file, **columns)  # type: ignore[arg-type]

    def _ask_first(self, unit: Unit) -> dict[str, NDArray[Any]]:
        """The best answers of each question, by what counts as known."""
        direction = self.first_direction(unit.relation)
        sources = self.sources(2 * unit.relation + direction)[unit.start : unit.stop]
        found: dict[str, list[Found]] = {variant: [] for variant in self.variants}
        for asked, score_QE in self._scores(sources, unit.relation, direction):
            for variant in self.variants:
                found[variant].append(self._best(asked, score_QE, variant))
        cap = _KEPT * self.settings.per_relation
        columns: dict[str, NDArray[Any]] = {}
        for variant, parts in found.items():
            both = join(parts)
            kept = self._likeliest(both, unit.relation, direction, cap)
            columns |= {f"{variant}.{name}": column for name, column in both.take(kept)._asdict().items()}
        return columns

    def _best(self, asked: Asked, score_QE: Floats, variant: str) -> Found:
        k = min(ANSWERS, score_QE.shape[1])
        id_Qk, score_Qk = np.empty((len(score_QE), k), np.int64), np.empty((len(score_QE), k), np.float32)
        # One question after another: positions of all of them at once would be twice as large as the scores.
        for q, ids in enumerate(self.left_out(asked, variant)):
            score_E = score_QE[q].copy()
            score_E[ids] = -np.inf
            id_Qk[q] = np.argpartition(score_E, len(score_E) - k)[len(score_E) - k :]
            score_Qk[q] = score_E[id_Qk[q]]
        order_Qk = np.lexsort((id_Qk, -score_Qk), axis=1)
        id_Qk, score_Qk = (np.take_along_axis(column, order_Qk, 1) for column in (id_Qk, score_Qk))
        other_Qk = np.repeat(score_Qk[:, :1], k, axis=1)
        other_Qk[:, 0] = score_Qk[:, 1] if k > 1 else -np.inf
        gap_Qk = gap_to(score_Qk, other_Qk).astype(np.float32)
        query, column = np.nonzero(np.isfinite(score_Qk))
        number = len(query)
        return Found(
            asked.source[query],
            id_Qk[query, column].astype(np.int64),
            score_Qk[query, column],
            (1 + column).astype(np.float32),
            gap_Qk[query, column],
            self._is_open(asked, variant)[query],
            np.full(number, np.nan, np.float32),
            np.full(number, np.nan, np.float32),
            np.full(number, np.nan, np.float32),
            np.zeros(number, bool),
        )

    def _likeliest(self, found: Found, relation: int, direction: int, count: int) -> Integers:
        """Which candidates are the likeliest by the first question alone, in their order."""
        if len(found.source) <= count:
            return np.arange(len(found.source))
        chance = self._chance(Standing(found.score_a, found.rank_a, found.gap_a), relation, direction)
        return np.sort(np.argsort(-chance, kind="stable")[:count])

    def _look_up(self, unit: Unit) -> dict[str, NDArray[Any]]:
        """Score and rank, by the other side's question, of what the first pass found for these questions."""
        direction = 1 - self.first_direction(unit.relation)
        wanted = {variant: self.first(unit.relation, variant) for variant in self.variants}
        here = self.sources(2 * unit.relation + direction)[unit.start : unit.stop]
        wanted = {variant: found.take(np.isin(found.answer, here)) for variant, found in wanted.items()}
        asked_for = np.unique(np.concatenate([found.answer for found in wanted.values()]))
        columns: dict[str, list[Found]] = {variant: [] for variant in self.variants}
        for asked, score_QE in self._scores(asked_for, unit.relation, direction):
            for variant, found in wanted.items():
                some = found.take(np.isin(found.answer, asked.source))
                columns[variant].append(self._placed(asked, score_QE, variant, some))
        out: dict[str, NDArray[Any]] = {}
        for variant, parts in columns.items():
            out |= {f"{variant}.{name}": column for name, column in join(parts)._asdict().items()}
        return out

    def _placed(self, asked: Asked, score_QE: Floats, variant: str, found: Found) -> Found:
        query = np.searchsorted(asked.source, found.answer)
        own = score_QE[query, found.source]
        rank, other = np.ones(len(own), np.float32), np.full(len(own), -np.inf, np.float32)
        order = np.argsort(query, kind="stable")
        bounds = np.searchsorted(query[order], np.arange(len(asked.source) + 1))
        for q, ids in enumerate(self.left_out(asked, variant)):
            some = order[bounds[q] : bounds[q + 1]]
            if len(some):
                ascending = np.sort(np.delete(score_QE[q], ids))
                rank[some] += len(ascending) - np.searchsorted(ascending, own[some], side="right")
                second = ascending[-2] if len(ascending) > 1 else -np.inf
                other[some] = np.where(own[some] == ascending[-1], second, ascending[-1])
        gap = gap_to(own, other).astype(np.float32)
        return found._replace(score_b=own, rank_b=rank, gap_b=gap, open_b=self._is_open(asked, variant)[query])

    def _scores(self, sources: Integers, relation: int, direction: int) -> Iterator[tuple[Asked, Floats]]:
        """Questions in blocks, and the scores (Q, E) of all entities."""
        size = max(1, _SCORES // self.bundle.num_entities)
        for start in range(0, len(sources), size):
            some = sources[start : start + size]
            asked = Asked.of(self.bundle, some, np.full(len(some), relation), np.full(len(some), direction))
            blocks = all_scores(self.bundle, asked, rotated(self.bundle, asked))
            yield asked, np.concatenate([score_Qn for _, score_Qn in blocks], axis=1)

    def left_out(self, asked: Asked, variant: str) -> list[Integers]:
        """Ids that do not compete: what counts as known, and the source of a relation that is never reflexive."""
        bundle = self.bundle
        if variant == ALL:
            tables = [bundle.known]
        else:
            tables = [bundle.known_in["train"]] + ([bundle.known_in["test"]] if variant == WITHOUT_VALID else [])
        lists = [answers_in(table, asked) for table in tables]
        reflexive = np.isin(asked.relation, bundle.manifest["reflexive"])
        itself = [[] if own else [source] for own, source in zip(reflexive, asked.source, strict=True)]
        parts = zip(*lists, itself, strict=True)
        return [np.unique(np.concatenate([np.asarray(part, np.int64) for part in ids])) for ids in parts]

    def _is_open(self, asked: Asked, variant: str) -> NDArray[np.bool_]:
        """(Q,) whether a question has no known answer."""
        bundle = self.bundle
        table = bundle.known if variant == ALL else bundle.known_in["train"]
        has = np.array([len(ids) > 0 for ids in answers_in(table, asked)], bool)
        if variant == WITHOUT_VALID:
            has |= np.array([len(ids) > 0 for ids in answers_in(bundle.known_in["test"], asked)], bool)
        return ~has

    # -- results

    def first(self, relation: int, variant: str) -> Found:
        """Return the likeliest candidates that the first pass found for a relation, of all its units.

        Units are read one after another, and no more candidates are held than are kept and one unit has.
        """
        if (relation, variant) not in self._first:
            if any(other != relation for other, _ in self._first):
                self._first = {}
            cap, direction, kept = _KEPT * self.settings.per_relation, self.first_direction(relation), join([])
            for unit in self._units_of(relation, 0):
                both = join([kept, self._read(unit, variant)])
                kept = both.take(self._likeliest(both, relation, direction, cap))
            self._first[relation, variant] = kept
        return self._first[relation, variant]

    def second(self, relation: int, variant: str) -> Found:
        """Return the candidates of a relation that both passes found."""
        return join([self._read(unit, variant) for unit in self._units_of(relation, 1)])

    def _read(self, unit: Unit, variant: str) -> Found:
        with np.load(self.folder / unit.file, allow_pickle=False) as columns:
            return Found(*(columns[f"{variant}.{name}"] for name in Found._fields))

    def _chance(self, standing: Standing, relation: int, direction: int) -> NDArray[np.float64]:
        """Calibrated probability of answers among questions that miss one."""
        columns = (np.full(len(standing.score), value, np.int64) for value in (relation, direction))
        return probability(self.bundle.manifest["calibration"], standing, *columns)

    def open_chances(self, relation: int) -> NDArray[np.float64]:
        """(2, 2) chance that a question misses an answer, by direction and by whether it has no known one.

        From valid.
        """
        bundle, out = self.bundle, np.ones((2, 2))
        if WITHOUT_VALID not in self.variants:
            return out
        for direction in (0, 1):
            place = 2 * relation + direction
            sources = self.sources(place)
            columns = (sources, np.full(len(sources), relation), np.full(len(sources), direction))
            has = {name: known.spans(*columns)[1] > 0 for name, known in bundle.known_in.items()}
            none = ~(has["train"] | has["test"])
            for which in (0, 1):
                some = none == bool(which)
                out[direction, which] = (has["valid"][some].sum() + 0.5) / (some.sum() + 1.0)
        return out

    def features(self, found: Found, relation: int) -> NDArray[np.float64]:
        """(n, 5) inputs of the regression.

        Constant, and of both questions the log-odds and the log chance that it is open.
        """
        direction, opens = self.first_direction(relation), self.open_chances(relation)
        columns = [np.ones(len(found.source))]
        for side, standing, is_open in (
            (direction, Standing(found.score_a, found.rank_a, found.gap_a), found.open_a),
            (1 - direction, Standing(found.score_b, found.rank_b, found.gap_b), found.open_b),
        ):
            chance = np.clip(self._chance(standing, relation, side), 1e-9, 1 - 1e-9)
            columns += [np.log(chance / (1 - chance)), np.log(opens[side][is_open.astype(int)])]
        return np.stack(columns, axis=1)

    def fitted(self) -> tuple[NDArray[np.float64], dict[str, Any]]:
        """(5,) weights of the regression and how it was fitted."""
        if WITHOUT_VALID not in self.variants:
            return _PRIOR, {"fitted_on": None}
        x, right = [np.zeros((0, 5))], [np.zeros(0, bool)]
        for relation in self.settings.relations:
            found = self.second(relation, WITHOUT_VALID)
            x.append(self.features(found, relation))
            right.append(self.is_in(found, relation, ("valid",)))
            if sum(map(len, x)) > _FITTED:
                break
        x_n5, right_n = np.concatenate(x), np.concatenate(right)
        about = {"fitted_on": "valid", "candidates": len(right_n), "right": int(right_n.sum())}
        return fit_near(x_n5, right_n.astype(np.float64), _PRIOR, _PRECISION), about

    def facts(self, relation: int, variant: str, weights: NDArray[np.float64]) -> tuple[Found, NDArray[np.float64]]:
        """The candidates of a relation and their probabilities, likeliest first."""
        found = self.second(relation, variant)
        chance = sigmoid(self.features(found, relation) @ weights)
        order = np.lexsort((found.answer, found.source, -chance))
        return found.take(order), chance[order]

    def is_in(self, found: Found, relation: int, splits: Iterable[str]) -> NDArray[np.bool_]:
        """Which candidates are facts of some splits."""
        place = 2 * relation + self.first_direction(relation)
        out = np.zeros(len(found.source), bool)
        for split in splits:
            known = self.bundle.known_in[split]
            start, length = known.spans(found.source, np.full(len(out), place // 2), np.full(len(out), place % 2))
            for at in np.flatnonzero(length):
                targets = known.targets[start[at] : start[at] + length[at]]
                place_at = np.searchsorted(targets, found.answer[at])
                out[at] |= place_at < len(targets) and targets[place_at] == found.answer[at]
        return out


def fingerprint(bundle: Bundle, settings: Settings) -> str:
    """Return a hash of what a search depends on, so that one never continues another's."""
    files = {name: entry["sha256"] for name, entry in bundle.manifest["files"].items()}
    said = json.dumps([files, settings._replace(min_probability=0.0)._asdict()], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def run_units(search: Search, step: int, run: Callable[[list[Unit]], Iterator[Unit]] | None = None) -> None:
    """Do the units of a pass that are not done, one after another, or by `run`, which yields each that is done."""
    units = search.units(step)
    waiting = [unit for unit in units if not _is_whole(search.folder / unit.file)]
    questions = sum(unit.stop - unit.start for unit in units)
    with Progress(f"discover, pass {step + 1} of 2", questions, "questions") as progress:
        progress.add(questions - sum(unit.stop - unit.start for unit in waiting))
        for unit in run(waiting) if run is not None else _one_by_one(search, waiting):
            progress.add(unit.stop - unit.start)


def _one_by_one(search: Search, units: list[Unit]) -> Iterator[Unit]:
    for unit in units:
        search.run(unit)
        yield unit


def _is_whole(path: Path) -> bool:
    return path.is_file() and zipfile.is_zipfile(path)
