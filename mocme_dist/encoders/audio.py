"""Frozen audio encoders.

`encoders.audio.model` is one of
    log_mel                 statistics over time of the log-mel spectrum, without weights; `LogMel` defines them;
    transformers:FOLDER     a transformers audio model (wav2vec 2.0, HuBERT, WavLM, AST, Whisper's encoder, CLAP's audio
                            encoder ...) with its own feature extractor, its last hidden state averaged over positions;
                            CLAP gets the first 10 seconds, because its extractor would crop longer audio at random;
    MODULE:FUNCTION         FUNCTION() returns an nn.Module that maps samples (B, T) float32 to (B, F); its attributes:
                            width (F, int), sample_rate (int), weights_sha256 (str, identifies the features on disk).
Input is one channel at the model's rate, the first `encoders.audio.seconds` of a file; files shorter than a tenth of a
second are padded with silence. Only inputs of equal length share a forward pass, because padding changes the output of
many models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mocme_dist.config.schema import AudioEncoderConfig
from mocme_dist.encoders.audio_files import decode_audio, require_soundfile
from mocme_dist.encoders.device import Copies, Fetch, Overlapped
from mocme_dist.encoders.encoder import Decoded, decode_files
from mocme_dist.encoders.pretrained import (
    MeanHidden,
    load_feature_extractor,
    load_transformer,
    network_from_function,
    resolve_model,
    weights_hash,
)
from mocme_dist.errors import ConfigError, DataError

_SETTING = "encoders.audio.model"
_LOG_MEL = "log_mel 1"  # the number is increased whenever the features change
_FLOOR = 1e-8  # added to the power before the logarithm: -80 dB of full scale
_BLOCK = 4096  # frames per block of a spectrum
_SHORTEST_S = 0.1


@dataclass
class AudioInput:
    """Sampling rate of a network in Hz, and the function from a file's samples (T,) to its inputs."""

    sample_rate: int
    prepare: Callable[[np.ndarray], dict[str, np.ndarray]]


@dataclass
class AudioNetwork:
    """A network from prepared audio to features, with its width."""

    network: nn.Module
    width: int


class LogMel(nn.Module):
    """Statistics of the log-mel spectrum.

    Frames of 25 ms (Hann window) every 10 ms; power spectrum of twice the next power of two points, divided by the
    window's energy; triangular bands, evenly spaced on the mel scale 2595 log10(1 + f / 700) from 20 Hz to half the
    rate, each with sum 1; natural logarithm of the band's power + 1e-8. Per band, over frames: mean, standard
    deviation, maximum, and mean absolute difference of neighbours; the features are all means, all deviations, and so
    on.
    """

    window: Tensor
    bank: Tensor

    def __init__(self, rate: int, mels: int) -> None:
        super().__init__()
        self.length = round(0.025 * rate)
        self.hop = round(0.010 * rate)
        self.points = 2 ** (math.ceil(math.log2(self.length)) + 1)
        self.register_buffer("window", torch.hann_window(self.length))
        self.register_buffer("bank", mel_bank(rate, self.points, mels))

    def forward(self, samples: Tensor) -> Tensor:
        """Return (B, 4 * mels) features of (B, T) samples."""
        return torch.stack([self._statistics(file) for file in samples])

    def _statistics(self, samples: Tensor) -> Tensor:
        if len(samples) < self.length:
            samples = nn.functional.pad(samples, (0, self.length - len(samples)))
        frames = samples.unfold(0, self.length, self.hop)  # a view
        energy = self.window.square().sum()
        blocks = [
            torch.fft.rfft(block * self.window, self.points).abs().square() @ self.bank
            for block in frames.split(_BLOCK)
        ]
        spectrum = torch.log(torch.cat(blocks) / energy + _FLOOR)
        change = spectrum.diff(dim=0).abs().mean(dim=0) if len(spectrum) > 1 else torch.zeros_like(spectrum[0])
        return torch.cat([spectrum.mean(dim=0), spectrum.std(dim=0, correction=0), spectrum.amax(dim=0), change])


