"""What the service says about a bundle, as JSON: entities with their facts, relations, ranked answers and reasons.

One object per bundle and process. Methods are called from threads; whatever they share is read only or guarded here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple
from urllib.parse import urlencode

import numpy as np
from numpy.typing import NDArray

from mocme_dist.errors import ConfigError
from mocme_dist.kernels.scan import nearest
from mocme_dist.serving.bundle import Bundle
from mocme_dist.serving.neighbours import modality_weights, neighbours
from mocme_dist.serving.predict import Answers, Question, UnseenEntity, predict
from mocme_dist.serving.scorer import SPLITS, Asked, splits_of
from mocme_dist.serving.service_media import Media, coordinates, has_coordinates

DIRECTIONS = ("tail", "head")
MAX_FACTS = 50  # answers of one relation that an entity's page lists
MAX_RELATIONS = 200
_ALIKE = 12
_FEATURED = 200
_LARGE = 300_000  # entities; beyond it, likeness by modality is not computed unless asked for


class AskedAs(NamedTuple):
    """How a question is asked.

    Number of answers, filter, whether only the range of the relation competes, and candidates.
    """

    top: int
    filter: str = "known"
    range: bool = False
    candidates: tuple[str, ...] | None = None


class ServedBundle:
    """A bundle under a name, with the media of its data set where there is one."""

    def __init__(self, name: str, bundle: Bundle, media: Media | None = None) -> None:
        self.name, self.bundle, self.media = name, bundle, media

    def about(self) -> dict[str, Any]:
        """Return sizes, modalities and what a page can show."""
        bundle = self.bundle
        return {
            "name": self.name,
            "entities": bundle.num_entities,
            "relations": bundle.num_relations,
            "facts": len(bundle.known.targets) // 2,
            "modalities": bundle.modalities,
            "media": self.media is not None,
            "map": self._has_map(),
            "encodes": [name for name in bundle.modalities if name != "structure"],
        }

    def _has_map(self) -> bool:
        """Return whether entities may have coordinates; imported numbers have no names, so they are looked at."""
        if self.media is None or "numeric" not in self.media.dataset.modalities:
            return False
        statistics = self.bundle.manifest.get("features", {}).get("numeric", {}).get("statistics")
        if not statistics:
            return bool(self.media.points())
        return has_coordinates(attribute["name"] for attribute in statistics["attributes"])

    # -- names

    def entity_id(self, name: str) -> int:
        """Return the number of an entity given by id, label or alias.

        Raises:
            ConfigError: there is none, or several have the label.
        """
        return self.bundle.find_entity(name)

    def entity_names(self, names: Sequence[str]) -> list[str]:
        """Return the ids of entities given by id, label or alias."""
        return self.bundle.entities.take(np.array([self.entity_id(name) for name in names], np.int64))

    def relation_id(self, name: str) -> int:
        """Return the number of a relation given by id or label.

        Raises:
            ConfigError: there is none.
        """
        return self.bundle.find_relation(name)

    def entity(self, entity: int) -> dict[str, Any]:
        """Return id, label and thumbnail of an entity."""
        return self.entities([entity])[0]

    def entities(self, ids: Iterable[int]) -> list[dict[str, Any]]:
        """Return id, label and thumbnail of some entities."""
        numbers = np.asarray(list(ids), np.int64)
        if not len(numbers):
            return []
        columns = (numbers.tolist(), self.bundle.entities.take(numbers), self.bundle.entities.take_labels(numbers))
        return [
            {"id": name, "label": label, "thumbnail": self._thumbnail(number, name)}
            for number, name, label in zip(*columns, strict=True)
        ]

    def relation(self, relation: int) -> dict[str, str]:
        """Return id and label of a relation."""
        return {"id": self.bundle.relations.id_at(relation), "label": self.bundle.relation_label(relation)}

    def _thumbnail(self, entity: int, name: str) -> str | None:
        if self.media is None:
            return None
        number = next((file["number"] for file in self.media.files(entity) if file["modality"] == "image"), None)
        if number is None:
            return None
        return f"thumbnail/{number}?" + urlencode({"entity": name, "side": 128, "bundle": self.name})

    def search(self, text: str, count: int) -> list[dict[str, Any]]:
        """Return entities whose id, label or alias begins with `text` or has a word that does; else similar ones."""
        wanted = text.strip()
        if not wanted:
            return []
        rows = [one["row"] for one in self.bundle.search(wanted, count)]
        if not rows:
            similar = self.bundle.entities.suggest(wanted, count)
            rows = [row for found in self.bundle.entities.lookup(similar).values() for row in found]
        return self.entities(list(dict.fromkeys(rows))[:count])

    @cached_property
    def _featured(self) -> list[int]:
        """The entities with most known facts, those with a picture first."""
        width, counts = 2 * self.bundle.num_relations, np.zeros(self.bundle.num_entities, np.int64)
        np.add.at(counts, np.asarray(self.bundle.known.keys) // width, np.diff(self.bundle.known.offsets))
        most = np.argsort(-counts, kind="stable")[:_FEATURED].tolist()
        if self.media is None:
            return most
        return sorted(most, key=lambda entity: not self._has_picture(entity))

    def featured(self, count: int) -> list[dict[str, Any]]:
        """Return entities to begin with."""
        return self.entities(self._featured[:count])

    def _has_picture(self, entity: int) -> bool:
        return self.media is not None and any(file["modality"] == "image" for file in self.media.files(entity))

    # -- facts

    def describe(self, entity: int) -> dict[str, Any]:
        """Return everything about an entity but its likeness to others."""
        about = {**self.entity(entity), "bundle": self.name, "weights": modality_weights(self.bundle, entity)}
        about["facts"] = self.facts(entity)
        about["texts"], about["numbers"], about["media"], about["coordinates"] = {}, {}, [], None
        if self.media is not None:
            about["texts"] = self.media.texts(entity)
            about["numbers"] = self.media.numbers(entity)
            about["coordinates"] = coordinates(about["numbers"])
            for file in self.media.files(entity):
                query = urlencode({"entity": about["id"], "bundle": self.name})
                about["media"].append({**file, "url": f"media/{file['modality']}/{file['number']}?{query}"})
        return about

    def _pairs(self, entity: int) -> NDArray[np.int64]:
        """Return (n,) places 2 * relation + direction at which an entity has known facts."""
        known, width = self.bundle.known, 2 * self.bundle.num_relations
        low, high = np.searchsorted(known.keys, [entity * width, (entity + 1) * width])
        return np.asarray(known.keys[low:high]) - entity * width

    def facts(self, entity: int) -> list[dict[str, Any]]:
        """Return known facts of an entity by relation and direction, those with few answers first."""
        groups = []
        for place in self._pairs(entity).tolist():
            relation, direction = divmod(place, 2)
            _, targets = self.bundle.known.lookup([entity], [relation], [direction])
            groups.append(
                {
                    "relation": self.relation(relation),
                    "direction": DIRECTIONS[direction],
                    "count": len(targets),
                    "entities": self._marked(entity, relation, direction, targets[:MAX_FACTS]),
                }
            )
        return sorted(groups, key=lambda group: (group["direction"] == "head", group["count"] > 10))

    def _marked(self, entity: int, relation: int, direction: int, targets: NDArray[np.int64]) -> list[dict[str, Any]]:
        marks = self.marks(entity, relation, direction, targets)
        return [{**about, "known": mark} for about, mark in zip(self.entities(targets.tolist()), marks, strict=True)]

    def marks(self, entity: int, relation: int, direction: int, targets: NDArray[np.int64]) -> list[str | None]:
        """Return for each target the split that has the fact: train, valid, test, other, or None."""
        question = Asked.of(self.bundle, np.array([entity]), np.array([relation]), np.array([direction]))
        codes = splits_of(self.bundle, question, np.asarray(targets, np.int64)[None])[0]
        return [SPLITS[code] if code >= 0 else None for code in codes.tolist()]

    # -- relations

    @cached_property
    def _frequency(self) -> NDArray[np.int64]:
        """(2 R,) sources that have known facts, by 2 * relation + direction."""
        places = np.asarray(self.bundle.known.keys) % (2 * self.bundle.num_relations)
        return np.bincount(places, minlength=2 * self.bundle.num_relations)

    @cached_property
    def _relations(self) -> list[dict[str, str]]:
        return [self.relation(relation) for relation in range(self.bundle.num_relations)]

    def relations(self, entity: int | None = None) -> list[dict[str, Any]]:
        """Return relations with directions: for an entity those that make sense first.

        Those come first of which the entity has facts, then those of entities like it, then the others by frequency.
        """
        if entity is None:
            return self._ordered(np.zeros(0, np.int64), [])
        alike: list[int] = []
        if self.bundle.num_entities <= _LARGE:
            for others in neighbours(self.bundle, entity, _ALIKE).values():
                alike += [other["row"] for other in others]
        return self._ordered(self._pairs(entity), alike)

    def _ordered(self, own: NDArray[np.int64], alike: Sequence[int]) -> list[dict[str, Any]]:
        votes = np.zeros(2 * self.bundle.num_relations, np.int64)
        for other in alike:
            votes[self._pairs(other)] += 1
        has = np.zeros(len(votes), bool)
        has[own] = True
        likely = votes * 4 >= max(1, len(alike))
        order = np.lexsort((np.arange(len(votes)), -self._frequency, -votes, ~(has | likely)))
        return [
            {
                "relation": self._relations[place // 2],
                "direction": DIRECTIONS[place % 2],
                "sources": int(self._frequency[place]),
                "has": bool(has[place]),
                "sensible": bool(has[place] or likely[place]),
            }
            for place in order[:MAX_RELATIONS].tolist()
            if self._frequency[place]
        ]

    # -- answers

    def answer(self, asked_as: AskedAs, questions: Sequence[Question]) -> list[list[dict[str, Any]]]:
        """Return the ranked answers of each of several questions.

        With the filter "none" known answers compete; the source does so only where its relation joins some entity to
        itself.

        Args:
            asked_as: how all of them are asked.
            questions: by ids that exist.
        """
        top, known, range_, candidates = asked_as
        marks = known == "none"
        found = predict(self.bundle, questions, top + marks, known, candidates, range_)
        rows = self._split(found, len(questions))
        if not marks:
            return rows
        return [self._without_source(own, question)[:top] for own, question in zip(rows, questions, strict=True)]

    def _without_source(self, rows: list[dict[str, Any]], question: Question) -> list[dict[str, Any]]:
        if question.head is not None and question.tail is not None:
            return rows
        source = question.head if question.head is not None else question.tail
        if self.bundle.find_relation(question.relation) in self.bundle.manifest["reflexive"]:
            return rows
        kept = [row for row in rows if row["id"] != source]
        return [{**row, "rank": float(place)} for place, row in enumerate(kept, 1)]

    def _split(self, answers: Answers, count: int) -> list[list[dict[str, Any]]]:
        rows: list[list[dict[str, Any]]] = [[] for _ in range(count)]
        about = self.entities(answers.answer.tolist())
        for at, question in enumerate(answers.question.tolist()):
            rows[question].append(
                {
                    "rank": float(answers.rank[at]),
                    **about[at],
                    "direction": DIRECTIONS[int(answers.direction[at])],
                    "score": round(float(answers.score[at]), 6),
                    "probability": _finite(answers.probability[at]),
                    "known": SPLITS[answers.split[at]] if answers.split[at] >= 0 else None,
                }
            )
        return rows

    def alike(self, entity: int, count: int = 6) -> dict[str, list[dict[str, Any]]]:
        """Return the entities that each modality alone finds most like an entity, with cosines."""
        found = {}
        for modality, others in neighbours(self.bundle, entity, count).items():
            about = self.entities(other["row"] for other in others)
            found[modality] = [
                {**one, "cosine": round(other["cosine"], 4)} for one, other in zip(about, others, strict=True)
            ]
        return found

    def explain(self, source: int, relation: int, direction: int, answer: int) -> dict[str, Any]:
        """Return the reasons for one answer: those of `Bundle.explain`, weights, and what each modality finds alike."""
        found = self.bundle.explain(source, relation, answer, DIRECTIONS[direction])
        for voters in (*found.get("votes", []), *found.get("likeness", [])):
            rows = self.bundle.entities.find([fact["id"] for fact in voters["facts"]])
            about = self.entities(rows[fact["id"]] for fact in voters["facts"])
            voters["facts"] = [{**fact, **one} for fact, one in zip(voters["facts"], about, strict=True)]
        weights = {"source": modality_weights(self.bundle, source), "answer": modality_weights(self.bundle, answer)}
        return {
            "source": self.entity(source),
            "relation": self.relation(relation),
            "direction": DIRECTIONS[direction],
            "answer": self.entity(answer),
            **found,
            "weights": weights,
            "alike": self.alike(source, 4) if self.bundle.num_entities <= _LARGE else {},
        }

    def near(self, vector_D: NDArray[np.float32], count: int = 8) -> tuple[list[dict[str, Any]], list[int]]:
        """Return the entities whose fused vectors are nearest to a new one's, and their numbers."""
        found = nearest(self.bundle.vector_parts, np.asarray(vector_D, np.float32)[None], count)
        ids = [number for number in found.id_Qk[0].tolist() if number >= 0]
        return self.entities(ids), ids

    def new(
        self, unseen: UnseenEntity, relation: str | None, side: str, top: int
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the answers about a new entity, the entities nearest to it, and the relations that make sense."""
        close, ids = self.near(unseen.vector_D)
        relations = self._ordered(np.zeros(0, np.int64), ids)
        if relation is None:
            return [], close, relations
        question = Question(unseen, relation, None) if side == "head" else Question(None, relation, unseen)
        [answers] = self.answer(AskedAs(top, "known", range=True), [question])
        return answers, close, relations

    def points(self) -> list[dict[str, Any]]:
        """Return the entities that have coordinates: id, label, latitude, longitude."""
        if self.media is None:
            return []
        points = self.media.points()
        rows = np.array([entity for entity, _, _ in points], np.int64)
        names = zip(self.bundle.entities.take(rows), self.bundle.entities.take_labels(rows), strict=True)
        return [
            {"id": name, "label": label, "latitude": latitude, "longitude": longitude}
            for (name, label), (_, latitude, longitude) in zip(names, points, strict=True)
        ]

    def run(self) -> dict[str, Any]:
        """Return what the bundle carries about its training: metrics, calibration, weights of the modalities."""
        manifest, metrics = self.bundle.manifest, self.bundle.metrics
        by_relation = metrics.pop("by_relation", {})
        names = dict(
            zip(self.bundle.relations.take(np.arange(self.bundle.num_relations)), self._relations, strict=True)
        )
        relations = [{**names[name], **row} for name, row in by_relation.items() if name in names]
        ways = {"blend": metrics, "model alone": metrics.get("model"), **metrics.pop("baselines", {})}
        calibration = manifest.get("calibration") or {}
        return {
            "bundle": self.about(),
            "version": manifest.get("mocme_dist"),
            "trained": manifest.get("trained", {}),
            "metrics": {name: value for name, value in metrics.items() if isinstance(value, int | float | str)},
            "relations": sorted(relations, key=lambda row: -row.get("num_queries", 0)),
            "baselines": [{"name": name, "mrr": way["mrr"]} for name, way in ways.items() if way and "mrr" in way],
            "reliability": calibration.get("reliability"),
            "leakage": manifest.get("leakage", {}),
            "curves": manifest.get("curves", {}),
            "modality_weights": manifest.get("modality_weights", {}),
            "card": self.bundle.card,
        }


def names_of(bundles: Sequence[str]) -> dict[str, str]:
    """Return place by name of bundles given as PLACE or NAME=PLACE; the name is the folder's by default.

    Raises:
        ConfigError: two bundles have one name, or a name is empty.
    """
    found: dict[str, str] = {}
    for given in bundles:
        name, equals, place = given.partition("=")
        if not equals or "/" in name:
            place = given
            name = given.rstrip("/").rpartition("/")[2]
        if not name or not place:
            raise ConfigError(f"{given!r}: expected BUNDLE_DIR or NAME=BUNDLE_DIR")
        if name in found:
            raise ConfigError(f"two bundles are called {name!r}; give one a name of its own: NAME={place}")
        found[name] = place
    return found


def _finite(value: float) -> float | None:
    return round(float(value), 6) if math.isfinite(value) else None
