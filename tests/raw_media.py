"""Picture, sound and film files, good and bad, and a small raw folder with texts, numbers and pictures."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

NUM_ENTITIES = 23


def picture(seed: int, size: tuple[int, int] = (40, 30), mode: str = "RGB", kind: str = "PNG") -> bytes:
    """Noise as a picture file; equal seeds give equal bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG file that claims to be that large and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")
    )


SOUNDS = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", None),
}


def sound(kind: str, hertz: float = 440.0, rate: int = 16_000, seconds: float = 1.0, channels: int = 1) -> bytes:
    """A sine of half scale as a sound file; further channels are silent."""
    import soundfile

    samples = np.zeros((round(rate * seconds), channels), dtype=np.float32)
    samples[:, 0] = 0.5 * np.sin(2 * np.pi * hertz * np.arange(len(samples)) / rate)
    buffer = io.BytesIO()
    container, coding = SOUNDS[kind]
    soundfile.write(buffer, samples, rate, format=container, subtype=coding)
    return buffer.getvalue()


FILMS = {"mp4": "libx264", "mov": "mpeg4", "webm": "libvpx-vp9", "mkv": "libx264"}


def film(kind: str, greys: list[int], rate: int = 10, size: int = 48) -> bytes:
    """A film of plain grey frames."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska" if kind == "mkv" else kind) as container:
        stream = container.add_stream(FILMS[kind], rate=rate)
        stream.width = stream.height = size
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        for grey in greys:
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.full((size, size, 3), grey, np.uint8), format="rgb24"))
            )
        container.mux(stream.encode())
    return buffer.getvalue()


def animation(kind: str, greys: list[int], size: int = 20) -> bytes:
    """Plain grey frames as an animated GIF, WEBP or PNG."""
    frames = [Image.new("RGB", (size, size), (grey, grey, grey)) for grey in greys]
    buffer = io.BytesIO()
    frames[0].save(
        buffer,
        kind,
        save_all=True,
        append_images=frames[1:],
        duration=100,
        **({"lossless": True} if kind == "WEBP" else {}),
    )
    return buffer.getvalue()


def write_raw(raw: Path) -> Path:
    """A ring of entities.

    E0 to e5 have pictures (e1 two, e4 and e5 bad ones), even ones numbers, all but e7 texts, no one a note.
    """
    (raw / "images").mkdir(parents=True)
    names = [f"e{i}" for i in range(NUM_ENTITIES)]
    triples = [f"{names[i]}\tnext\t{names[(i + 1) % NUM_ENTITIES]}\n" for i in range(NUM_ENTITIES)]
    (raw / "train.txt").write_text("".join(triples))
    (raw / "valid.txt").write_text("e0\tnext\te5\n")
    (raw / "test.txt").write_text("e1\tnext\te6\n")
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    texts = [
        f"{name}\t{name if name != 'e7' else ''}\t{' '.join(words[: i % 9])}\t\n"
        for i, name in enumerate(names)
        if name != "e7"
    ]
    (raw / "text.tsv").write_text("entity\tlabel\tdescription\tnote\n" + "".join(texts))
    numbers = [f"{name}\theight\t{i}\n" for i, name in enumerate(names) if i % 2 == 0] + [
        "e0\tpeople\t1000000\n",
        "e2\tpeople\t3\n",
    ]
    (raw / "numeric.tsv").write_text("entity\tattribute\tvalue\n" + "".join(numbers))
    whole = picture(4)
    files = {
        "e0.png": picture(0),
        "e1a.png": picture(1),
        "e1b.jpg": picture(11, kind="JPEG"),
        "e2.webp": picture(2, kind="WEBP"),
        "e3.gif": picture(3, kind="GIF"),
        "e4.png": whole[: len(whole) // 2],
        "e5.png": b"<html>404</html>",
    }
    for name, content in files.items():
        (raw / "images" / name).write_bytes(content)
    (raw / "images.tsv").write_text("entity\tfile\n" + "".join(f"{name[:2]}\timages/{name}\n" for name in files))
    return raw