def mel_bank(rate: int, points: int, mels: int) -> Tensor:
    """Return (points // 2 + 1, mels) float32 weights of a spectrum's bins in each band; every column sums to 1."""
    low, high = (2595.0 * math.log10(1.0 + f / 700.0) for f in (20.0, rate / 2))
    edges = 700.0 * (10.0 ** (torch.linspace(low, high, mels + 2, dtype=torch.float64) / 2595.0) - 1.0)
    spacing = rate / points
    bins = torch.arange(points // 2 + 1, dtype=torch.float64)[:, None] * spacing
    centre = edges[1:-1]
    # at least the spacing of bins: a narrower band between two bins would be empty
    before = torch.clamp(centre - edges[:-2], min=spacing)
    after = torch.clamp(edges[2:] - centre, min=spacing)
    weights = torch.minimum(1.0 - (centre - bins) / before, 1.0 - (bins - centre) / after).clamp(min=0.0)
    return (weights / weights.sum(dim=0)).float()


def audio_settings(config: AudioEncoderConfig) -> dict[str, Any]:
    """Return the settings that determine audio features; hashes files, builds the network for MODULE:FUNCTION only."""
    require_soundfile()
    heard: dict[str, Any] = {"seconds": config.seconds, "max_seconds": config.max_seconds}
    kind, _, name = config.model.partition(":")
    if config.model == "log_mel":
        return {
            "model": "log_mel",
            "network": _LOG_MEL,
            "sample_rate": config.sample_rate,
            "mels": config.mels,
            **heard,
        }
    if not name:
        raise ConfigError(f"{_SETTING}: got {config.model!r}, expected log_mel, transformers:FOLDER or MODULE:FUNCTION")
    if kind == "transformers":
        folder = resolve_model(name, _SETTING)
        return {
            "model": f"transformers:{folder.name}",
            "network": "transformers",
            "weights": weights_hash(folder, config.random_weights),
            "precision": config.precision,
            **heard,
        }
    made = _from_function(config.model)
    return {
        "model": config.model,
        "network": config.model,
        "weights": str(made.weights_sha256),
        "precision": config.precision,
        **heard,
    }


def build_audio_input(config: AudioEncoderConfig) -> AudioInput:
    """Return the inputs of the network that `config` names; the network itself is built for MODULE:FUNCTION only.

    Raises:
        ConfigError: the network is unknown, or its feature extractor is not available.
    """
    if config.model == "log_mel":
        return AudioInput(config.sample_rate, _as_samples)
    kind, _, name = config.model.partition(":")
    if kind == "transformers":
        return _transformers_input(resolve_model(name, _SETTING))
    return AudioInput(int(_from_function(config.model).sample_rate), _as_samples)


def build_audio_network(config: AudioEncoderConfig) -> AudioNetwork:
    """Return the network that `config` names, frozen, in eval mode.

    Raises:
        ConfigError: the network is unknown, or its weights are not available.
    """
    if config.model == "log_mel":
        return AudioNetwork(LogMel(config.sample_rate, config.mels).eval(), 4 * config.mels)
    kind, _, name = config.model.partition(":")
    if kind == "transformers":
        return _transformers_network(resolve_model(name, _SETTING), config.random_weights)
    made = _from_function(config.model)
    return AudioNetwork(made.eval().requires_grad_(False), int(made.width))


def _as_samples(samples: np.ndarray) -> dict[str, np.ndarray]:
    return {"samples": samples}


def _from_function(model: str) -> Any:
    return network_from_function(_SETTING, model, ("width", "sample_rate", "weights_sha256"), "encoders/audio.py")


def _transformers_network(folder: Path, random_weights: bool) -> AudioNetwork:
    model = load_transformer(folder, random_weights, "encoders.audio")
    model = getattr(model, "audio_model", model)  # CLAP also has a text encoder
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    return AudioNetwork(MeanHidden(model).eval(), int(model.config.hidden_size))


def _transformers_input(folder: Path) -> AudioInput:
    extractor = load_feature_extractor(folder, _SETTING)
    rate = int(extractor.sampling_rate)
    # CLAP's extractor crops longer audio at random
    limit = getattr(extractor, "nb_max_samples", None)

    def prepare(samples: np.ndarray) -> dict[str, np.ndarray]:
        samples = samples if limit is None else samples[: int(limit)]
        made = extractor(samples, sampling_rate=rate, return_tensors="pt")
        return {key: value[0].numpy() for key, value in made.items() if key != "attention_mask"}

    return AudioInput(rate, prepare)


class AudioDecoder:
    """Decodes and resamples audio files; see `encoders.encoder.Decoder` for the contract."""

    modality = "audio"

    def __init__(self, config: AudioEncoderConfig) -> None:
        require_soundfile()
        made = build_audio_input(config)
        self.config = config
        self.rate = made.sample_rate
        self.prepare = made.prepare
        self.chunk = config.batch_size

    def decode(self, members: Mapping[str, bytes]) -> Decoded:
        """Return (T,) float32 samples of each decodable audio file of an entity."""
        return decode_files(members, self._decode)

    def _decode(self, content: bytes) -> np.ndarray:
        samples = decode_audio(content, self.rate, self.config.seconds, self.config.max_seconds)
        missing = math.ceil(_SHORTEST_S * self.rate) - len(samples)
        return np.pad(samples, (0, missing)) if missing > 0 else samples

    def collate(self, pieces: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
        """Return the network's inputs, one per file."""
        return [self.prepare(piece) for piece in pieces]


class AudioEncoder(AudioDecoder, Overlapped):
    """Encodes audio files; see `encoders.encoder.Encoder` for the contract."""

    def __init__(self, config: AudioEncoderConfig, device: str = "cpu") -> None:
        super().__init__(config)
        self.copies = Copies(device)
        self.settings = audio_settings(config)
        made = build_audio_network(config)
        # log_mel uses float32: the squares of its spectrum exceed the range of half precision
        self.dtype: torch.dtype = torch.float32 if config.model == "log_mel" else getattr(torch, config.precision)
        self.network = made.network.to(self.copies.device, self.dtype)
        self.width = made.width

    @torch.inference_mode()
    def launch(self, batch: list[dict[str, np.ndarray]]) -> Fetch:
        """Start encoding; the features are (n, F) float32 in the given order.

        Files with inputs of equal shapes run together.

        Raises:
            DataError: the network's output has an unexpected shape.
        """
        alike: dict[tuple[Any, ...], list[int]] = {}
        for place, inputs in enumerate(batch):
            alike.setdefault(tuple((key, *value.shape) for key, value in inputs.items()), []).append(place)
        launched: list[tuple[list[int], Fetch]] = []
        for places in alike.values():
            stacked = {key: self._stack([batch[place][key] for place in places]) for key in batch[places[0]]}
            features = self.network(**stacked).float()
            if features.shape != (len(places), self.width):
                raise DataError(
                    f"{_SETTING}: {self.config.model} gave shape {tuple(features.shape)}, expected "
                    f"{(len(places), self.width)}"
                )
            launched.append((places, self.copies.fetch(features)))

        def in_given_order() -> np.ndarray:
            values = np.zeros((len(batch), self.width), dtype=np.float32)
            for places, fetch in launched:
                values[places] = fetch()
            return values

        return in_given_order

    def _stack(self, values: list[np.ndarray]) -> Tensor:
        """Stack values on the device, floating-point ones in the network's precision."""
        stacked = torch.from_numpy(np.stack(values))
        if stacked.is_floating_point():
            stacked = stacked.to(self.dtype)
        return self.copies.to_device(stacked)
