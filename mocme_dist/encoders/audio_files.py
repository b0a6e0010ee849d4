"""Decodes audio files to samples: known formats, one channel, bounded length, no truncated files.

The only module that imports soundfile (libsndfile). It reads WAV, FLAC, Ogg with Vorbis or Opus, and MP3, recognised by
content and not by name. A truncated file is refused if the format shows it: WAV and MP3 with a Xing header by their
declared length, FLAC by its number of samples, Ogg by its last page.

`resample` is our own because it must be exact for any pair of rates and need no further package.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np

from mocme_dist.encoders.encoder import BadFile
from mocme_dist.errors import ConfigError

FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3", "MPEG")
MIN_RATE = 1_000
MAX_RATE = 384_000
_BLOCK = 1 << 20  # numbers per read, over all channels


def require_soundfile() -> Any:
    """Return the soundfile package.

    Raises:
        ConfigError: it is missing, or its libsndfile is older than 1.1, the first with MP3 and Opus.
    """
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"modality audio: package soundfile cannot be imported ({error}); pip install 'mocme-dist[media]'"
        ) from None
    version = str(soundfile.__libsndfile_version__)
    if tuple(int(part) for part in version.split(".")[:2]) < (1, 1):
        raise ConfigError(
            f"modality audio: libsndfile {version}, expected 1.1 or newer; pip install -U 'mocme-dist[media]'"
        )
    return soundfile


def decode_audio(content: bytes, rate: int, seconds: float, max_seconds: float) -> np.ndarray:
    """Return an audio file as samples of one channel.

    Args:
        content: the whole file.
        rate: sampling rate of the result in Hz.
        seconds: only the beginning of this length is decoded.
        max_seconds: a longer file is refused.

    Returns:
        (n,) float32, the mean of the channels with full scale 1; n <= seconds * rate, rounded up.

    Raises:
        BadFile: cause 'empty file', 'not audio', 'too long', 'odd sample rate', 'truncated', 'undecodable' or 'no
            samples'.
    """
    soundfile = require_soundfile()
    if not content:
        raise BadFile("empty file", "0 bytes")
    if not _looks_like_sound(content):
        raise BadFile("not audio", f"{len(content)} bytes that are none of WAV, FLAC, OGG, MP3: {content[:16]!r}")
    if _is_cut(content):
        raise BadFile(
            "truncated", f"the file ends after {len(content)} bytes, its own header or last page says it is longer"
        )
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            if file.format not in FORMATS:
                raise BadFile("not audio", f"format {file.format}, expected one of WAV, FLAC, OGG, MP3")
            if not MIN_RATE <= file.samplerate <= MAX_RATE:
                raise BadFile(
                    "odd sample rate", f"{file.samplerate} samples a second, expected {MIN_RATE} to {MAX_RATE}"
                )
            if file.frames > max_seconds * file.samplerate:
                raise BadFile("too long", f"{file.frames / file.samplerate:,.0f} s, limit {max_seconds:,.0f} s")
            wanted = min(file.frames, math.ceil(seconds * file.samplerate))
            samples = _read(file, wanted)
            own_rate = int(file.samplerate)
    except BadFile:
        raise
    except (RuntimeError, ValueError, TypeError, OSError, MemoryError) as error:  # LibsndfileError is a RuntimeError
        # not str(error): it contains an address in memory, and reports of reruns must be equal
        raise BadFile(
            "undecodable", getattr(error, "error_string", str(error)).strip() or type(error).__name__
        ) from None
    if len(samples) < wanted:
        raise BadFile("truncated", f"{len(samples):,} samples of {wanted:,}")
    if not wanted:
        raise BadFile("no samples", "the file lasts 0 s")
    return resample(samples, own_rate, rate)


def _read(file: Any, wanted: int) -> np.ndarray:
    """Return the first `wanted` samples, or fewer, channels averaged; memory does not grow with the channels."""
    samples = np.empty(wanted, dtype=np.float32)
    done = 0
    while done < wanted:
        block = file.read(min(wanted - done, max(1, _BLOCK // file.channels)), dtype="float32", always_2d=True)
        if not len(block):
            break
        samples[done : done + len(block)] = block.mean(axis=1)
        done += len(block)
    return samples[:done]


def resample(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Return samples at another rate: the spectrum is cut, or padded with zeros, at the lower Nyquist rate.

    Args:
        samples: (n,) float32 at `rate`.
        rate, wanted: sampling rates in Hz.

    Returns:
        (ceil(n * wanted / rate),) float32.

    Source: scipy.signal.resample does the same; checked against sines in tests/encoders/test_audio_files.py.
    """
    if rate == wanted or not len(samples):
        return samples
    period = rate // math.gcd(rate, wanted)
    # zeros up to whole periods make the new length exact; one more period separates the end from the beginning
    padded = _smooth(-(-len(samples) // period) + 1) * period
    length = padded // period * (wanted // math.gcd(rate, wanted))
    spectrum = np.fft.rfft(samples, padded)[: (min(padded, length) + 1) // 2]
    result = np.fft.irfft(spectrum, length) * np.float32(length / padded)
    return np.ascontiguousarray(result[: -(-len(samples) * wanted // rate)], dtype=np.float32)


def _smooth(number: int) -> int:
    """Return the smallest number >= `number` without prime factors above 5.

    Other Fourier transforms take much longer.
    """
    while True:
        rest = number
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return number
        number += 1


def _looks_like_sound(content: bytes) -> bool:
    if content[:4] in (b"RIFF", b"RF64"):
        return content[8:12] == b"WAVE"
    # an MP3 frame begins with eleven ones; layer bits 00 are reserved
    frame = len(content) > 1 and content[0] == 0xFF and content[1] & 0xE0 == 0xE0 and content[1] & 0x06 != 0
    return content[:4] in (b"fLaC", b"OggS") or content[:3] == b"ID3" or frame


def _is_cut(content: bytes) -> bool:
    """Return whether the file itself declares a greater length."""
    if content[:4] == b"RIFF":
        size = int.from_bytes(content[4:8], "little")
        return (
            size not in (0, 0xFFFFFFFF) and size + 8 > len(content) + 1
        )  # streaming writers leave it open; some omit the pad byte
    if content[:4] == b"OggS":
        page = content.rfind(b"OggS\0")
        segments = content[page + 26 : page + 27]
        table = content[page + 27 : page + 27 + segments[0]] if segments else b""
        whole = bool(segments) and len(table) == segments[0] and page + 27 + len(table) + sum(table) <= len(content)
        return not (whole and content[page + 5] & 4)  # flag 4: last page of the stream
    return content[:4] != b"fLaC" and _is_cut_mp3(content)


def _is_cut_mp3(content: bytes) -> bool:
    """Return whether the Xing or Info header of an MP3 declares more bytes than there are."""
    frame = 0
    if content[:3] == b"ID3" and len(content) >= 10:  # its texts may contain the words Xing and Info
        frame = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(content[6:10], (21, 14, 7, 0), strict=True))
        frame += 10 if content[5] & 0x10 else 0  # a footer
    for place in (
        frame + 13,
        frame + 21,
        frame + 36,
    ):  # after the side information of MPEG 2 mono, MPEG 1 mono or 2 stereo, 1 stereo
        if content[place : place + 4] not in (b"Xing", b"Info"):
            continue
        flags = int.from_bytes(content[place + 4 : place + 8], "big")
        told = place + 8 + (4 if flags & 1 else 0)
        if len(content) < place + 8 or (flags & 2 and len(content) < told + 4):
            return True
        # flag 2: the number of bytes is given, counted from the frame that holds the header
        return bool(flags & 2) and int.from_bytes(content[told : told + 4], "big") > len(content) - frame
    return False
