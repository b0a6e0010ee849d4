"""Entities and relations are found and shown by id, label and alias, and answers say where they are known from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from mocme_dist.data.labels import ENTITY_LABELS, RELATION_LABELS, label_writer
from mocme_dist.errors import ConfigError, DataError
from mocme_dist.serving.batch import Options, answer_file, read_candidates
from mocme_dist.serving.bundle import Bundle
from mocme_dist.serving.names import Names
from mocme_dist.serving.scorer import SPLITS, Asked, answers_in

TOWNS = [
    ("Q1", "Springfield", ["The Springs", "spring"]),
    ("Q2", "Springfield", None),
    ("Q3", "Vlorë", ["Valona", "Vlora"]),
    ("Q4", None, ["Springfield"]),
    ("Springfield", "Springfield, Ohio", None),
    ("Q6", "SHELBYVILLE", None),
    ("Q7", "Old_Vlore harbour", None),
]


def names_of(folder: Path, rows: list) -> Names:
    pyarrow.parquet.write_table(pyarrow.table({"name": [row[0] for row in rows]}), folder / "ids.parquet")
    with label_writer(folder / "labels.parquet") as writer:
        for _, label, aliases in rows:
            writer.add(label, aliases)
    return Names(folder / "ids.parquet", len(rows), "entity", folder / "labels.parquet")


@pytest.fixture
def towns(tmp_path: Path) -> Names:
    return names_of(tmp_path, TOWNS)


def test_an_id_comes_before_a_label_and_a_label_before_an_alias_and_case_decides_last(towns):
    assert towns.lookup(["Springfield", "Vlora", "Vlorë", "shelbyville", "nowhere", "SPRING"]) == {
        "Springfield": [4],  # the id, whatever else is called so
        "Vlora": [2],
        "Vlorë": [2],
        "shelbyville": [5],
        "SPRING": [0],
    }
    many = [f"nothing {number}" for number in range(20)]  # looked up together
    assert towns.lookup(["Springfield", "vlorë", "Valona", *many]) == {"Springfield": [4], "vlorë": [2], "Valona": [2]}
    assert towns.take_labels(np.array([2, 3])) == ["Vlorë", "Q4"]


def test_an_ambiguous_name_lists_what_it_may_mean(tmp_path):
    towns = names_of(tmp_path, [row for row in TOWNS if row[0] != "Springfield"])
    with pytest.raises(ConfigError, match=r"2 entities are called Springfield: 'Q1', 'Q2'; use one of these ids"):
        towns.id_of("Springfield")
    with pytest.raises(ConfigError, match=r"'Shelbyvile': not known here; did you mean 'SHELBYVILLE'"):
        towns.id_of("Shelbyvile")
    with pytest.raises(ConfigError, match=r"'harbour': not known here; did you mean 'Old_Vlore harbour'"):
        towns.id_of("harbour")  # spelt right, but a word of a longer name


def test_completion_ignores_case_and_accents_and_prefers_whole_names_then_beginnings_then_words(towns):
    weight = np.array([5, 9, 1, 2, 3, 1, 8])

    def found(prefix: str, k: int = 10) -> list[str]:
        return towns.take(np.array(towns.search(prefix, k, weight.__getitem__), np.int64))

    assert found("vlore") == ["Q3", "Q7"]
    assert found("springfield") == ["Q2", "Q1", "Springfield", "Q4"]
    assert found("spring", 2) == ["Q1", "Q2"]  # one is called so, the other has most facts
    assert found("harb") == ["Q7"] and found("zzz") == []


def test_labels_of_a_bundle_are_the_label_column_of_its_data_set(bundle):
    row = bundle.find_entity("item 05")
    assert bundle.label(row) == "label of item 05" and bundle.find_entity("LABEL of item 05") == row
    assert bundle.label(bundle.find_entity("item 46")) == "item 46"  # it has no text
    frame = bundle.predict("label of item 05", "near", k=3)
    assert set(frame["head"]) == {"item 05"} and set(frame["head_label"]) == {"label of item 05"}
    assert frame["label"].tolist() == [bundle.label(bundle.find_entity(name)) for name in frame["id"]]
    listed = bundle.search("label of item 0", 4)
    assert len(listed) == 4 and [row["facts"] for row in listed] == sorted(
        (row["facts"] for row in listed), reverse=True
    )


@pytest.fixture(scope="module")
def labelled(bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle with labels of relations."""
    folder = Path(shutil.copytree(bundle_dir, tmp_path_factory.mktemp("labelled") / "bundle"))
    manifest = json.loads((folder / "bundle.json").read_text())
    with label_writer(folder / RELATION_LABELS) as writer:
        for label in ("comes after", None, "lies near", "is part of"):
            writer.add(label, ["close to"] if label == "lies near" else None)
    return Bundle(folder, {**manifest, "files": {**manifest["files"], RELATION_LABELS: {}}})


def test_relations_have_labels_too(labelled, bundle):
    assert labelled.find_relation("Close to") == labelled.find_relation("near") == 2
    assert [labelled.relation_label(row) for row in range(4)] == ["comes after", "kind", "lies near", "is part of"]
    frame = labelled.predict("item 05", "lies near", k=2)
    assert set(frame["relation"]) == {"near"} and set(frame["relation_label"]) == {"lies near"}
    table = labelled.relation_table()
    assert [row["id"] for row in table] == ["after", "kind", "near", "part_of"]
    assert sum(row["facts"] for row in table) == len(labelled.known_in["train"].targets) // 2
    assert bundle.relation_label(2) == "near"


