"""Sound features: the log-mel numbers computed another way, transformers models, own functions, and what pins them."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from raw_media import sound
from torch import nn

from mocme_dist.config.schema import AudioEncoderConfig
from mocme_dist.encoders.audio import AudioEncoder, LogMel, audio_settings, build_audio_input, mel_bank
from mocme_dist.encoders.audio_files import decode_audio
from mocme_dist.encoders.torchvision_shim import prepare_torchvision
from mocme_dist.errors import ConfigError, DataError


def config(**values: object) -> AudioEncoderConfig:
    return AudioEncoderConfig.model_validate(values)


def features(encoder: AudioEncoder, *contents: bytes) -> np.ndarray:
    pieces = [encoder.decode({"audio.0.wav": content}).pieces[0] for content in contents]
    return encoder.encode(encoder.collate(pieces))


def plain_log_mel(samples: np.ndarray, rate: int, mels: int) -> np.ndarray:
    """The statistics from their description: a loop over frames and bands."""
    length, hop = round(0.025 * rate), round(0.010 * rate)
    points = 2 ** (int(np.ceil(np.log2(length))) + 1)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)
    mel = np.linspace(2595 * np.log10(1 + 20 / 700), 2595 * np.log10(1 + rate / 2 / 700), mels + 2)
    edges, bins = 700 * (10 ** (mel / 2595) - 1), np.arange(points // 2 + 1) * rate / points
    rows = []
    for start in range(0, len(samples) - length + 1, hop):
        power = np.abs(np.fft.rfft(samples[start : start + length] * window, points)) ** 2 / (window**2).sum()
        row = []
        for low, centre, high in zip(edges, edges[1:], edges[2:], strict=False):
            low, high = min(low, centre - rate / points), max(high, centre + rate / points)
            weight = np.clip(np.interp(bins, [low, centre, high], [0, 1, 0]), 0, 1)
            row.append(np.log((power * weight).sum() / weight.sum() + 1e-8))
        rows.append(row)
    found = np.array(rows)
    return np.concatenate([found.mean(0), found.std(0), found.max(0), np.abs(np.diff(found, axis=0)).mean(0)])


@pytest.mark.parametrize("rate, mels", [(16_000, 64), (8_000, 20)])
def test_log_mel_statistics_are_those_of_a_plain_loop(rate, mels):
    content = sound("wav", 660.0, 16_000, 0.4)
    encoder = AudioEncoder(config(sample_rate=rate, mels=mels))
    expected = plain_log_mel(decode_audio(content, rate, 30.0, 60.0).astype(np.float64), rate, mels)
    found = features(encoder, content)
    assert found.shape == (1, 4 * mels) and encoder.width == 4 * mels
    assert np.abs(found[0] - expected).max() < 0.02  # float32 power near the floor


def test_every_band_hears_something_at_every_rate():
    for rate in (1_000, 8_000, 16_000, 48_000):
        for mels in (4, 64, 256):
            bank = mel_bank(rate, LogMel(rate, mels).points, mels)
            assert torch.allclose(bank.sum(dim=0), torch.ones(mels)) and bool((bank >= 0).all())


def test_a_higher_tone_moves_the_loudest_band_up():
    encoder = AudioEncoder(config())
    found = features(encoder, *(sound("wav", hertz) for hertz in (200.0, 1000.0, 4000.0)))
    assert list(np.argsort(found[:, :64].argmax(axis=1))) == [0, 1, 2]


def test_a_sound_says_the_same_alone_among_others_and_in_blocks(monkeypatch):
    encoder = AudioEncoder(config())
    contents = [sound("wav", 300.0, seconds=s) for s in (1.0, 0.3, 1.0, 0.05, 0.3)]
    together = features(encoder, *contents)
    alone = np.concatenate([features(encoder, content) for content in contents])
    assert np.array_equal(together, alone) and np.array_equal(together[0], together[2])
    monkeypatch.setattr("mocme_dist.encoders.audio._BLOCK", 7)
    assert np.allclose(features(encoder, *contents), together, atol=1e-5)


def test_silence_and_clicks_have_finite_features():
    encoder = AudioEncoder(config())
    found = features(encoder, sound("wav", 0.0), sound("wav", seconds=1 / 16_000))
    assert np.isfinite(found).all() and np.allclose(found[0, :64], np.log(1e-8))


def test_bad_sounds_are_failures_and_good_ones_of_the_same_entity_stay():
    encoder = AudioEncoder(config())
    decoded = encoder.decode({"audio.0.wav": b"", "audio.1.ogg": sound("ogg"), "audio.2.mp3": b"<html>"})
    assert len(decoded.pieces) == 1 and [failure.cause for failure in decoded.failures] == ["empty file", "not audio"]
    assert decoded.failures[1].message.startswith("audio.2.mp3: ")


@pytest.fixture(scope="module")
def wav2vec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small wav2vec 2.0 with its feature extractor, weights saved."""
    prepare_torchvision()
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    folder = tmp_path_factory.mktemp("wav2vec")
    torch.manual_seed(0)
    small = Wav2Vec2Config(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, conv_dim=(16, 16),
        conv_kernel=(10, 3), conv_stride=(5, 4), num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    Wav2Vec2Model(small).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=8_000).save_pretrained(folder)
    return folder


