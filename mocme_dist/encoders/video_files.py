"""Decodes video files to a few frames: known containers, bounded frames, seconds and pixels, no truncated files.

pillow reads animated WebP, GIF and PNG (`encoders.image_files`); PyAV reads MP4 and similar containers, Matroska and
WebM. The only module that imports av. The content, not the name, decides the container, which is fixed before FFmpeg
sees the file, so that none of its formats which open further files or addresses (playlists, scripts) can be reached.
Frames with damage that a decoder conceals are refused. A truncated container is detected by its own sizes and refused,
because FFmpeg decodes such a file up to its end and PyAV reports no error.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np

from mocme_dist.config.schema import VideoEncoderConfig
from mocme_dist.encoders.encoder import BadFile
from mocme_dist.encoders.image_files import decode_frames, middles, shrink
from mocme_dist.errors import ConfigError

_SEEK_S = 10.0  # seek to a frame that is farther ahead than this, decode up to a nearer one
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")
_EBML = b"\x1a\x45\xdf\xa3"
_SEGMENT = b"\x18\x53\x80\x67"


def require_av() -> Any:
    """Return the av package (PyAV) with its own log switched off, because bad files are counted.

    Raises:
        ConfigError: it is missing.
    """
    try:
        import av
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"modality video: package av cannot be imported ({error}); pip install 'mocme-dist[media]'"
        ) from None
    av.logging.set_level(None)
    return av


def decode_video(content: bytes, config: VideoEncoderConfig, size: int, max_pixels: int) -> np.ndarray:
    """Return frames of a video: the middles of `config.frames` equal parts, or all frames if there are fewer.

    Args:
        content: the whole file.
        config: number of frames, and limits.
        size: each frame is resized to size x size pixels.
        max_pixels: larger frames are refused.

    Returns:
        (k, size, size, 3) uint8, 1 <= k <= config.frames.

    Raises:
        BadFile: cause 'empty file', 'not a video', 'too large', 'too long', 'truncated', 'damaged' or 'undecodable'.
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
        with av.open(io.BytesIO(content), format=container, metadata_errors="ignore") as video:
            if not video.streams.video:
                raise BadFile("not a video", "no video track")
            return _frames(video, video.streams.video[0], config, size, max_pixels)
    except BadFile:
        raise
    except (av.error.FFmpegError, ValueError, OSError, MemoryError, OverflowError) as error:
        raise BadFile("undecodable", getattr(error, "strerror", None) or str(error) or type(error).__name__) from None


def _frames(video: Any, stream: Any, config: VideoEncoderConfig, size: int, max_pixels: int) -> np.ndarray:
    context = stream.codec_context
    if context is None:
        raise BadFile("undecodable", "a codec that this FFmpeg does not have")
    _check_size(context, max_pixels)
    context.thread_count = 1  # an actor may use only the CPUs that it requested
    context.options = {"max_pixels": str(max_pixels)}  # the size may change within a stream
    times = []
    for packet in video.demux(stream):
        if packet.pts is not None:
            times.append(packet.pts)
        if len(times) > config.max_frames:
            raise BadFile("too long", f"more than {config.max_frames:,} frames")
    if not times:
        raise BadFile("undecodable", "the video track holds no frame")
    times.sort()
    length_s = float((times[-1] - times[0]) * stream.time_base)
    if length_s > config.max_seconds:
        raise BadFile("too long", f"{length_s:,.0f} s, limit {config.max_seconds:,.0f} s")
    wanted = [times[place] for place in middles(len(times), config.frames)]
    return np.stack([_shrunk(frame, size, max_pixels) for frame in _decoded_at(video, stream, wanted)])


def _decoded_at(video: Any, stream: Any, wanted: list[int]) -> Iterator[Any]:
    """Yield the first frame at or after each time, ascending; the last frame stands for later times."""
    far = _SEEK_S / float(stream.time_base)
    here: float = float("-inf")
    decoder: Iterator[Any] = iter(())
    last: Any = None
    for time in wanted:
        if time - here > far:
            video.seek(int(time), stream=stream)
            decoder = video.decode(stream)
        frame = next((frame for frame in decoder if frame.pts is not None and frame.pts >= time), last)
        if frame is None:
            raise BadFile("undecodable", "no frame of the video track can be decoded")
        last = frame
        here = time
        yield frame


def _check_size(frame: Any, max_pixels: int) -> None:
    if frame.width * frame.height > max_pixels:
        raise BadFile("too large", f"frames of {frame.width} x {frame.height} pixels, limit {max_pixels:,}")


def _shrunk(frame: Any, size: int, max_pixels: int) -> np.ndarray:
    _check_size(frame, max_pixels)
    if frame.is_corrupt:
        raise BadFile("damaged", f"the frame at {frame.time} s is damaged")
    return shrink(frame.to_ndarray(format="rgb24"), size)


def _container_of(content: bytes) -> str | None:
    """Return FFmpeg's name of the container, None for an animated image."""
    if (
        content[:4] == b"GIF8"
        or content[:8] == b"\x89PNG\r\n\x1a\n"
        or (content[:4] == b"RIFF" and content[8:12] == b"WEBP")
    ):
        return None
    if content[4:8] in _MP4_BOXES:
        return "mp4"
    if content[:4] == _EBML:
        return "matroska"
    raise BadFile(
        "not a video", f"{len(content)} bytes that are none of WEBP, GIF, PNG, MP4, Matroska: {content[:16]!r}"
    )


def _is_cut_gif(content: bytes) -> bool:
    # some writers append zeros to the trailer
    return content[:4] == b"GIF8" and content.rstrip(b"\0")[-1:] != b";"


def _mp4_end(content: bytes) -> int:
    """Return the declared end of the last top-level box of an MP4 file."""
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
    """Return the declared end of a Matroska segment; the end of the file if it was left open."""

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
