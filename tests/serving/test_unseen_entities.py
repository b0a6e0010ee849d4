"""A new entity is encoded as the graph's own would be without their structure, by the encoders that made theirs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny_bundle import rows_of

from mocme_dist.data.dataset import Dataset
from mocme_dist.errors import ConfigError, DataError
from mocme_dist.serving.bundle import Bundle
from mocme_dist.serving.unseen import UnseenEntityEncoder, describe


@pytest.fixture(scope="module")
def encoder(bundle: Bundle) -> UnseenEntityEncoder:
    return UnseenEntityEncoder(bundle, trust_encoders=True)


def samples_of(directory) -> dict[int, dict[str, bytes]]:
    dataset = Dataset.open(directory)
    return {
        sample.id: sample.members
        for shard in range(dataset.shards.num_shards)
        for sample in dataset.read_samples(shard, 1 << 20)
    }


def test_an_entity_of_the_graph_described_anew_gets_its_own_vector_without_structure(answered_run, bundle, encoder):
    rows = rows_of(answered_run)
    samples = samples_of(rows.dataset.directory)
    chosen = [
        entity
        for entity, members in samples.items()
        if {name.split(".")[0] for name in members} == {"text", "image", "numeric"}
    ][:6]
    stores = {name: rows.store(name, 0, 60) for name in bundle.modalities if name != "structure"}
    raw, present = {"structure": torch.zeros(60, 8)}, [torch.zeros(60, dtype=torch.bool)]
    for name, store in stores.items():
        raw[name], there = store.gather(torch.arange(60))
        present.append(there)
    expected = rows.model.encode(raw, torch.stack(present)).z_VD
    for entity in chosen:
        found = {name: encoder.features(samples[entity], name) for name in stores}
        for name, values in found.items():
            np.testing.assert_allclose(values, raw[name][entity].numpy(), atol=2e-3, err_msg=name)
        z_1D, weight_1M = encoder.encode(
            [{name: values for name, values in found.items() if values is not None}], correct=False
        )
        torch.testing.assert_close(torch.from_numpy(z_1D[0]), expected[entity], rtol=1e-2, atol=1e-3)
        assert weight_1M[0, 0] == 0 and weight_1M[0].sum() == pytest.approx(1)


def test_the_weights_of_what_is_there_sum_to_one_and_order_does_not_matter(bundle, encoder):
    text = np.ones(bundle.manifest["raw_widths"]["text"], np.float32)
    numbers = np.ones(bundle.manifest["raw_widths"]["numeric"], np.float32)
    z, weights = encoder.encode([{"text": text}, {"text": text, "numeric": numbers}, {"numeric": numbers}])
    names = bundle.modalities
    assert weights[0, names.index("text")] == 1 and weights[2, names.index("numeric")] == 1
    assert weights.sum(1) == pytest.approx([1, 1, 1]) and (weights[1] > 0).sum() == 2
    again, _ = encoder.encode([{"numeric": numbers, "text": text}])
    np.testing.assert_allclose(again[0], z[1], rtol=1e-5, atol=1e-6)


def test_a_description_in_words_is_read(encoder, tmp_path):
    (tmp_path / "a,b.png").write_bytes(b"pixels")
    text = f"name=Little Rock, Old Town,text=a long, winding text,image={tmp_path / 'a,b.png'},size=1200.5,year=-3"
    found = encoder.describe(text)
    assert found.name == "Little Rock, Old Town"
    assert json.loads(found.members["text.json"]) == {"label": "a long, winding text"}
    assert json.loads(found.members["numeric.json"]) == {"size": 1200.5, "year": -3.0}
    assert found.members["image.0.png"] == b"pixels"
    columns = encoder.describe("label=x,description=y, z")
    assert json.loads(columns.members["text.json"]) == {"label": "x", "description": "y, z"}


@pytest.mark.parametrize(
    "text, message",
    [
        ("", r"expected key=value"),
        ("Atlantis,text=x", r"expected key=value"),
        ("name=Atlantis", r"nothing that this model knows is given; it knows text, "),
        ("yaer=5", r"yaer: unknown key; did you mean year\?"),
        ("qqqq=5", r"qqqq: unknown key; keys are name, text, image, label, description, size, year"),
        ("year=soon", r"year='soon': expected a number"),
        ("size=1,5", r"size='1,5': expected a number with a point for decimals and nothing between thousands"),
        ("size=1,200.5,year=3", r"size='1,200.5': expected a number"),
        ("size=1_000", r"size='1_000': expected a number"),
        ("year=inf", r"year=inf: expected a finite number"),
        ("image=/nowhere/at all.png", r"image=/nowhere/at all.png: .* cannot be read: No such file"),
        ("text=x,audio=/dev/null", r"audio given, but this model was trained with structure, text, "),
    ],
)
def test_a_description_that_says_nothing_usable_says_why(encoder, text, message):
    with pytest.raises(ConfigError, match=message):
        encoder.describe(text)


def test_a_file_that_cannot_be_decoded_is_named(encoder, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"<html>")
    with pytest.raises(ConfigError, match=r"image: not an image: .*image.0.png"):
        encoder.features_of(encoder.describe(f"text=x,image={tmp_path / 'broken.png'}"))
    with pytest.raises(ConfigError, match="nothing of what is given can be encoded"):
        encoder.features_of(encoder.describe("text= ,name=x"))


def test_an_encoder_that_is_not_the_one_of_then_is_refused(bundle, bundle_dir):
    features = {
        **bundle.manifest["features"],
        "text": {**bundle.manifest["features"]["text"], "encoder_hash": "0" * 64},
    }
    other = UnseenEntityEncoder(Bundle(bundle_dir, {**bundle.manifest, "features": features}), trust_encoders=True)
    with pytest.raises(
        DataError, match=r"text: the encoder here has hash .*, that of the bundle's features 000000000000"
    ):
        other.features_of(other.describe("text=x"))
    assert describe([("text", "x")], ("text", "label"), [], ["text"]).members["text.json"] == b'{"text": "x"}'