def test_a_transformers_model_hears_through_its_own_extractor(wav2vec):
    from transformers import AutoFeatureExtractor, AutoModel

    encoder = AudioEncoder(config(model=f"transformers:{wav2vec}"))
    assert encoder.width == 24 and encoder.rate == 8_000
    contents = [sound("wav", 300.0, seconds=s) for s in (0.5, 0.2, 0.5)]
    found = features(encoder, *contents)
    model, extractor = AutoModel.from_pretrained(wav2vec).eval(), AutoFeatureExtractor.from_pretrained(wav2vec)
    for row, content in zip(found, contents, strict=True):
        inputs = extractor(decode_audio(content, 8_000, 30.0, 60.0), sampling_rate=8_000, return_tensors="pt")
        with torch.no_grad():
            expected = model(inputs["input_values"]).last_hidden_state[0].mean(dim=0)
        assert np.allclose(row, expected, atol=1e-5)


def test_half_precision_is_near_pinned_and_comes_back_as_float32(wav2vec):
    settings = {"model": f"transformers:{wav2vec}"}
    exact, half = AudioEncoder(config(**settings)), AudioEncoder(config(**settings, precision="float16"))
    contents = [sound("wav", 440.0, 16_000, 0.4), sound("wav", 880.0, 16_000, 0.6)]
    expected, found = features(exact, *contents), features(half, *contents)
    assert found.dtype == np.float32 and half.settings != exact.settings
    error = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert 0 < error.max() < 3e-3
    assert np.array_equal(
        features(AudioEncoder(config(precision="float16")), *contents), features(AudioEncoder(config()), *contents)
    )


def test_clap_hears_the_beginning_and_draws_nothing(wav2vec, tmp_path):
    from transformers import ClapFeatureExtractor

    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((wav2vec / name).read_bytes())
    for truncation in ("fusion", "rand_trunc"):
        ClapFeatureExtractor(max_length_s=1, truncation=truncation).save_pretrained(tmp_path)
        made = build_audio_input(config(model=f"transformers:{tmp_path}"))
        samples = np.random.default_rng(0).normal(size=3 * 48_000).astype(np.float32)
        one, two, first = made.prepare(samples), made.prepare(samples), made.prepare(samples[:48_000])
        assert np.array_equal(one["input_features"], two["input_features"]) and np.array_equal(
            one["input_features"], first["input_features"]
        )


def test_an_encoder_decoder_model_gives_its_encoder(tmp_path, caplog):
    from transformers import WhisperConfig, WhisperFeatureExtractor

    WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=8, max_source_positions=50,
    ).save_pretrained(tmp_path)  # fmt: skip
    WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(tmp_path)
    encoder = AudioEncoder(config(model=f"transformers:{tmp_path}", random_weights=True))
    found = features(encoder, sound("wav"), sound("wav", 880.0, seconds=0.3))
    assert found.shape == (2, 16) and not np.allclose(found[0], found[1])
    assert "encoders.audio: RANDOM WEIGHTS" in caplog.text


class Loudness(nn.Module):
    """Mean square and length in seconds."""

    width, sample_rate, weights_sha256 = 2, 4_000, "none"

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        return torch.stack([samples.square().mean(dim=1), torch.full((len(samples),), samples.shape[1] / 4_000)], dim=1)


class Lies(Loudness):
    width = 3


def test_an_own_function_is_an_encoder(monkeypatch):
    monkeypatch.setitem(sys.modules, "own_ear", types.SimpleNamespace(loudness=Loudness, lies=Lies, number=int))
    found = features(AudioEncoder(config(model="own_ear:loudness")), sound("wav"), sound("wav", seconds=0.5))
    assert np.allclose(found, [[0.125, 1.0], [0.125, 0.5]], atol=1e-3)
    with pytest.raises(DataError, match=r"gave shape \(1, 2\), expected \(1, 3\)"):
        features(AudioEncoder(config(model="own_ear:lies")), sound("wav"))
    with pytest.raises(ConfigError, match="returned int without width"):
        AudioEncoder(config(model="own_ear:number"))


def test_settings_pin_what_changes_the_features(wav2vec):
    plain = audio_settings(config())
    for change in (
        {"mels": 32},
        {"sample_rate": 8000},
        {"seconds": 5},
        {"max_seconds": 5},
        {"model": f"transformers:{wav2vec}"},
    ):
        assert audio_settings(config(**change)) != plain
    assert audio_settings(config(batch_size=1)) == plain
    assert AudioEncoder(config()).settings == plain
    for model, message in (
        ("log_mell", "expected log_mel"),
        ("transformers:./nowhere", "folder not found"),
        ("no_such:thing", "No module"),
    ):
        with pytest.raises(ConfigError, match=message):
            audio_settings(config(model=model))
    (folder := wav2vec.parent / "bare").mkdir(exist_ok=True)
    (folder / "config.json").write_bytes((wav2vec / "config.json").read_bytes())
    with pytest.raises(ConfigError, match="no feature extractor can be built"):
        AudioEncoder(config(model=f"transformers:{folder}", random_weights=True))
