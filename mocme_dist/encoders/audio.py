"""Frozen sound encoders.

`encoders.audio.model` is one of
    log_mel                 statistics over time of the log-mel spectrum, no weights; see `LogMel` for the exact numbers;
    transformers:FOLDER     a transformers sound model (wav2vec 2.0, HuBERT, WavLM, AST, Whisper's encoder, CLAP's sound
                            half ...) behind its own feature extractor, its last hidden state averaged over positions; CLAP
                            hears the first seconds that its extractor takes (10), as it would draw from longer sounds by chance;
    MODULE:FUNCTION         FUNCTION() returns an nn.Module that maps samples (B, T) float32 to (B, F); its attributes:
                            width (F, int), sample_rate (int), weights_sha256 (str, pins the features on disk).
A sound is one channel at the model's rate, its first `encoders.audio.seconds`; one shorter than a tenth of a second is
continued with silence. Only sounds of equal length share a forward pass: padding would change what many models say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mocme_dist.config.schema import AudioEncoderConfig
from mocme_dist.encoders.encoder import Decoded, decode_files, network_from_function
from mocme_dist.encoders.sounds import decode_sound, require_soundfile
from mocme_dist.encoders.text import load_feature_extractor, load_transformer, resolve_model, weights_hash
from mocme_dist.errors import ConfigError, DataError

_SETTING = "encoders.audio.model"
_LOG_MEL = "log_mel 1"  # the number goes up when the features change
_FLOOR = 1e-8  # of the power before the logarithm: -80 dB of full scale
_BLOCK = 4096  # frames of a spectrum at once
_SHORTEST_S = 0.1


@dataclass
class Ear:
    """A network from prepared sounds to features, and what must be known of it."""

    network: nn.Module
    width: int
    sample_rate: int
    prepare: Callable[[np.ndarray], dict[str, Tensor]]


class LogMel(nn.Module):
    """Statistics of the log-mel spectrum.

    Frames of 25 ms (Hann window) every 10 ms; power spectrum of the next power of two, doubled, samples long, divided by
    the window's energy; triangular bands, evenly spaced on the mel scale 2595 log10(1 + f / 700) from 20 Hz to half the
    rate, each of sum 1; natural logarithm of the band's power + 1e-8. Of each band, over frames: mean, standard deviation,
    largest, and mean absolute difference of neighbours; the features are all means, all deviations, and so on.
    """

    window: Tensor
    bank: Tensor

    def __init__(self, rate: int, mels: int) -> None:
        super().__init__()
        self.length, self.hop = round(0.025 * rate), round(0.010 * rate)
        self.points = 2 ** (math.ceil(math.log2(self.length)) + 1)
        self.register_buffer("window", torch.hann_window(self.length))
        self.register_buffer("bank", mel_bank(rate, self.points, mels))

    def forward(self, samples: Tensor) -> Tensor:
        """(B, 4 * mels) from (B, T) samples."""
        return torch.stack([self._statistics(sound) for sound in samples])

    def _statistics(self, samples: Tensor) -> Tensor:
        if len(samples) < self.length:
            samples = nn.functional.pad(samples, (0, self.length - len(samples)))
        frames = samples.unfold(0, self.length, self.hop)  # a view
        energy = self.window.square().sum()
        blocks = [torch.fft.rfft(block * self.window, self.points).abs().square() @ self.bank for block in frames.split(_BLOCK)]
        spectrum = torch.log(torch.cat(blocks) / energy + _FLOOR)
        change = spectrum.diff(dim=0).abs().mean(dim=0) if len(spectrum) > 1 else torch.zeros_like(spectrum[0])
        return torch.cat([spectrum.mean(dim=0), spectrum.std(dim=0, correction=0), spectrum.amax(dim=0), change])


def mel_bank(rate: int, points: int, mels: int) -> Tensor:
    """(points // 2 + 1, mels) float32 weights of a spectrum's bins in each band; every column sums to 1."""
    low, high = (2595.0 * math.log10(1.0 + f / 700.0) for f in (20.0, rate / 2))
    edges = 700.0 * (10.0 ** (torch.linspace(low, high, mels + 2, dtype=torch.float64) / 2595.0) - 1.0)
    spacing = rate / points
    bins = torch.arange(points // 2 + 1, dtype=torch.float64)[:, None] * spacing
    centre = edges[1:-1]
    # never narrower than the bins are apart: a band between two bins would hear nothing
    before, after = torch.clamp(centre - edges[:-2], min=spacing), torch.clamp(edges[2:] - centre, min=spacing)
    weights = torch.minimum(1.0 - (centre - bins) / before, 1.0 - (bins - centre) / after).clamp(min=0.0)
    return (weights / weights.sum(dim=0)).float()


class _MeanHidden(nn.Module):
    """Last hidden state of a sound model, averaged over its positions: (B, T, F) or (B, F, H, W) to (B, F)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        hidden = self.model(**inputs).last_hidden_state
        return hidden.mean(dim=(2, 3)) if hidden.dim() == 4 else hidden.mean(dim=1)


def audio_settings(config: AudioEncoderConfig) -> dict[str, Any]:
    """What pins the sound features; hashes files, and builds the network only for MODULE:FUNCTION."""
    require_soundfile()
    heard: dict[str, Any] = {"seconds": config.seconds, "max_seconds": config.max_seconds}
    kind, _, name = config.model.partition(":")
    if config.model == "log_mel":
        return {"model": "log_mel", "network": _LOG_MEL, "sample_rate": config.sample_rate, "mels": config.mels, **heard}
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
    return {"model": config.model, "network": config.model, "weights": str(made.weights_sha256), "precision": config.precision, **heard}


def build_ear(config: AudioEncoderConfig) -> Ear:
    """The network that `config` names, frozen, in eval mode.

    Raises:
        ConfigError: the network is unknown, or its weights or its feature extractor cannot be had.
    """
    if config.model == "log_mel":
        return Ear(LogMel(config.sample_rate, config.mels).eval(), 4 * config.mels, config.sample_rate, _as_tensor)
    kind, _, name = config.model.partition(":")
    if kind == "transformers":
        return _transformers_ear(name, config.random_weights)
    made = _from_function(config.model)
    return Ear(made.eval().requires_grad_(False), int(made.width), int(made.sample_rate), _as_tensor)


def _as_tensor(samples: np.ndarray) -> dict[str, Tensor]:
    return {"samples": torch.from_numpy(samples)}


def _from_function(model: str) -> Any:
    return network_from_function(_SETTING, model, ("width", "sample_rate", "weights_sha256"), "encoders/audio.py")


def _transformers_ear(name: str, random_weights: bool) -> Ear:
    folder = resolve_model(name, _SETTING)
    model = load_transformer(folder, random_weights, "encoders.audio")
    extractor = load_feature_extractor(folder, _SETTING)
    rate = int(extractor.sampling_rate)
    model = getattr(model, "audio_model", model)  # CLAP carries a text half as well
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()

    # CLAP's extractor takes pieces at random from a sound that is longer than this
    limit = getattr(extractor, "nb_max_samples", None)

    def prepare(samples: np.ndarray) -> dict[str, Tensor]:
        samples = samples if limit is None else samples[: int(limit)]
        made = extractor(samples, sampling_rate=rate, return_tensors="pt")
        return {key: value[0] for key, value in made.items() if key != "attention_mask"}

    return Ear(_MeanHidden(model).eval(), int(model.config.hidden_size), rate, prepare)


class AudioEncoder:
    """Sounds to features; see `encoders.encoder.Encoder` for the contract."""

    modality = "audio"

    def __init__(self, config: AudioEncoderConfig, device: str = "cpu") -> None:
        self.config, self.device = config, torch.device(device)
        self.settings = audio_settings(config)
        ear = build_ear(config)
        # log_mel keeps float32: the squares of its spectrum leave the range of half precision
        self.dtype: torch.dtype = torch.float32 if config.model == "log_mel" else getattr(torch, config.precision)
        self.network = ear.network.to(self.device, self.dtype)
        self.width, self.rate, self.prepare = ear.width, ear.sample_rate, ear.prepare
        self.chunk = config.batch_size

    def decode(self, members: Mapping[str, bytes]) -> Decoded:
        """(T,) float32 samples of each sound of an entity that can be decoded."""
        return decode_files(members, self._decode)

    def _decode(self, content: bytes) -> np.ndarray:
        samples = decode_sound(content, self.rate, self.config.seconds, self.config.max_seconds)
        missing = math.ceil(_SHORTEST_S * self.rate) - len(samples)
        return np.pad(samples, (0, missing)) if missing > 0 else samples

    def collate(self, pieces: list[np.ndarray]) -> list[dict[str, Tensor]]:
        """What the network takes, sound by sound."""
        return [self.prepare(piece) for piece in pieces]

    @torch.inference_mode()
    def encode(self, batch: list[dict[str, Tensor]]) -> np.ndarray:
        """(n, F) float32 features, in the order given; sounds whose inputs have equal shapes run together.

        Raises:
            DataError: the network gives another shape than it promised.
        """
        alike: dict[tuple[Any, ...], list[int]] = {}
        for place, inputs in enumerate(batch):
            alike.setdefault(tuple((key, *value.shape) for key, value in inputs.items()), []).append(place)
        values = np.zeros((len(batch), self.width), dtype=np.float32)
        for places in alike.values():
            stacked = {key: self._stack([batch[place][key] for place in places]) for key in batch[places[0]]}
            features = self.network(**stacked).float()
            if features.shape != (len(places), self.width):
                raise DataError(f"{_SETTING}: {self.config.model} gave shape {tuple(features.shape)}, expected {(len(places), self.width)}")
            values[places] = features.cpu().numpy()
        return values

    def _stack(self, values: list[Tensor]) -> Tensor:
        """On the device; floating-point inputs in the network's precision."""
        stacked = torch.stack(values)
        if stacked.is_floating_point():
            stacked = stacked.to(self.dtype)
        if self.device.type == "cuda":
            stacked = stacked.pin_memory()
        return stacked.to(self.device, non_blocking=True)
