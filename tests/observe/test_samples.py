"""What people see of single entities: roles, pictures, and the projector of a finished run."""

from __future__ import annotations

import io
import json
import re
from collections import Counter

import numpy as np
import tiny_run
from PIL import Image

from mocme_dist.data.dataset import Dataset
from mocme_dist.errors import DataError
from mocme_dist.observe.samples import NO_ROLE, OTHERS, TILE, entity_roles, frequent, thumbnails
from mocme_dist.train import train


def test_a_role_is_the_one_an_entity_has_most_often():
    triples = np.array([[0, 0, 1], [0, 0, 2], [1, 1, 0], [2, 1, 0], [2, 0, 1], [3, 1, 3]])
    roles = entity_roles(triples, ["likes", "owns"], 0, 5)
    # entity 2 ties: likes before owns, heads before tails; so does entity 0, at two each
    assert roles == ["head of likes", "tail of likes", "head of likes", "head of owns", NO_ROLE]
    assert entity_roles(triples, ["likes", "owns"], 1, 2) == roles[1:3]


def test_roles_agree_with_counting_one_by_one(tiny_dataset, monkeypatch):
    monkeypatch.setattr("mocme_dist.observe.samples._SCAN", 7)  # several blocks
    dataset = Dataset.open(tiny_dataset)
    triples, names = dataset.triples("train"), dataset.relation_names()
    for entity, role in enumerate(entity_roles(triples, names, 0, dataset.num_entities)):
        counts = Counter(
            (int(r), side)
            for h, r, t in np.asarray(triples)
            for side, member in (("head", h), ("tail", t))
            if member == entity
        )
        best = min(counts, key=lambda key: (-counts[key], key))
        assert role == f"{best[1]} of {names[best[0]]}"


def test_rare_roles_become_others():
    assert frequent(["a", "b", "a", "c", "b", "d"], 2) == ["a", "b", "a", OTHERS, "b", OTHERS]


def test_thumbnails_are_the_first_picture_or_a_dot_of_the_roles_colour(tiny_dataset):
    dataset = Dataset.open(tiny_dataset)
    roles = entity_roles(dataset.triples("train"), dataset.relation_names(), 5, 40)
    tiles = thumbnails(dataset, 5, roles, 1 << 20, 1 << 20)  # from inside one shard of 16 into another
    pictured = set()
    for shard in range(dataset.shards.num_shards):
        for sample in dataset.read_samples(shard, 1 << 20):
            if 5 <= sample.id < 45 and sample.files("image"):
                with Image.open(io.BytesIO(sample.files("image")[0])) as picture:
                    expected = np.asarray(picture.convert("RGB").resize((TILE, TILE), Image.Resampling.BILINEAR))
                assert np.array_equal(tiles[sample.id - 5], expected)
                pictured.add(sample.id - 5)
    dots = {
        role: {tiles[n].tobytes() for n in range(40) if roles[n] == role and n not in pictured} for role in set(roles)
    }
    assert 10 < len(pictured) < 40 and all(len(own) <= 1 for own in dots.values())
    frequent_dots = [own for role, own in dots.items() if role in frequent(roles, 6) and own]
    assert len({dot for own in frequent_dots for dot in own}) == len(frequent_dots)


def test_a_run_ends_with_a_projector_of_names_roles_and_pictures_and_an_arranged_tab(featured_dataset, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2

    config = tiny_run.tiny_config(
        featured_dataset, tmp_path / "run", "modalities=[structure, numeric]", "train.projector=20", "train.epochs=1"
    )
    train(config)
    folder = tmp_path / "run" / "tensorboard"
    written = "\n".join(path.read_text() for path in folder.rglob("projector_config.pbtxt"))
    assert "metadata.tsv" in written and "sprite.png" in written
    table = next(folder.rglob("metadata.tsv")).read_text().splitlines()
    assert table[0] == "label\tid\trole" and len(table) == 21
    dataset = Dataset.open(featured_dataset)
    roles = entity_roles(dataset.triples("train"), dataset.relation_names(), 0, 20)
    assert [line.split("\t") for line in table[1:]] == [
        list(row) for row in zip(dataset.entity_labels_of(0, 20), dataset.entity_names()[:20], roles, strict=True)
    ]
    vectors = np.loadtxt(next(folder.rglob("tensors.tsv")))
    assert vectors.shape == (20, 8) and np.isfinite(vectors).all() and len(np.unique(vectors, axis=0)) == 20

    events = EventAccumulator(str(folder))
    events.Reload()
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category][:2] == ["Learning", "Fusion"]
    tags = events.Tags()["scalars"]
    silent = [
        pattern
        for category in layout.category
        for chart in category.chart
        for pattern in chart.multiline.tag
        if not any(re.fullmatch(pattern, tag) for tag in tags)
    ]
    assert silent == []
    by_role = {tag: [event.value for event in events.Scalars(tag)] for tag in tags if tag.startswith("roles/")}
    assert by_role and all(0 <= value <= 1 for values in by_role.values() for value in values)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["mrr"] > 0


def test_no_entities_no_projector(featured_dataset, tmp_path):
    train(
        tiny_run.tiny_config(
            featured_dataset, tmp_path / "run", "modalities=[structure]", "train.projector=0", "train.epochs=1"
        )
    )
    assert not list((tmp_path / "run").rglob("projector_config.pbtxt"))


def test_a_damaged_shard_costs_the_pictures_and_not_the_run(featured_dataset, tmp_path, monkeypatch, caplog):
    def damaged(*_: object) -> None:
        raise DataError("shard 0 is cut")

    monkeypatch.setattr("mocme_dist.observe.monitor.thumbnails", damaged)
    settings = ("modalities=[structure, numeric]", "train.projector=20", "train.epochs=1")
    train(tiny_run.tiny_config(featured_dataset, tmp_path / "run", *settings))
    assert "the projector shows no pictures: shard 0 is cut" in caplog.text
    (written,) = (path.read_text() for path in (tmp_path / "run").rglob("projector_config.pbtxt"))
    assert "metadata.tsv" in written and "sprite" not in written
    assert json.loads((tmp_path / "run" / "run_status.json").read_text())["state"] == "done"
