"""Settings of the frozen encoders: a section a modality, and the actors that run them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mocme_dist.config.section import Section

Precision = Literal["float32", "bfloat16", "float16"]
_PRECISION: Any = Field(
    "float32",
    description="Arithmetic of the network; bfloat16 pays on CPUs with AMX and on GPUs, float16 on GPUs. Features change with it.",
)


class TextEncoderConfig(Section):
    """Frozen text encoder (transformers)."""

    model: str = Field("bert-base-uncased", description="Local folder, 'package:IMPORT_NAME/sub/folder', or a hub name.")
    random_weights: bool = Field(False, description="Build the model with random weights (tests); said loudly.")
    pooling: Literal["mean", "cls"] = Field("mean", description="How token vectors become one.")
    max_tokens: int = Field(128, ge=2, description="Longer texts are cut.")
    batch_size: int = Field(
        32, ge=1, description="Texts of max_tokens per forward pass; of shorter ones as many more as have their tokens."
    )
    precision: Precision = _PRECISION


class ImageEncoderConfig(Section):
    """Frozen picture encoder."""

    model: str = Field(
        "torchvision:vgg16",
        description="'torchvision:NAME', 'transformers:FOLDER_OR_NAME', or 'module:function' that returns a frozen encoder "
        "(see encoders/image.py).",
    )
    weights: str | None = Field(
        None,
        description="State-dict file (.pth read with weights_only, or .safetensors) for torchvision models; None asks torchvision's own.",
    )
    random_weights: bool = Field(False, description="Build the model with random weights (tests); said loudly.")
    size: int = Field(224, ge=8, description="Pictures are resized to size x size pixels.")
    batch_size: int = Field(16, ge=1, description="Pictures per forward pass.")
    precision: Precision = _PRECISION


class NumericEncoderConfig(Section):
    """Numbers per attribute: robust scaling, value and presence side by side."""

    max_attributes: int = Field(256, ge=1, description="The most frequent attributes kept; the rest are counted and left out.")


class AudioEncoderConfig(Section):
    """Frozen sound encoder; sounds are mixed to one channel and resampled first."""

    model: str = Field(
        "log_mel",
        description="'log_mel' (statistics of the log-mel spectrum, no weights), 'transformers:FOLDER_OR_NAME', or 'module:function' "
        "that returns a frozen encoder (see encoders/audio.py).",
    )
    random_weights: bool = Field(False, description="Build the transformers model with random weights (tests); said loudly.")
    sample_rate: int = Field(16_000, ge=1_000, le=384_000, description="Samples a second that log_mel hears; models have their own.")
    mels: int = Field(64, ge=4, le=256, description="Bands of log_mel; its features are 4 numbers a band.")
    seconds: float = Field(30.0, gt=0, description="Only the first so many seconds of a sound are heard.")
    max_seconds: float = Field(3600.0, gt=0, description="Sounds that last longer are refused unheard, counted as 'too long'.")
    batch_size: int = Field(8, ge=1, description="Sounds collated together; those of equal length share a forward pass.")
    # not bfloat16: eight bits of a waveform moved a wav2vec 2.0's features by a third
    precision: Literal["float32", "float16"] = Field(
        "float32", description="Arithmetic of a network; float16 pays on GPUs. log_mel is float32 whatever it says."
    )


class VideoEncoderConfig(Section):
    """Films: frames sampled evenly, each through the picture encoder of encoders.image, mean and deviation over them."""

    frames: int = Field(8, ge=1, description="Frames of a film that are seen, the middles of as many equal parts; fewer if it has fewer.")
    max_seconds: float = Field(3600.0, gt=0, description="Films that last longer are refused undecoded, counted as 'too long'.")
    max_frames: int = Field(100_000, ge=1, description="Films of more frames are refused undecoded, counted as 'too long'.")
    batch_size: int = Field(4, ge=1, description="Films collated together; their frames run in batches of encoders.image.batch_size.")


class EncodersConfig(Section):
    """Frozen encoders, one section a modality, and the actors that run them."""

    text: TextEncoderConfig = TextEncoderConfig()
    image: ImageEncoderConfig = ImageEncoderConfig()
    numeric: NumericEncoderConfig = NumericEncoderConfig()
    audio: AudioEncoderConfig = AudioEncoderConfig()
    video: VideoEncoderConfig = VideoEncoderConfig()
    actors: int = Field(2, ge=1, description="Ray Data actors; each holds one encoder.")
    cpus_per_actor: float = Field(1, gt=0, description="CPUs (and torch threads) of an actor.")
    gpus_per_actor: float = Field(0, ge=0, description="GPUs of an actor; a fraction shares one.")
    dtype: Literal["float16", "float32"] = Field("float16", description="Type of feature values on disk.")
    strict: bool = Field(False, description="A sample that cannot be decoded stops the job instead of being counted as absent.")
    on_bad_shard: Literal["error", "skip"] = Field(
        "error", description="A shard that is cut or changed stops the job, or its entities are absent and the next run tries it again."
    )
    max_member_mb: int = Field(64, ge=1, description="Files above this are left unread and counted as 'too large'.")
    max_pixels: int = Field(50_000_000, ge=1, description="Pictures, and films with frames, above this are refused undecoded.")
