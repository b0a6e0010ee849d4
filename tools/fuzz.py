"""Fuzzing of every parser of the package: `python -m tools.fuzz --minutes 10`.

A target is a parser with valid examples. Its input is an example with edits: bytes changed, removed, repeated or
replaced by hostile pieces, and for JSON also values replaced by values of other types. A parser may refuse its input
with a `MocmeError` or a `BadFile`; any other exception is a bug: each kind is printed once with an input, and the exit
code is 1. CI runs the same targets for seconds with edits by Hypothesis, which shrinks a failing input
(tests/test_fuzz.py).
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import logging
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from mocme_dist import console
from mocme_dist.config import dump_config, load_config
from mocme_dist.config.schema import DataConfig
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.feature_parts import part_path, read_part_record, write_part
from mocme_dist.data.known import load_integers
from mocme_dist.data.modalities import Spill, collect
from mocme_dist.data.packing import pack_folder
from mocme_dist.data.shards import read_shard
from mocme_dist.data.triples import read_splits
from mocme_dist.data.tsv import RawFile, Table
from mocme_dist.data.vectors import open_vectors
from mocme_dist.data.vocabulary import read_entity_file
from mocme_dist.encoders.audio_files import decode_audio
from mocme_dist.encoders.encoder import BadFile
from mocme_dist.encoders.image_files import decode_frames, decode_image
from mocme_dist.errors import MocmeError

# Inputs are written there if it exists: a file system in memory.
_MEMORY = Path("/dev/shm")
IDS = {b"a": 0, b"b": 1, b"c": 2}
# Pieces that parsers have tripped over: separators, marks, numbers beyond 64 bits, nesting, tags, escapes, NaN.
HOSTILE = [
    *(
        b"\t",
        b"\n",
        b"\r\n",
        b"\0",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\xc3",
        b"\xe2\x80\x8b",
        b"\xed\xa0\x80",
        b"\x1b[2J",
    ),
    *(
        b"9" * 30,
        b"9" * 5000,
        b"-1",
        b"1e999",
        b"nan",
        b"inf",
        b"1_0",
        b"0x10",
        b"[" * 600,
        b"{" * 600,
        b"'''",
        b"(" * 300,
    ),
    *(
        b"&a ",
        b"*a",
        b"!!int ",
        b"!!python/object:os.system ",
        b"? ",
        b"- ",
        b": ",
        b"<<: ",
        b"{",
        b"}",
        b"|\n",
        b"%YAML",
    ),
    *(b'"\\ud800"', b'"\\u0000"', b"null", b"true", b"[]", b"{}", b'{"__class__": 1}', b"../../x", b"pipe:id"),
    *(b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff", b"\x80"),
]
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    2**63,
    10**40,
    1.5,
    float("nan"),
    "",
    "x" * 300,
    "\0",
    "../x",
    "\ud800",
    [],
    {},
    [[]],
    {"a": []},
]


@dataclass(frozen=True)
class Target:
    """A parser: valid inputs, and a call that parses `content` with `folder` as its scratch space."""

    examples: list[bytes]
    parse: Callable[[bytes, Path], Any]
    is_json: bool = False


def _file(name: str, read: Callable[[Path], Any]) -> Callable[[bytes, Path], Any]:
    """Return a parser of files: the content is written to `name` first."""

    def parse(content: bytes, folder: Path) -> Any:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return read(path)

    return parse


def _collect(path: Path) -> Any:
    return collect(path.parent, IDS, Spill(path.parent / "spill", 4))


def _image(content: bytes, _: Path) -> Any:
    return decode_image(content, 16, 10_000), decode_frames(content, 2, 16, 10_000, 20, 60.0)


def _saved(save: Callable[[io.BytesIO], object]) -> bytes:
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()


def _images() -> list[bytes]:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(pixels)
    found = [_saved(partial(image.save, format=kind, exif=exif)) for kind in ("PNG", "JPEG", "WEBP")]
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    return [*found, _saved(lambda buffer: frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:]))]


def _audio() -> list[bytes]:
    import soundfile

    samples = np.sin(np.arange(1600) / 5).astype(np.float32)
    kinds = ("WAV", "FLAC", "OGG", "MP3")
    return [_saved(partial(soundfile.write, data=samples, samplerate=16_000, format=kind)) for kind in kinds]


def _vectors(suffix: str) -> Callable[[bytes, Path], Any]:
    def read(path: Path) -> Any:
        (path.parent / "image.ids").write_bytes(b"a\nb\nc\n")
        vectors = open_vectors(path.parents[1], "image", IDS)
        assert vectors is not None
        return [vectors.read(entity) for entity in vectors.entities(0, 3)]

    return _file(f"features/image{suffix}", read)


def _tensor_files() -> dict[str, bytes]:
    import torch
    from safetensors.torch import save

    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    return {
        ".npy": _saved(lambda buffer: np.save(buffer, values)),
        ".safetensors": save({"x": torch.from_numpy(values)}),
        ".pt": _saved(lambda buffer: torch.save(torch.from_numpy(values), buffer)),
    }


def make_targets(folder: Path) -> dict[str, Target]:
    """Return every target by name; `folder` keeps a small data set whose files are examples."""
    raw = folder / "raw"
    raw.mkdir()
    (raw / "train.txt").write_text("a\tr\tb\nb\tr\tc\nc\tr\ta\n")
    (raw / "valid.txt").write_text("a\tr\tc\n")
    (raw / "test.txt").write_text("b\tr\ta\n")
    (raw / "text.tsv").write_text("entity\tlabel\tdescription\na\tone\ttwo\nb\t\tthree\n")
    (raw / "numeric.tsv").write_text("entity\tattribute\tvalue\na\tyear\t1900\nb\tarea\t1e-3\n")
    dataset = pack_folder(raw, folder / "packed", DataConfig())
    packed = dataset.directory
    features = folder / "features"
    stats = {"failed": {}, "examples": [], "input_sha256": "0" * 64, "encoder_hash": "0" * 64}
    write_part(features, 0, np.ones((2, 3), np.float16), np.array([1, 0, 1], bool), stats)
    manifest = (packed / "manifest.json").read_bytes()
    shard = packed / "shards" / dataset.entries[0].name
    tensors = _tensor_files()

    def open_packed(content: bytes, _: Path) -> Any:
        (packed / "manifest.json").write_bytes(content)
        return Dataset.open(packed).triples("train").sum()

    return {
        "triples": Target(
            [(raw / "train.txt").read_bytes()],
            _file("t.txt", lambda path: read_splits({"train": RawFile(path)}, None, path.parent)),
        ),
        "tsv": Target(
            [(raw / "text.tsv").read_bytes()],
            _file("x.tsv", lambda path: list(Table(RawFile(path), ("entity",)).rows())),
        ),
        "gzip": Target(
            [_gzip((raw / "text.tsv").read_bytes())], _file("x.tsv.gz", lambda path: list(RawFile(path).lines()))
        ),
        "text": Target([(raw / "text.tsv").read_bytes()], _file("text.tsv", _collect)),
        "numeric": Target([(raw / "numeric.tsv").read_bytes()], _file("numeric.tsv", _collect)),
        "media": Target([b"entity\tfile\na\tx/y.png\nb\tz.png\n"], _file("images.tsv", _collect)),
        "entity2id": Target([b"3\na\t0\nb\t1\nc\t2\n"], _file("e.txt", lambda path: read_entity_file(RawFile(path)))),
        "configuration": Target(
            [dump_config(load_config()).encode(), b"train: {epochs: 3, seed: 1}\nmodalities: [structure, text]\n"],
            _file("c.yaml", lambda path: load_config([path])),
        ),
        "setting": Target(
            [b"train.epochs=3", b"data.text_columns=[a, b]"],
            lambda content, _: load_config([], [content.decode("utf8", "surrogateescape")]),
        ),
        "manifest": Target([manifest], open_packed, is_json=True),
        "feature part": Target(
            [part_path(features, 0).with_suffix(".json").read_bytes()],
            _file("part-000000.json", lambda path: read_part_record(path.parent, 0)),
            is_json=True,
        ),
        "shard": Target(
            [shard.read_bytes()], _file("entities-000000.tar", lambda path: list(read_shard(path, None, 1 << 16)))
        ),
        "array": Target([(packed / "graph" / "train.npy").read_bytes()], _file("x.npy", load_integers)),
        **{f"vectors{suffix}": Target([content], _vectors(suffix)) for suffix, content in tensors.items()},
        "image": Target(_images(), _image),
        "audio": Target(_audio(), lambda content, _: decode_audio(content, 16_000, 1.0, 60.0)),
    }


def _gzip(content: bytes) -> bytes:
    import gzip

    return gzip.compress(content, mtime=0)


class Source(Protocol):
    """Where edits come from.

    Hypothesis, which shrinks a failing input, or a random generator, which is 50 times faster.
    """

    def number(self, low: int, high: int) -> int:
        """Return a number in [low, high]."""

    def piece(self) -> bytes:
        """Return up to eight bytes."""


class Drawn:
    """Edits drawn by Hypothesis."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self._draw = draw

    def number(self, low: int, high: int) -> int:
        """Return a number in [low, high]."""
        return int(self._draw(st.integers(low, high)))

    def piece(self) -> bytes:
        """Return up to eight bytes."""
        return bytes(self._draw(st.binary(max_size=8)))


