"""RDF files as raw folders: what becomes a fact, a text, a number and a picture, and what a damaged file says."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyoxigraph", reason="the extra `rdf` is not installed")

from mocme_dist.config.schema import DataConfig
from mocme_dist.data import tsv
from mocme_dist.data.packing import pack_folder
from mocme_dist.errors import ConfigError, DataError
from mocme_dist.importers.rdf import import_rdf, short_name

EX = "http://example.org/"
PREFIXES = f"""\
@prefix : <{EX}> .
@prefix rdfs: <http://www.w3.org/2000/01/rdf-schema#> .
@prefix skos: <http://www.w3.org/2004/02/skos/core#> .
@prefix foaf: <http://xmlns.com/foaf/0.1/> .
@prefix owl: <http://www.w3.org/2002/07/owl#> .
@prefix xsd: <http://www.w3.org/2001/XMLSchema#> .
"""


def ring(size: int = 12) -> str:
    """Facts of a ring and its chords by two relations."""
    near = [f":c{i} :near :c{(i + 1) % size} ." for i in range(size)]
    chords = [f":c{i} :partOf :c{(i + step) % size} ." for i in range(size) for step in (3, 5)]
    return "\n".join(near + chords) + "\n"


def read(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text(encoding="utf8").splitlines()]


@pytest.fixture
def turtle(tmp_path: Path) -> Path:
    from PIL import Image

    Image.new("RGB", (4, 4), "red").save(tmp_path / "a b.png")
    (tmp_path.parent / "outside.png").write_bytes(b"x")
    said = """
