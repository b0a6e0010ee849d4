"""Answers in words are those of the vectors; a fact's place is evaluation's; what is known is left out or marked."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_bundle import config_of

from mocme_dist import load_bundle
from mocme_dist.errors import ConfigError, DataError
from mocme_dist.evaluation.ranking import Sizes, rank_queries, split_queries
from mocme_dist.parallel.comm import communication
from mocme_dist.runs.checkpoints import Checkpoints
from mocme_dist.serving.batch import Options, answer_file, check_names, read_questions
from mocme_dist.serving.bundle import Bundle
from mocme_dist.serving.neighbours import modality_weights, neighbours
from mocme_dist.serving.predict import Question, UnseenEntity, predict
from mocme_dist.serving.scorer import Asked, answers_in, place
from mocme_dist.training.build import build_worker, open_dataset
from mocme_dist.training.loop import restore


def scores(bundle: Bundle, source: int, relation: int, direction: int) -> np.ndarray:
    """Scores of every entity by complex arithmetic."""
    z = np.concatenate(bundle.vector_parts).astype(np.float64)
    C = bundle.width // 2
    z = z[:, :C] + 1j * z[:, C:]
    turn = np.exp((1 - 2 * direction) * 1j * bundle.phase_RC[relation].astype(np.float64))
    return bundle.gamma - np.abs(z[source] * turn - z).sum(1)


@pytest.mark.parametrize("filter", ["known", "none"])
@pytest.mark.parametrize("direction", [0, 1])
def test_answers_are_the_best_by_score_in_both_directions(bundle, filter, direction):
    names = bundle.entities.column.to_pylist()
    relation = bundle.relations.column.to_pylist()[2]
    source = 11
    pair = (names[source], None) if direction == 0 else (None, names[source])
    answers = predict(bundle, [Question(pair[0], relation, pair[1])], 7, filter)
    wanted = scores(bundle, source, 2, direction)
    known = answers_in(bundle.known, Asked.of(bundle, [source], [2], [direction]))[0]
    assert len(known)
    if filter == "known":
        wanted[[*known, source]] = -np.inf
    best = np.argsort(-wanted, kind="stable")[:7]
    assert answers.answer.tolist() == best.tolist()
    np.testing.assert_allclose(answers.score, wanted[best], rtol=1e-5)
    assert answers.rank.tolist() == list(range(1, 8))
    assert (answers.split >= 0).tolist() == np.isin(best, known).tolist()
    shown = answers.columns()
    assert shown["id"] == [names[entity] for entity in best]
    assert (
        set(shown["head" if direction == 0 else "tail"]) == {names[source]}
        and shown["tail" if direction == 0 else "head"] == shown["id"]
    )


def test_the_place_of_a_fact_is_the_rank_that_evaluation_gives_it(answered_run, bundle):
    config = config_of(answered_run)
    with communication(60) as comm:
        worker = build_worker(config, open_dataset(config.data), comm)
        saved = Checkpoints(answered_run).find("auto", best=True)
        assert saved is not None
        restore(worker, saved)
        queries = split_queries(worker.dataset.triples("test")).take(slice(0, 40))
        shard = worker.encode_rows()
        ranks = rank_queries(
            queries, worker.model.relations, shard, worker.dataset.known("all"), comm, Sizes(16, 64)
        ).filtered
    found = []
    for source, relation, direction, target in zip(*queries, strict=True):
        asked = Asked.of(bundle, [source], [relation], [direction])
        found.append(place(bundle, asked, int(target), answers_in(bundle.known, asked)[0])[1])
    assert found == ranks.tolist()


def test_a_fact_with_both_sides_is_placed_among_tails_and_among_heads(bundle):
    triple = bundle.rank("item 05", "kind", "item 17")
    assert triple["direction"].tolist() == ["tail", "head"] and triple["id"].tolist() == ["item 17", "item 05"]
    assert triple["score"].tolist() == pytest.approx([triple["score"][0]] * 2, rel=1e-5)
    whole = bundle.predict("item 05", "kind", k=60)
    listed = whole[whole["id"] == "item 17"]
    if len(listed):  # it is not when the graph knows it
        assert listed["rank"].tolist() == [triple["rank"][0]]
        assert listed["probability"].tolist() == pytest.approx([triple["probability"][0]])
    assert triple["known"].notna().tolist() == [not len(listed)] * 2


def test_the_source_is_no_answer_unless_its_relation_joins_some_entity_to_itself(bundle, bundle_dir):
    assert bundle.manifest["reflexive"] == []
    assert "item 03" not in bundle.predict("item 03", "near", k=60)["id"].tolist()
    assert "item 03" in bundle.predict("item 03", "near", k=60, filter="none")["id"].tolist()
    other = Bundle(bundle_dir, {**bundle.manifest, "reflexive": [bundle.relations.id_of("near")]})
    assert "item 03" in other.predict("item 03", "near", k=60)["id"].tolist()


def test_many_questions_together_get_the_answers_of_each_alone(bundle):
    names = bundle.entities.column.to_pylist()
    questions = [Question(name, "after", None) for name in names] + [
        Question(None, "kind", name) for name in names[:30]
    ]
    together = predict(bundle, questions, 5)
    for number in (0, 17, 59, 60, 89):
        alone, here = predict(bundle, [questions[number]], 5), together.question == number
        assert together.answer[here].tolist() == alone.answer.tolist()
        assert together.score[here].tolist() == alone.score.tolist()
        assert together.probability[here].tolist() == alone.probability.tolist()
    assert together.question.tolist() == sorted(together.question.tolist())


def test_a_new_entity_is_a_source_that_nothing_is_known_of(bundle):
    vector = bundle.rows(bundle.vector_parts, np.array([9]))[0]
    alike = predict(bundle, [Question(UnseenEntity("copy", vector), "near", None)], 60)
    assert len(alike.answer) == 60 and (alike.split < 0).all() and set(alike.columns()["head"]) == {"copy"}
    wanted = scores(bundle, 9, bundle.relations.id_of("near"), 0)
    assert alike.answer.tolist() == np.argsort(-wanted, kind="stable").tolist()
    placed = predict(bundle, [Question("item 05", "near", UnseenEntity("copy", vector))])
    assert placed.direction.tolist() == [1] and placed.columns()["id"] == ["item 05"]


def test_the_api_gives_a_frame(bundle_dir):
    frame = load_bundle(bundle_dir).predict("item 20", "near", k=3)
    assert list(frame.columns) == [
        *("question", "head", "head_label", "relation", "relation_label", "tail", "tail_label"),
        *("direction", "rank", "id", "label", "score", "probability", "known"),
    ]
    assert frame["head"].tolist() == ["item 20"] * 3 and frame["tail"].tolist() == frame["id"].tolist()
    assert frame["score"].is_monotonic_decreasing and frame["probability"].is_monotonic_decreasing
    assert frame["probability"].between(0, 1).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"source": "itm 05", "relation": "near"}, r"entity 'itm 05': not known here; did you mean 'item 05'"),
        ({"source": "zzzz", "relation": "near"}, r"entity 'zzzz': not known here; none of the 60 names is like it"),
        ({"source": "item 05", "relation": "nera"}, r"relation 'nera': not known here; did you mean 'near'\?"),
        (
            {"source": "item 05", "relation": "xyz"},
            r"relation 'xyz': not known here; known are after, kind, near, part_of",
        ),
        ({"source": "item 05", "relation": ""}, r"no relation is given"),
        ({"source": ["item 05", "item 06"], "relation": ["near"]}, r"lists of different lengths 1, 2"),
        ({"source": 60, "relation": "near"}, r"entity 60: expected a row from 0 to 59"),
        ({"source": "item 05", "relation": "near", "direction": "both"}, r"direction 'both': expected tail or head"),
        ({"source": "item 05", "relation": "near", "k": 0}, r"k 0: expected 1 or more"),
        ({"source": "item 05", "relation": "near", "filter": "all"}, r"filter 'all': expected known, train, none"),
    ],
)
def test_a_question_that_cannot_be_asked_says_why(bundle, arguments, message):
    with pytest.raises(ConfigError, match=message):
        bundle.predict(**arguments)


def test_names_that_differ_in_capitals_only_are_understood(bundle):
    assert bundle.predict("ITEM 05", "Near")["id"].tolist() == bundle.predict("item 05", "near")["id"].tolist()


def test_a_file_of_questions_is_answered_whole_or_not_at_all(bundle, tmp_path):
    import pyarrow.parquet

    path = tmp_path / "questions.tsv"
    path.write_text("item 05\tnear\t?\r\n\n?\tkind\titem 07\nitem 05\tkind\titem 17\n")
    report = answer_file(bundle, path, tmp_path / "answers.parquet", Options(4))
    table = pyarrow.parquet.read_table(tmp_path / "answers.parquet").to_pandas()
    assert (report["questions"], report["answers"]) == (3, 10) and table["question"].tolist() == [0] * 4 + [1] * 4 + [
        2
    ] * 2
    assert table["id"].tolist()[:4] == bundle.predict("item 05", "near", k=4)["id"].tolist()
    assert table["id"].tolist()[4:8] == bundle.predict("item 07", "kind", "head", k=4)["id"].tolist()
    answer_file(bundle, path, tmp_path / "answers.tsv", Options(4))
    lines = (tmp_path / "answers.tsv").read_text().splitlines()
    assert len(lines) == 11 and lines[0].split("\t") == list(table.columns)
    answer_file(bundle, path, tmp_path / "answers.jsonl", Options(4))
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 10


@pytest.mark.parametrize(
    "content, message",
    [
        ("item 05\tnear\n", r"questions.tsv:1: expected 3 tab-separated fields .*, got 2"),
        ("item 05\tnear\t?\n?\tnear\t?\n", r"questions.tsv:2: a question needs a relation, and a head or a tail"),
        ("\n", r"holds no question"),
        (
            "item 05\tnear\t?\nitem 5\tnera\t?\n",
            (
                r"2 names are unknown or ambiguous: relation 'nera'.*did you mean 'near'\?; entity 'item 5'.*did you"
                r" mean 'item 05'"
            ),
        ),
    ],
)
def test_a_bad_file_of_questions_is_refused_before_anything_is_computed(bundle, tmp_path, content, message):
    path = tmp_path / "questions.tsv"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        check_names(bundle, read_questions(path), path)
    with pytest.raises(DataError):
        answer_file(bundle, path, tmp_path / "out.parquet", Options(4))
    with pytest.raises(ConfigError, match=r"ends in \.parquet, \.csv, \.tsv, \.jsonl"):
        answer_file(bundle, path, tmp_path / "out.xlsx", Options(4))
    assert [path.name for path in tmp_path.iterdir()] == ["questions.tsv"]


def test_an_explanation_tells_weights_and_neighbours_by_each_modality(bundle):
    every = np.concatenate(bundle.weight_parts)
    full = int(np.flatnonzero((every > 0).all(1))[0])
    weights = modality_weights(bundle, full)
    assert list(weights) == bundle.modalities and sum(weights.values()) == pytest.approx(1, abs=1e-5)
    near = neighbours(bundle, full, 4)
    views = np.concatenate(bundle.view_parts, axis=1).astype(np.float64)
    for m, name in enumerate(bundle.modalities):
        length = np.linalg.norm(views[m], axis=1)
        cosine = np.where(length > 0, views[m] @ views[m, full] / np.maximum(length * length[full], 1e-9), -np.inf)
        cosine[full] = -np.inf
        found = [other["row"] for other in near[name]]
        assert cosine[found] == pytest.approx(np.sort(cosine)[::-1][:4], abs=1e-6)
        assert [other["cosine"] for other in near[name]] == pytest.approx(cosine[found].tolist(), abs=1e-5)
    bare = bundle.entities.id_of("item 00")
    assert modality_weights(bundle, bare) == {"structure": pytest.approx(1)} and list(neighbours(bundle, bare)) == [
        "structure"
    ]


def test_answers_never_replace_what_is_read(bundle, tmp_path):
    questions, link, hard = tmp_path / "questions.tsv", tmp_path / "link.tsv", tmp_path / "hard.tsv"
    questions.write_text("item 05\tnear\t?\n")
    link.symlink_to(questions)
    hard.hardlink_to(questions)
    for output in (questions, link, hard):
        with pytest.raises(ConfigError, match="is the file of --queries itself"):
            answer_file(bundle, questions, output, Options(4))
    for output in (bundle.directory / "entities.parquet", bundle.directory / "new.tsv"):
        with pytest.raises(ConfigError, match="lies inside the bundle"):
            answer_file(bundle, questions, output, Options(4))
    assert questions.read_text() == "item 05\tnear\t?\n" and not (bundle.directory / "new.tsv").exists()


def test_answers_are_written_through_a_link(bundle, tmp_path):
    questions, target, link = tmp_path / "questions.tsv", tmp_path / "far" / "answers.tsv", tmp_path / "answers.tsv"
    questions.write_text("item 05\tnear\t?\n")
    link.symlink_to(target)
    for _ in range(2):  # at first it leads to nothing
        answer_file(bundle, questions, link, Options(4))
        assert link.is_symlink() and len(target.read_text().splitlines()) == 5
        target.write_text("old")