class Rolled:
    """Edits of a random generator."""

    def __init__(self, seed_number: int) -> None:
        self._random = random.Random(seed_number)

    def number(self, low: int, high: int) -> int:
        """Return a number in [low, high]."""
        return self._random.randint(low, high)

    def piece(self) -> bytes:
        """Return up to eight bytes."""
        return self._random.randbytes(self._random.randint(0, 8))


def edit(source: Source, target: Target) -> bytes:
    """Return an example of a target with a few edits."""
    content = target.examples[source.number(0, len(target.examples) - 1)]
    if target.is_json and source.number(0, 1):
        return _edit_json(source, content)
    for _ in range(source.number(1, 6)):
        place = source.number(0, len(content))
        length = (0, 0, 1, 2, 8, 64, 512)[source.number(0, 6)]
        kind = source.number(0, 2)
        piece = b"" if kind == 0 else source.piece() if kind == 1 else HOSTILE[source.number(0, len(HOSTILE) - 1)]
        content = content[:place] + piece + content[place + length :]
    return content


def _edit_json(source: Source, content: bytes) -> bytes:
    """Replace values, deep inside too, by values of any type."""
    value = json.loads(content)
    for _ in range(source.number(1, 3)):
        node = value
        while keys := list(node) if isinstance(node, dict) else list(range(len(node))):
            key = keys[source.number(0, len(keys) - 1)]
            if isinstance(node[key], dict | list) and source.number(0, 1):
                node = node[key]
                continue
            node[key] = copy.deepcopy(VALUES[source.number(0, len(VALUES) - 1)])
            break
    return json.dumps(value).encode()


