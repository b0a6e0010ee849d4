"""An exported bundle as the Python API of answers.

Everything runs without torch, except what encodes an unseen entity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mocme_dist.errors import ConfigError, DataError
from mocme_dist.serving.bundle_format import CARD
from mocme_dist.serving.mapped_bundle import MappedBundle
from mocme_dist.serving.names import Names

if TYPE_CHECKING:
    import pandas

    from mocme_dist.serving.predict import Answers, UnseenEntity
    from mocme_dist.serving.unseen import UnseenEntityEncoder

_AGAIN = "export again"
Integers = NDArray[np.int64]


class Bundle(MappedBundle):
    """Vectors, relations, names and known facts of a trained graph.

    An entity or a relation has a row (its number), an id (its name in the raw files) and a label. Where a method takes
    an entity or a relation, it accepts a row, an id, a label or an alias; see `find_entity`. Arrays and sizes are
    attributes of `MappedBundle`.
    """

    def __repr__(self) -> str:
        sizes = f"{self.num_entities:,} entities, {self.num_relations:,} relations, width {self.width}"
        answers = "model and evidence" if self.evidence is not None else "model"
        return f"Bundle({str(self.directory)!r}: {sizes}; {', '.join(self.modalities)}; answers by {answers})"

    def label(self, entity: int) -> str:
        """Return the label of an entity's row; its id where it has no label."""
        return self.entities.take_labels(np.array([entity]))[0]

    def relation_label(self, relation: int) -> str:
        """Return the label of a relation's row; its id where it has no label."""
        return self.relations.take_labels(np.array([relation]))[0]

    def find_entity(self, text: str | int) -> int:
        """Return the row of an entity: by id, then label, then alias, then the same without regard to case.

        Raises:
            ConfigError: the text means no entity, and the message has suggestions; or several, and the message lists
            them.
        """
        return _row(self.entities, text)

    def find_relation(self, text: str | int) -> int:
        """Return the row of a relation; see `find_entity`."""
        return _row(self.relations, text)

    def search(self, prefix: str, k: int = 10) -> list[dict[str, Any]]:
        """Return entities whose id, label or alias begins with `prefix`, or has a word that does; for completion.

        Returns:
            Dictionaries with row, id, label and facts (number of known facts): whole names first, then those that begin
            with the prefix, then the others; the entities with most facts first within each group.
        """
        rows = np.array(self.entities.search(prefix, k, self.num_facts), np.int64)
        columns = (
            rows.tolist(),
            self.entities.take(rows),
            self.entities.take_labels(rows),
            self.num_facts(rows).tolist(),
        )
        return [
            dict(zip(("row", "id", "label", "facts"), values, strict=True)) for values in zip(*columns, strict=True)
        ]

    def num_facts(self, entities: Integers) -> Integers:
        """Return how many known facts each entity is part of."""
        per_entity = 2 * self.num_relations
        low, high = (np.searchsorted(self.known.keys, (entities + more) * per_entity) for more in (0, 1))
        return np.asarray(self.known.offsets[high] - self.known.offsets[low])

    def relation_table(self) -> list[dict[str, Any]]:
        """Return a dictionary per relation.

        Row, id, label, facts in train, and the distinct heads and tails of these.
        """
        rows = np.arange(self.num_relations)
        found = []
        for row, name, label in zip(
            rows.tolist(), self.relations.take(rows), self.relations.take_labels(rows), strict=True
        ):
            tails, counts = self.facts_of_train.answers(2 * row)
            heads = len(self.facts_of_train.sources(2 * row))
            facts = int(counts.sum())
            found.append({"row": row, "id": name, "label": label, "facts": facts, "heads": heads, "tails": len(tails)})
        return found

    def ask(
        self,
        source: str | int | UnseenEntity | Sequence[str | int | UnseenEntity],
        relation: str | int | Sequence[str | int],
        direction: str | Sequence[str] = "tail",
        k: int = 10,
        filter: str = "known",
        candidates: Sequence[str | int] | None = None,
        range: bool = False,
    ) -> Answers:
        """Answer one question or many as arrays; see `predict`. The result has `columns()`, `rows()` and `frame()`."""
        from mocme_dist.serving.predict import Question, predict

        questions = []
        for one, of, side in _questions(source, relation, direction):
            if side not in ("tail", "head"):
                raise ConfigError(f"direction {side!r}: expected tail or head")
            given = self.entities.id_at(one) if isinstance(one, int) else one
            name = self.relations.id_at(of) if isinstance(of, int) else of
            questions.append(Question(given, name, None) if side == "tail" else Question(None, name, given))
        listed = (
            None
            if candidates is None
            else [self.entities.id_at(one) if isinstance(one, int) else one for one in candidates]
        )
        return predict(self, questions, k, filter, listed, range)

    def predict(
        self,
        source: str | int | Sequence[str | int],
        relation: str | int | Sequence[str | int],
        direction: str | Sequence[str] = "tail",
        k: int = 10,
        filter: str = "known",
        candidates: Sequence[str | int] | None = None,
        range: bool = False,
    ) -> pandas.DataFrame:
        """Return the best answers to one question, or to many.

        Args:
            source: an entity or a list of them. A list may come with one relation and direction, or with as many.
            relation: a relation, or a list.
            direction: "tail" asks for tails of a head, "head" for heads of a tail.
            k: number of answers per question.
            filter: "known" leaves out what any split knows, "train" what train knows, "none" nothing.
            candidates: entities that may be answers; None allows all.
            range: only entities that train has on this side of the relation may be answers.

        Returns:
            One row per answer: question, head, head_label, relation, relation_label, tail, tail_label, direction, rank,
            id, label, score, probability, known. The id and the label are those of the answer; known is "train",
            "valid", "test", "other" (in the raw files, but in no split) or None. The probability is that of an answer
            that is not known.

        Raises:
            ConfigError: a name is unknown or ambiguous, or an argument is out of range.
        """
        return self.ask(source, relation, direction, k, filter, candidates, range).frame()

    def rank(self, head: str | int, relation: str | int, tail: str | int, filter: str = "known") -> pandas.DataFrame:
        """Return the rank of one fact among all tails and among all heads, in the columns of `predict`."""
        from mocme_dist.serving.predict import Question, predict

        names = [self.entities.take(np.array([self.find_entity(one)]))[0] for one in (head, tail)]
        question = Question(names[0], self.relations.id_at(self.find_relation(relation)), names[1])
        return predict(self, [question], filter=filter).frame()

    def predict_new(
        self,
        description: str | Mapping[str, Any],
        relation: str | int,
        direction: str = "tail",
        k: int = 10,
        filter: str = "known",
        candidates: Sequence[str | int] | None = None,
        range: bool = True,
        trust_encoders: bool = False,
    ) -> pandas.DataFrame:
        """Return the best answers for an entity that is not in the graph, from its text, numbers and files.

        Args:
            description: "name=Atlantis,text=an island,population=12000", or a mapping of the same keys; see
                `serving.unseen.parse_description`.
            relation, direction, k, filter, candidates: as of `predict`.
            range: as of `predict`; on by default, because of an unseen entity little is known.
            trust_encoders: whether an encoder that the bundle names as `module:function` may be imported.

        Raises:
            ConfigError: a key or a name is unknown, or nothing of the description can be encoded.
        """
        entity = self.unseen_encoder(trust_encoders).entity(description)
        return self.ask(entity, relation, direction, k, filter, candidates, range).frame()

    def unseen_encoder(self, trust_encoders: bool = False) -> UnseenEntityEncoder:
        """Return the encoders for unseen entities, which are loaded once; needs torch."""
        from mocme_dist.serving.unseen import UnseenEntityEncoder

        if self._encoder is None:
            self._encoder = UnseenEntityEncoder(self, trust_encoders)
        return self._encoder

    _encoder: UnseenEntityEncoder | None = None

    def neighbours(
        self, entity: str | int, modality: str | None = None, k: int = 10
    ) -> dict[str, list[dict[str, Any]]]:
        """Return the entities most like `entity` by each modality's own vector, or by one modality, by cosine.

        Returns:
            By modality, dictionaries with row, id, label and cosine; modalities that the entity lacks are left out, and
            with one modality only there is no vector of its own.
        """
        from mocme_dist.serving.neighbours import neighbours

        if modality is not None and modality not in self.modalities:
            raise ConfigError(f"modality {modality!r}: this bundle has {', '.join(self.modalities)}")
        return neighbours(self, self.find_entity(entity), k, modality)

    def explain(
        self, source: str | int | UnseenEntity, relation: str | int, answer: str | int, direction: str = "tail"
    ) -> dict[str, Any]:
        """Return the reasons for one answer: terms, votes, ranks without a modality, influence.

        See `serving.reasons.explain`.
        """
        from mocme_dist.serving.reasons import explain

        if direction not in ("tail", "head"):
            raise ConfigError(f"direction {direction!r}: expected tail or head")
        row, unseen = (self.find_entity(source), None) if isinstance(source, str | int | np.integer) else (-1, source)
        side = int(direction == "head")
        return explain(self, row, self.find_relation(relation), side, self.find_entity(answer), unseen)

    def discover(
        self, relation: str | int | None = None, min_probability: float = 0.5, per_relation: int = 1000
    ) -> pandas.DataFrame:
        """Return the likeliest facts of one relation or of all that are not known.

        The columns are those of `mocme discover`.
        """
        from mocme_dist.serving.discovered import frame

        relations = range(self.num_relations) if relation is None else [self.find_relation(relation)]
        return frame(self, relations, min_probability, per_relation)

    def vectors(self, entities: Sequence[str | int] | None = None) -> NDArray[np.float32]:
        """Return (n, D) fused vectors of some entities, or of all in the order of their rows."""
        if entities is None:
            return np.concatenate([np.asarray(part, np.float32) for part in self.vector_parts])
        return self.rows(self.vector_parts, np.array([self.find_entity(entity) for entity in entities], np.int64))

    def facts(self, entity: str | int) -> list[dict[str, Any]]:
        """Return the known facts of an entity.

        Returns:
            Dictionaries with direction ("tail": the entity is the head), relation and relation_label, and row, id,
            label and known of the other entity.
        """
        from mocme_dist.serving.predict import facts

        return facts(self, self.find_entity(entity))

    @property
    def metrics(self) -> dict[str, Any]:
        """Test metrics of the run at this checkpoint, as `train` reports them; empty if there are none."""
        return dict(self.manifest.get("metrics") or {})

    @property
    def card(self) -> str:
        """Card of the bundle in Markdown: what it is, data, licences, metrics with their protocol, limits."""
        path = self.directory / CARD
        try:
            return path.read_text(encoding="utf8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path.absolute()}: cannot be read ({error}); {_AGAIN}") from None


def _row(names: Names, text: str | int) -> int:
    if not isinstance(text, int | np.integer):
        return names.id_of(text)
    names.id_at(int(text))
    return int(text)


def _questions(source: Any, relation: Any, direction: Any) -> list[tuple[Any, Any, str]]:
    """Return (source, relation, direction) of each question; what is not a list holds for all of them."""
    from mocme_dist.serving.predict import UnseenEntity

    given = [
        value if isinstance(value, Sequence) and not isinstance(value, str | UnseenEntity) else None
        for value in (source, relation, direction)
    ]
    lengths = {len(value) for value in given if value is not None}
    if len(lengths) > 1:
        raise ConfigError(
            "source, relation and direction: lists of different lengths " + ", ".join(map(str, sorted(lengths)))
        )
    count = lengths.pop() if lengths else 1
    columns = [
        list(values) if values is not None else [value] * count
        for values, value in zip(given, (source, relation, direction), strict=True)
    ]
    return list(zip(*columns, strict=True))