:c0 rdfs:label "Zero"@en, "Null"@de, "Zéro"@fr ; rdfs:comment "The\\tfirst\\n city"@en ; skos:altLabel "Nought"@en-GB .
:c1 rdfs:label "Eins"@de ; :population 12 ; :area "1.5e3"^^xsd:double ; :founded "1066-10-14"^^xsd:date .
:c2 rdfs:label "plain" ; :population "NaN"^^xsd:double ; :population "twelve"^^xsd:integer ; :motto "not a number" .
:c3 foaf:depiction <a%20b.png>, <https://example.org/far.png>, <../outside.png> ; owl:sameAs <http://other.org/3> .
:c4 :near [ :near :c5 ] .
:partOf rdfs:label "part of"@en .
:alone rdfs:label "in no fact"@en .
"""
    path = tmp_path / "graph.ttl"
    path.write_text(PREFIXES + ring() + said, encoding="utf8")
    return path


def test_what_is_said_of_entities_goes_where_it_belongs_and_pack_takes_it(turtle, tmp_path):
    counts = import_rdf(turtle, tmp_path / "raw", languages="en,de")
    raw = tmp_path / "raw"
    facts = [tuple(row) for split in ("train", "valid", "test") for row in read(raw / f"{split}.txt")]
    assert len(facts) == len(set(facts)) == 36
    assert {relation for _, relation, _ in facts} == {EX + "near", EX + "partOf"}
    texts = {row[0]: row[1:] for row in read(raw / "text.tsv")[1:]}
    assert texts[EX + "c0"] == ["Zero", "The first city", "Null|Nought"]
    assert texts[EX + "c1"][0] == "Eins" and texts[EX + "c2"][0] == "plain"
    assert EX + "alone" not in texts
    numbers = read(raw / "numeric.tsv")[1:]
    assert sorted(numbers) == sorted(
        [[EX + "c1", "population", "12"], [EX + "c1", "area", "1.5e3"], [EX + "c1", "founded", "1066"]]
    )
    assert read(raw / "images.tsv")[1:] == [[EX + "c3", "images/000000.png"]]
    assert (raw / "images" / "000000.png").read_bytes() == (turtle.parent / "a b.png").read_bytes()
    links = {row[1] for row in read(raw / "image_links.tsv")[1:]}
    assert "https://example.org/far.png" in links and len(links) == 2
    assert dict(read(raw / "relations.tsv")[1:]) == {EX + "near": "near", EX + "partOf": "part of"}
    assert counts["left_out"] == {
        "blank node": 2, "literal that is no number": 3, "other language": 1, "skipped predicate": 1,
    }  # fmt: skip
    assert not list(raw.glob("spool*"))
    dataset = pack_folder(raw, tmp_path / "dataset", DataConfig())
    assert (dataset.num_entities, dataset.num_relations) == (12, 2)


def test_n_triples_gzip_and_turtle_give_the_same_graph(turtle, tmp_path):
    import pyoxigraph

    quads = list(pyoxigraph.parse(turtle.read_bytes(), format=pyoxigraph.RdfFormat.TURTLE, base_iri=turtle.as_uri()))
    plain = tmp_path / "graph.nt.gz"
    triples = [pyoxigraph.Triple(quad.subject, quad.predicate, quad.object) for quad in quads]
    plain.write_bytes(gzip.compress(pyoxigraph.serialize(triples, format=pyoxigraph.RdfFormat.N_TRIPLES)))
    for source, out in ((turtle, "one"), (plain, "two")):
        import_rdf(source, tmp_path / out)
    for name in ("train.txt", "valid.txt", "test.txt", "text.tsv", "numeric.tsv", "images.tsv", "relations.tsv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_blank_nodes_can_stay_and_texts_are_bounded(turtle, tmp_path):
    import_rdf(
        turtle, tmp_path / "raw", languages="*", blank_nodes="keep", max_text=3, skip=EX + "partOf", split="1,0,0"
    )
    facts = read(tmp_path / "raw" / "train.txt")
    assert [EX + "c4", EX + "near", "_:0"] in facts and ["_:0", EX + "near", EX + "c5"] in facts
    assert all(relation == EX + "near" for _, relation, _ in facts) and len(facts) == 14
    texts = {row[0]: row[1:] for row in read(tmp_path / "raw" / "text.tsv")[1:]}
    assert texts[EX + "c0"] == ["Zer", "The", "Nul|Zér|Nou"]


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    bad = tmp_path / "bad.nt"
    bad.write_text("<http://a> <http://b> <http://c> .\n<http://a> <http://b> c .\n")
    with pytest.raises(DataError, match=r"bad\.nt:2: not valid RDF"):
        import_rdf(bad, tmp_path / "raw")
    assert not (tmp_path / "raw").exists()
    (tmp_path / "numbers.nt").write_text('<http://a> <http://b> "1"^^<http://www.w3.org/2001/XMLSchema#integer> .\n')
    with pytest.raises(DataError, match="no triple between two resources"):
        import_rdf(tmp_path / "numbers.nt", tmp_path / "raw")
    with pytest.raises(DataError, match="file not found"):
        import_rdf(tmp_path / "none.nt", tmp_path / "raw")
    (tmp_path / "graph.xml").write_text("")
    with pytest.raises(DataError, match=r"ends in \.nt or \.ttl"):
        import_rdf(tmp_path / "graph.xml", tmp_path / "raw")
    cut = tmp_path / "cut.nt.gz"
    cut.write_bytes(gzip.compress(b"<http://a> <http://b> <http://c> .\n" * 9999)[:60])
    with pytest.raises(DataError, match="cannot be read"):
        import_rdf(cut, tmp_path / "raw")
    monkeypatch.setattr(tsv, "EXPANSION_ALLOWANCE", 1 << 20)
    bomb = tmp_path / "bomb.nt.gz"
    bomb.write_bytes(gzip.compress(b"\n" * (64 << 20)))
    with pytest.raises(DataError, match="bytes expand to more than"):
        import_rdf(bomb, tmp_path / "raw")
    with pytest.raises(ConfigError, match="--split"):
        import_rdf(bad, tmp_path / "raw", split="1,1")


def test_the_command(turtle, tmp_path):
    command = [
        sys.executable,
        "-m",
        "mocme_dist.import",
        "rdf",
        str(turtle),
        str(tmp_path / "raw"),
        "--languages",
        "de",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["text.tsv"] == 3
    assert {row[1] for row in read(tmp_path / "raw" / "text.tsv")[1:]} == {"Null", "Eins", "plain"}


@pytest.mark.parametrize(
    "iri, name",
    [
        ("http://dbpedia.org/ontology/birthPlace", "birthPlace"),
        ("http://www.w3.org/2003/01/geo/wgs84_pos#lat", "lat"),
        ("http://example.org/a%20b/", "a b"),
        ("urn:isbn:1", "urn:isbn:1"),
    ],
)
def test_short_names(iri, name):
    assert short_name(iri) == name