def check(name: str, target: Target, content: bytes, folder: Path) -> None:
    """Parse one input; a refusal must be one line.

    Raises:
        Exception: whatever a parser raises instead of a `MocmeError` or a `BadFile`.
    """
    try:
        target.parse(content, folder)
    except (MocmeError, BadFile) as error:
        assert "\n" not in str(error), f"{name}: a message of several lines: {error}"


def fuzz(name: str, target: Target, examples: int, seed_number: int) -> None:
    """Parse `examples` inputs edited by Hypothesis; see `check`."""
    with tempfile.TemporaryDirectory(prefix="mocme-fuzz-") as folder:

        @seed(seed_number)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        )
        @given(st.data())
        def one(data: st.DataObject) -> None:
            check(name, target, edit(Drawn(data.draw), target), Path(folder))

        one()


@dataclass
class Counts:
    """What a target has met.

    Attributes:
        crashes: an input by kind of exception and place; each is a bug.
    """

    inputs: int = 0
    crashes: dict[str, bytes] = field(default_factory=dict)


def fuzz_until(name: str, target: Target, seed_number: int, deadline: float, most: int) -> Counts:
    """Parse randomly edited inputs until `deadline` on the monotonic clock, or until there were `most`. See `check`."""
    source = Rolled(seed_number)
    counts = Counts()
    with tempfile.TemporaryDirectory(prefix="mocme-fuzz-", dir=_MEMORY if _MEMORY.is_dir() else None) as folder:
        while time.monotonic() < deadline and counts.inputs < most:
            content = edit(source, target)
            counts.inputs += 1
            try:
                check(name, target, content, Path(folder))
            except Exception as error:
                frames = [
                    frame for frame in traceback.extract_tb(error.__traceback__) if "mocme_dist" in frame.filename
                ]
                place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
                key = f"{name}: {type(error).__name__}{place}"
                if len(counts.crashes) < 20 and not any(known.startswith(key) for known in counts.crashes):
                    counts.crashes[f"{key}: {str(error)[:200]}"] = content
    return counts


def main() -> int:
    """Parse the command line, fuzz every target for its share of the time, print counts as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="for all targets together; default 10")
    parser.add_argument("--most", type=int, default=sys.maxsize, metavar="N", help="at most N inputs per target")
    parser.add_argument("--target", action="append", metavar="NAME", help="only this target; may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="of the edits; default 0")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mocme-fuzz-") as name:
        folder = Path(name)
        targets = make_targets(folder)
        if args.target is None or set(args.target) - set(targets):
            from tools.fuzz_runs import make_run, run_targets

            targets |= {key: Target(*parts) for key, parts in run_targets(*make_run(folder), folder).items()}
        names = args.target or list(targets)
        if unknown := sorted(set(names) - set(targets)):
            parser.error(f"--target {unknown[0]}: expected one of {', '.join(targets)}")
        logging.disable()
        console.filter_stderr()  # libmpg123 writes a line per damaged frame
        found: dict[str, Counts] = {}
        for place, key in enumerate(names):
            deadline = time.monotonic() + 60 * args.minutes / len(names)
            found[key] = fuzz_until(key, targets[key], args.seed, deadline, args.most)
            print(f"{key}: {found[key].inputs:,} inputs ({place + 1}/{len(names)})", file=sys.stderr, flush=True)
            for kind, content in found[key].crashes.items():
                print(f"CRASH {kind}\n  {content[:2000]!r}", file=sys.stderr, flush=True)
    crashes = sum(len(counts.crashes) for counts in found.values())
    counted = {key: counts.inputs for key, counts in found.items()}
    print(json.dumps({"inputs": sum(counted.values()), "crashes": crashes, "seed": args.seed, "targets": counted}))
    return 1 if crashes else 0


if __name__ == "__main__":
    sys.exit(main())
