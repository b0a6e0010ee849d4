"""Facts found in the whole graph are those of a plain search, whatever is interrupted or spread.

And what the files hold.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mocme_dist import discover as command
from mocme_dist.discover import discover
from mocme_dist.errors import ConfigError
from mocme_dist.serving import discover as discover_module
from mocme_dist.serving import discovered
from mocme_dist.serving.bundle import Bundle
from mocme_dist.serving.discover import ALL, TRAIN, WITHOUT_VALID, Search, Settings, join, run_units
from mocme_dist.serving.discovered import duplicates, iri, precision, write_rows
from mocme_dist.serving.plausible import PlausibleSources
from mocme_dist.serving.scorer import Asked, best_answers, place

EVERYTHING = Settings((0, 1, 2, 3), per_relation=40, min_probability=0.0)
SMALL = EVERYTHING._replace(per_unit=16)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf8", newline="") as file:
        return list(csv.DictReader(file))


def searched(bundle: Bundle, folder: Path, settings: Settings = EVERYTHING) -> Search:
    folder.mkdir()
    search = Search(bundle, settings, folder)
    for step in (0, 1):
        run_units(search, step)
    return search


@pytest.fixture(scope="module")
def search(blended_bundle, tmp_path_factory) -> Search:
    return searched(blended_bundle, tmp_path_factory.mktemp("search") / "units")


def test_plausible_sources_are_those_whose_places_go_together(blended_bundle):
    facts = blended_bundle.facts_of_train
    places = [set((facts.facts_of(np.array([entity]))[1]).tolist()) for entity in range(60)]
    for wanted in range(8):
        expected = []
        for entity, own in enumerate(places):
            share = [
                sum(wanted in other for other in places if at in other) / sum(at in other for other in places)
                for at in own
            ]
            if max(share, default=0) >= 0.1:
                expected.append(entity)
        assert PlausibleSources(blended_bundle).sources(wanted).tolist() == expected
        assert set(facts.sources(wanted).tolist()) <= set(expected)
        assert set(PlausibleSources(blended_bundle).sources(wanted, 7).tolist()) <= set(expected)


@pytest.mark.parametrize("variant", [ALL, WITHOUT_VALID, TRAIN])
def test_candidates_have_the_scores_and_ranks_of_both_questions(search, variant):
    bundle = search.bundle
    for relation in (0, 3):
        direction = search.first_direction(relation)
        found = search.second(relation, variant)
        assert len(found.source) > 50
        for at in range(0, len(found.source), 37):
            source, answer = int(found.source[at]), int(found.answer[at])
            for asker, other, way, score, rank in (
                (source, answer, direction, found.score_a[at], found.rank_a[at]),
                (answer, source, 1 - direction, found.score_b[at], found.rank_b[at]),
            ):
                asked = Asked.of(bundle, np.array([asker]), np.array([relation]), np.array([way]))
                left_out = search.left_out(asked, variant)[0]
                assert other not in left_out
                plain_score, plain_rank, _ = place(bundle, asked, other, left_out)
                assert (score, rank) == (pytest.approx(plain_score, abs=1e-4), pytest.approx(plain_rank, abs=1.0))


def test_known_facts_are_never_found_and_the_first_answers_of_a_question_are(search):
    bundle = search.bundle
    for relation in range(4):
        direction = search.first_direction(relation)
        found = search.first(relation, ALL)
        known = bundle.known.lookup(
            found.source, np.full(len(found.source), relation), np.full(len(found.source), direction)
        )
        assert all(found.answer[at] not in known[1][known[0][at] : known[0][at + 1]] for at in range(len(found.source)))
        source = int(found.source[0])
        asked = Asked.of(bundle, np.array([source]), np.array([relation]), np.array([direction]))
        best = best_answers(bundle, asked, search.left_out(asked, ALL), 20).id_Qk[0]
        assert found.answer[found.source == source].tolist() == best.tolist()


def test_probabilities_are_fitted_on_valid_and_expect_as_many_facts_as_there_are(search):
    weights, about = search.fitted()
    assert about["fitted_on"] == "valid" and about["right"] > 5
    said = right = 0.0
    for relation in EVERYTHING.relations:
        found, chance = search.facts(relation, WITHOUT_VALID, weights)
        assert (np.diff(chance) <= 0).all()
        said += chance.sum()
        right += search.is_in(found, relation, ("valid",)).sum()
    assert said == pytest.approx(right, rel=0.4)
    assert (weights[1:] >= 0).all()
    found = precision(search, weights, 50)
    assert found is not None and found["facts"] == 50 and 0 <= found["of_test"] <= found["held_out"] <= 50


def test_the_result_does_not_depend_on_how_much_is_held_at_once(blended_bundle, tmp_path, monkeypatch):
    search = searched(blended_bundle, tmp_path / "units", SMALL)
    weights, _ = search.fitted()
    whole = precision(search, weights, 50)
    monkeypatch.setattr(discover_module, "_KEPT", 1)
    for relation in SMALL.relations:
        search._first.clear()
        units = [unit for unit in search.units(0) if unit.relation == relation]
        every = join([search._read(unit, ALL) for unit in units])
        direction = search.first_direction(relation)
        kept = every.take(search._likeliest(every, relation, direction, SMALL.per_relation))
        assert len(units) > 1 and len(kept.source) == SMALL.per_relation < len(every.source)
        for some, wanted in zip(search.first(relation, ALL), kept, strict=True):
            assert np.array_equal(some, wanted, equal_nan=some.dtype == np.float32)
    monkeypatch.setattr(discovered, "_SOURCES", 3)
    search._sources.clear()
    assert precision(search, weights, 50) == whole


def test_an_interrupted_search_goes_on_and_writes_the_same_file(blended_bundle, tmp_path, monkeypatch):
    report = discover(blended_bundle, tmp_path / "whole.csv", SMALL)
    assert report["facts"] == 160 and report["precision"]["facts"] <= 1000
    run, done = Search.run, []

    def killed(self: Search, unit) -> None:
        if len(done) == 9:
            raise KeyboardInterrupt
        done.append(unit)
        run(self, unit)

    monkeypatch.setattr(Search, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        discover(blended_bundle, tmp_path / "twice.csv", SMALL)
    assert not (tmp_path / "twice.csv").exists()
    again = []
    monkeypatch.setattr(Search, "run", lambda self, unit: (again.append(unit), run(self, unit)))
    discover(blended_bundle, tmp_path / "twice.csv", SMALL)
    assert not set(again) & set(done) and (tmp_path / "twice.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["twice.csv", "whole.csv"]


def test_files_of_another_search_are_not_continued(blended_bundle, tmp_path):
    folder = tmp_path / "facts.csv.search"
    folder.mkdir()
    (folder / "search.json").write_text('{"search": "another"}')
    (folder / "000000-0-0000000000.npz").write_bytes(b"not an archive")
    discover(blended_bundle, tmp_path / "facts.csv", EVERYTHING)
    assert len(read(tmp_path / "facts.csv")) == 160 and not folder.exists()


def test_rows_have_labels_probabilities_and_reasons_in_every_format(blended_bundle, tmp_path):
    import pyarrow.parquet

    after = blended_bundle.find_relation("after")
    settings = EVERYTHING._replace(relations=(after,), per_relation=15)
    for ending in ("csv", "jsonl", "parquet", "nt"):
        discover(blended_bundle, tmp_path / f"facts.{ending}", settings)
    rows = read(tmp_path / "facts.csv")
    assert list(rows[0]) == [
        "head", "head_label", "relation", "relation_label", "tail", "tail_label",
        "probability", "score", "rank_tail", "rank_head", "reason",
    ]  # fmt: skip
    chances = [float(row["probability"]) for row in rows]
    assert chances == sorted(chances, reverse=True) and 0 < min(chances) <= max(chances) < 1
    assert all(row["reason"] and row["relation"] == "after" for row in rows)
    as_json = [json.loads(line) for line in (tmp_path / "facts.jsonl").read_text(encoding="utf8").splitlines()]
    assert [{key: str(value) for key, value in row.items()} for row in as_json] == rows
    assert pyarrow.parquet.read_table(tmp_path / "facts.parquet").to_pylist() == as_json
    lines = [line for line in (tmp_path / "facts.nt").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == f"{iri(rows[0]['head'], 'entity')} <urn:mocme:relation:after> {iri(rows[0]['tail'], 'entity')} ."
    known = {(fact["head"], fact["tail"]) for fact in rows}
    assert len(known) == 15


def test_n_triples_are_read_back(blended_bundle, tmp_path):
    pyoxigraph = pytest.importorskip("pyoxigraph", reason="the extra `rdf` is not installed")
    rows = [
        {"head": "http://example.org/a", "relation": "born in", "tail": "_:0", "probability": 0.9},
        {"head": "Zürich <x>", "relation": "urn:r", "tail": "a b", "probability": 0.8},
    ]
    assert write_rows(tmp_path / "facts.nt", rows) == 2
    found = list(pyoxigraph.parse((tmp_path / "facts.nt").read_bytes(), format=pyoxigraph.RdfFormat.N_TRIPLES))
    assert [quad.subject.value for quad in found] == ["http://example.org/a", "urn:mocme:entity:Z%C3%BCrich%20%3Cx%3E"]
    assert [quad.predicate.value for quad in found] == ["urn:mocme:relation:born%20in", "urn:r"]
    assert type(found[0].object).__name__ == "BlankNode"


def test_duplicates_are_the_pairs_that_several_modalities_find_equal(bundle, tmp_path):
    views = np.concatenate(bundle.view_parts, axis=1).astype(np.float64)
    length = np.linalg.norm(views, axis=2)
    unit = views / np.where(length > 0, length, 1)[..., None]
    expected = {}
    for one in range(60):
        for two in range(one + 1, 60):
            cosine = np.array(
                [unit[m, one] @ unit[m, two] for m in range(len(views)) if length[m, one] and length[m, two]]
            )
            if (cosine >= 0.8).sum() >= 2:
                expected[one, two] = ((cosine >= 0.8).sum(), cosine.mean())
    rows = list(duplicates(bundle, 0.8))
    ids = {name: at for at, name in enumerate(bundle.entities.take(np.arange(60)))}
    found = {(ids[row["entity"]], ids[row["other"]]): (row["modalities"], row["mean_cosine"]) for row in rows}
    assert found.keys() == expected.keys() and len(found) > 3
    for pair, (count, mean) in expected.items():
        assert found[pair] == (count, pytest.approx(mean, abs=1e-4))
    with pytest.raises(ConfigError, match="pairs of near-equal"):
        write_rows(tmp_path / "pairs.nt", rows)
    assert list(tmp_path.iterdir()) == []


def test_the_api_returns_a_frame(blended_bundle):
    frame = blended_bundle.discover(relation="near", min_probability=0.0, per_relation=5)
    assert len(frame) == 5 and (frame["relation"] == "near").all() and frame["probability"].is_monotonic_decreasing


def test_the_command(bundle_dir, tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "mocme_dist.discover", str(bundle_dir), *arguments]
        return subprocess.run(words, capture_output=True, text=True, timeout=120)

    out = str(tmp_path / "facts.csv")
    done = run("--output", out, "--relation", "near", "--min-probability", "0", "--per-relation", "7")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["facts"], report["relations"]) == (7, 1) and len(read(Path(out))) == 7
    done = run("--output", str(tmp_path / "facts"), "--format", "nt", "--min-probability", "0", "--per-relation", "1")
    assert (tmp_path / "facts").read_text().count(" .\n") == json.loads(done.stdout)["facts"] == 4
    done = run("--output", str(tmp_path / "pairs.jsonl"), "--duplicates", "--min-cosine", "0.9")
    assert done.returncode == 0 and "pairs" in json.loads(done.stdout)


def test_mistakes_are_one_line(bundle, bundle_dir, tmp_path, capsys):
    out = str(tmp_path / "facts.csv")
    with pytest.raises(ConfigError, match=r"ends in \.csv, \.parquet"):
        command.main([str(bundle_dir), "--output", "facts.xml"])
    with pytest.raises(ConfigError, match="did you mean 'near'"):
        command.settings_of(bundle, command._parse([str(bundle_dir), "--output", out, "--relation", "neer"]))
    with pytest.raises(SystemExit, match="2"):
        command._parse([str(bundle_dir), "--output", out, "--min-probability", "2"])
    assert "from 0 to 1" in capsys.readouterr().err


@pytest.mark.ray
def test_workers_find_the_same(blended_bundle, tmp_path, ray_session):
    discover(blended_bundle, tmp_path / "alone.csv", SMALL)
    discover(blended_bundle, tmp_path / "spread.csv", SMALL, workers=2)
    assert (tmp_path / "spread.csv").read_bytes() == (tmp_path / "alone.csv").read_bytes()