def test_every_known_answer_says_where_it_is_known_from(bundle):
    asked = Asked.of(bundle, [11], [2], [0])
    known = {split: answers_in(bundle.known_in[split], asked)[0].tolist() for split in SPLITS[:3]}
    answers = bundle.ask(11, 2, k=60, filter="none")
    for answer, code in zip(answers.answer.tolist(), answers.split, strict=True):
        assert [split for split, ids in known.items() if answer in ids] == ([] if code < 0 else [SPLITS[code]])
    kept = bundle.ask(11, 2, k=60, filter="train").answer.tolist()
    assert not set(kept) & {*known["train"], 11} and set(kept) >= {*known["valid"], *known["test"]}


def test_the_probability_does_not_depend_on_what_is_shown(bundle, bundle_dir):
    by_rank = {"directions": [[0.0, 0.0, -1.0]] * 2, "relations": []}  # 1 / (1 + rank among what competes)
    judged = Bundle(bundle_dir, {**bundle.manifest, "calibration": by_rank})
    shown = {
        filter: judged.predict(11, 2, k=60, filter=filter).set_index("id") for filter in ("known", "train", "none")
    }
    new = shown["known"].index
    assert shown["known"]["probability"].tolist() == pytest.approx([1 / (1 + rank) for rank in range(1, len(new) + 1)])
    for filter in ("train", "none"):
        assert shown[filter].loc[new, "probability"].tolist() == pytest.approx(shown["known"]["probability"].tolist())
    assert shown["none"].loc[new, "rank"].tolist() != shown["known"]["rank"].tolist()  # known answers are ahead of some


def test_facts_of_an_entity_are_those_of_the_graph(bundle):
    found = bundle.facts("item 05")
    row = bundle.find_entity("item 05")
    assert len(found) == bundle.num_facts(np.array([row]))[0] > 0
    for fact in found:
        direction = int(fact["direction"] == "head")
        asked = Asked.of(bundle, [row], [bundle.find_relation(fact["relation"])], [direction])
        assert fact["row"] in answers_in(bundle.known_in[fact["known"]], asked)[0]


def test_candidates_and_the_range_of_a_relation_bound_the_answers_and_keep_their_scores(bundle):
    whole = bundle.ask(11, 2, k=60)
    few = whole.answer[[3, 9, 20, 30]].tolist()
    some = bundle.ask(11, 2, k=60, candidates=few)
    assert some.answer.tolist() == few and some.rank.tolist() == [1, 2, 3, 4]
    place = [whole.answer.tolist().index(row) for row in few]
    np.testing.assert_allclose(some.score, whole.score[place], rtol=1e-6)
    # The calibration knows the rank among all entities, so the probability is that of the whole list.
    np.testing.assert_allclose(some.probability, whole.probability[place], rtol=1e-6)
    seen = bundle.facts_of_train.answers(2 * 1)[0]
    ranged = bundle.ask(11, 1, k=60, range=True)
    assert set(ranged.answer.tolist()) <= set(seen.tolist()) and len(seen) < 60
    assert ranged.answer.tolist() == [
        row for row in bundle.ask(11, 1, k=60).answer.tolist() if row in set(seen.tolist())
    ]


def test_a_file_of_questions_may_begin_with_a_mark_and_ask_about_an_entity_called_question_mark(bundle, tmp_path):
    path = tmp_path / "questions.tsv"
    path.write_bytes("\ufefflabel of item 05\tnear\t?\r\n".encode())
    answer_file(bundle, path, tmp_path / "answers.csv", Options(3))
    lines = (tmp_path / "answers.csv").read_text().splitlines()
    assert lines[0].split(",")[:4] == ["question", "head", "head_label", "relation"]
    assert lines[1].startswith("0,item 05,label of item 05,near,near,")
    path.write_text("\\?\tnear\t?\n")
    with pytest.raises(DataError, match=r"entity '\?': not known here"):
        answer_file(bundle, path, tmp_path / "answers.csv", Options(3))
    path.write_text("\ufeffitem 01\nlabel of item 05\n\n")
    assert read_candidates(path, bundle) == ["item 01", "label of item 05"]
    path.write_text("itm 01\n")
    with pytest.raises(DataError, match=r"1 names are unknown or ambiguous: entity 'itm 01'.*did you mean 'item 01'"):
        read_candidates(path, bundle)


def test_a_bundle_has_a_card_its_metrics_and_a_short_name(bundle, bundle_dir):
    assert bundle.card == (bundle_dir / "card.md").read_text()
    for part in ("# Link prediction", "## Data", "60 entities", "## Licences", "## Metrics", "| heads |", "## Limits"):
        assert part in bundle.card
    assert bundle.metrics["split"] == "test" and f"{bundle.metrics['mrr']:.4f}" in bundle.card
    assert repr(bundle).startswith("Bundle(") and "60 entities, 4 relations, width 8" in repr(bundle)
    assert bundle.vectors(["item 05", 3]).shape == (2, 8) and bundle.vectors().shape == (60, 8)
    assert (bundle_dir / ENTITY_LABELS).is_file()
