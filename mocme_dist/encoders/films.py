"""Film files to a few frames, strictly: known containers, bounded frames, seconds and pixels, no half-read files.

Animated WebP, GIF and PNG are read by pillow (`encoders.pictures`), MP4 and its kin and Matroska or WebM by PyAV; this is
the one module that imports av. A file's content says what it is, not its name: the container is fixed before FFmpeg sees
it, so none of its formats that open further files or addresses (playlists, scripts) can be reached. Damaged pictures that
a decoder conceals count as damage. A container that is cut is refused where its own sizes tell so.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np

from mocme_dist.config.schema import VideoEncoderConfig
from mocme_dist.encoders.encoder import BadFile
from mocme_dist.encoders.pictures import decode_frames, middles, shrink
from mocme_dist.errors import ConfigError

_SEEK_S = 10.0  # a wanted frame farther ahead is sought from its key frame, a nearer one decoded up to
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


def require_av() -> Any:
    """The av package (PyAV), silenced: what it would print of a bad file is counted instead.

    Raises:
        ConfigError: it is missing.
    """
    try:
        import av
    except (ImportError, OSError) as error:
        raise ConfigError(f"modality video: package av cannot be imported ({error}); pip install 'mocme-dist[media]'") from None
    av.logging.set_level(None)
    return av


def decode_film(content: bytes, config: VideoEncoderConfig, size: int, max_pixels: int) -> np.ndarray:
    """Frames of a film: the middles of `config.frames` equal parts of it, or all where it has fewer.

    Args:
        content: the whole file.
        config: how many frames, and the limits.
        size: each frame is resized to size x size pixels.
        max_pixels: larger frames are refused.

    Returns:
        (k, size, size, 3) uint8, 1 <= k <= config.frames.

    Raises:
        BadFile: cause 'empty file', 'not a film', 'too large', 'too long', 'truncated', 'damaged' or 'undecodable'.
    """
    if not content:
        raise BadFile("empty file", "0 bytes")
    container = _container_of(content)
    if container is None:
        if _is_cut_gif(content):
            raise BadFile("truncated", f"the GIF ends after {len(content)} bytes without its trailer")
        return decode_frames(content, config.frames, size, max_pixels, config.max_frames, config.max_seconds)
    if (_mp4_end if container == "mp4" else _matroska_end)(content) > len(content):
        raise BadFile("truncated", f"the file ends after {len(content)} bytes, its own sizes say it is longer")
    av = require_av()
    try:
        with av.open(io.BytesIO(content), format=container, metadata_errors="ignore") as film:
            if not film.streams.video:
                raise BadFile("not a film", "no picture track")
            return _frames(film, film.streams.video[0], config, size, max_pixels)
    except BadFile:
        raise
    except (av.error.FFmpegError, ValueError, OSError, MemoryError, OverflowError) as error:
        raise BadFile("undecodable", getattr(error, "strerror", None) or str(error) or type(error).__name__) from None


def _frames(film: Any, stream: Any, config: VideoEncoderConfig, size: int, max_pixels: int) -> np.ndarray:
    context = stream.codec_context
    if context is None:
        raise BadFile("undecodable", "a codec that this FFmpeg does not have")
    _check_size(context, max_pixels)
    context.thread_count = 1  # an actor owns the CPUs it asked for, no more
    context.options = {"max_pixels": str(max_pixels)}  # a stream may grow on the way
    times = []
    for packet in film.demux(stream):
        if packet.pts is not None:
            times.append(packet.pts)
        if len(times) > config.max_frames:
            raise BadFile("too long", f"more than {config.max_frames:,} frames")
    if not times:
        raise BadFile("undecodable", "the picture track holds no frame")
    times.sort()
    length_s = float((times[-1] - times[0]) * stream.time_base)
    if length_s > config.max_seconds:
        raise BadFile("too long", f"{length_s:,.0f} s, limit {config.max_seconds:,.0f} s")
    wanted = [times[place] for place in middles(len(times), config.frames)]
    return np.stack([_shrunk(frame, size, max_pixels) for frame in _decoded_at(film, stream, wanted)])


def _decoded_at(film: Any, stream: Any, wanted: list[int]) -> Iterator[Any]:
    """The first frame at or after each time, ascending; the last one there is stands for times after it."""
    far = _SEEK_S / float(stream.time_base)
    here: float = float("-inf")
    decoder: Iterator[Any] = iter(())
    last: Any = None
    for time in wanted:
        if time - here > far:
            film.seek(int(time), stream=stream)
            decoder = film.decode(stream)
        frame = next((frame for frame in decoder if frame.pts is not None and frame.pts >= time), last)
        if frame is None:
            raise BadFile("undecodable", "no frame of the picture track can be decoded")
        last, here = frame, time
        yield frame


def _check_size(picture: Any, max_pixels: int) -> None:
    if picture.width * picture.height > max_pixels:
        raise BadFile("too large", f"frames of {picture.width} x {picture.height} pixels, limit {max_pixels:,}")


def _shrunk(frame: Any, size: int, max_pixels: int) -> np.ndarray:
    _check_size(frame, max_pixels)
    if frame.is_corrupt:
        raise BadFile("damaged", f"the frame at {frame.time} s is damaged")
    return shrink(frame.to_ndarray(format="rgb24"), size)


def _container_of(content: bytes) -> str | None:
    """FFmpeg's name of the container, None for an animated picture."""
    if content[:4] == b"GIF8" or content[:8] == b"\x89PNG\r\n\x1a\n" or (content[:4] == b"RIFF" and content[8:12] == b"WEBP"):
        return None
    if content[4:8] in _MP4_BOXES:
        return "mp4"
    if content[:4] == _EBML:
        return "matroska"
    raise BadFile("not a film", f"{len(content)} bytes that are none of WEBP, GIF, PNG, MP4, Matroska: {content[:16]!r}")


def _is_cut_gif(content: bytes) -> bool:
    # some writers put zeros after the trailer
    return content[:4] == b"GIF8" and content.rstrip(b"\0")[-1:] != b";"


def _mp4_end(content: bytes) -> int:
    """Where the last top-level box of an MP4 file says that it ends."""
    place = 0
    while place + 8 <= len(content):
        size = int.from_bytes(content[place : place + 4], "big")
        if size == 1:  # the size follows in 64 bits
            size = int.from_bytes(content[place + 8 : place + 16], "big")
        if size == 0:  # up to the end of the file
            return len(content)
        if size < 8:
            raise BadFile("undecodable", f"byte {place}: a box of {size} bytes")
        place += size
    return place


def _matroska_end(content: bytes) -> int:
    """Where the segment of a Matroska file says that it ends; the end of the file where it was left open."""

    def number(place: int) -> tuple[int, int]:
        """(value of the size at `place`, -1 when unknown, and the place after it)."""
        first = content[place] if place < len(content) else 0
        length = 9 - first.bit_length()
        value = int.from_bytes(content[place : place + length], "big") & ((1 << 7 * length) - 1)
        return (-1 if value == (1 << 7 * length) - 1 else value), place + length

    size, place = number(4)
    place += size
    if content[place : place + 4] != _SEGMENT:
        return len(content)
    size, place = number(place + 4)
    return len(content) if size < 0 else place + size
