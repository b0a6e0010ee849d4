"""A run's vectors for other tools: npz, Parquet, word2vec text or a FAISS index, streamed block by block.

npz has all that is needed to recompute every score elsewhere: entities (E, D), first C = D / 2 columns real parts;
phases (R, C) radians; gamma; entity_names; relation_names. The score of (h, r, t) is
gamma - sum_c |h_c exp(i phase_c) - t_c|, and the answers to head queries are ranked by the same number.
"""

from __future__ import annotations

import re
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from mocme_dist import __version__
from mocme_dist.data.files import atomic_path, write_json
from mocme_dist.data.progress import Progress
from mocme_dist.errors import ConfigError, DataError, one_line
from mocme_dist.serving.bundle_format import FORMAT, MANIFEST, file_entries, staging
from mocme_dist.serving.rows import RunRows, source_of

FORMATS = ("npz", "parquet", "word2vec", "faiss")
_NAMES_AT_ONCE = 1 << 16
# What readers of word2vec's text form take for the end of a word or of a line, and the sign that escapes it.
_ESCAPED = re.compile(r"[\s%\x00-\x1f\x7f\x85]")


def export_other(rows: RunRows, target: Path, kind: str) -> dict[str, Any]:
    """Write a checkpoint's vectors to the folder `target` in the format `kind`, replacing an earlier export of it.

    Args:
        kind: npz (mocme.npz), parquet (entities.parquet, relations.parquet), word2vec (entities.txt, relations.txt) or
            faiss (entities.faiss with entities.parquet for names, and relations.parquet).

    Raises:
        ConfigError: `target` holds something else, or faiss is not installed.
        LockedError, StorageError: see `bundle_format.staging`.
    """
    write: Callable[[RunRows, Path], None] = {
        "npz": _write_npz,
        "parquet": _write_parquet,
        "word2vec": _write_word2vec,
        "faiss": _write_faiss,
    }[kind]
    if kind == "faiss":
        _faiss()
    with staging(target, kind, source_of(rows, format=FORMAT, kind=kind)) as folder:
        (folder / MANIFEST).unlink(missing_ok=True)
        write(rows, folder)
        manifest = {
            "format": FORMAT,
            "kind": kind,
            "mocme_dist": __version__,
            "num_entities": rows.dataset.num_entities,
            "num_relations": rows.dataset.num_relations,
            "width": rows.model.blocks.total,
            "gamma": rows.config.rotate.gamma,
            "trained": {
                "step": rows.saved.step,
                "valid_mrr": rows.saved.manifest.get("metric"),
                "dataset": rows.dataset.fingerprint,
            },
            "files": file_entries(folder),
        }
        write_json(folder / MANIFEST, manifest)
    return manifest


def _vectors(rows: RunRows) -> Iterator[NDArray[np.float32]]:
    """The fused vectors in order of id, a block at a time."""
    E = rows.dataset.num_entities
    # Opened in ranges of many blocks: opening verifies the feature parts that it touches.
    stride = max(1, (1 << 16) // rows.block_rows) * rows.block_rows
    with Progress("export", E, "entities") as progress:
        for first in range(0, E, stride):
            for block in rows.blocks(first, min(E, first + stride)):
                yield block.z_nD.numpy()
                progress.add(block.last - block.first)


def _names(rows: RunRows, table: str) -> Iterator[list[str]]:
    """The names in order of id, some thousands at a time."""
    import pyarrow
    import pyarrow.parquet

    path = rows.dataset.directory / "graph" / f"{table}.parquet"
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_NAMES_AT_ONCE, columns=["name"]):
                yield batch["name"].to_pylist()
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        raise DataError(f"{path.absolute()}: cannot be read ({one_line(error)}); pack the data set again") from None


# -- npz


def _member(
    archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: Any, pieces: Iterator[NDArray[Any]]
) -> None:
    """One array of an npz, written piece by piece."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_2_0(file, header)  # type: ignore[arg-type]
        for piece in pieces:
            file.write(np.ascontiguousarray(piece, dtype).tobytes())


def _write_npz(rows: RunRows, folder: Path) -> None:
    with atomic_path(folder / "mocme.npz") as path, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        _member(archive, "entities", (rows.dataset.num_entities, rows.model.blocks.total), np.float32, _vectors(rows))
        phases = rows.phase_RC.numpy()
        _member(archive, "phases", phases.shape, np.float32, iter([phases]))
        _member(archive, "gamma", (), np.float64, iter([np.array(rows.config.rotate.gamma)]))
        for table, member in (("entities", "entity_names"), ("relations", "relation_names")):
            count = rows.dataset.num_entities if table == "entities" else rows.dataset.num_relations
            longest = max((len(name) for names in _names(rows, table) for name in names), default=1)
            _member(
                archive,
                member,
                (count,),
                f"<U{longest}",
                (np.array(names, f"<U{longest}") for names in _names(rows, table)),
            )


# -- Parquet


def _write_parquet(rows: RunRows, folder: Path) -> None:
    phases = rows.phase_RC.numpy()
    metadata = {
        b"gamma": str(rows.config.rotate.gamma).encode(),
        b"layout": b"first half of vector: real parts; second half: imaginary parts",
    }
    _write_table(
        folder / "entities.parquet",
        "vector",
        rows.model.blocks.total,
        _names(rows, "entities"),
        _vectors(rows),
        metadata,
    )
    _write_table(
        folder / "relations.parquet", "phase", phases.shape[1], _names(rows, "relations"), iter([phases]), metadata
    )


def _write_table(
    path: Path,
    column: str,
    width: int,
    names: Iterator[list[str]],
    vectors: Iterator[NDArray[np.float32]],
    metadata: dict[bytes, bytes],
) -> None:
    """Columns id, name and a list of `width` floats, a row group for every block of vectors."""
    import pyarrow
    import pyarrow.parquet

    listed = pyarrow.list_(pyarrow.float32(), width)
    schema = pyarrow.schema(
        [("id", pyarrow.int64()), ("name", pyarrow.large_string()), (column, listed)], metadata=metadata
    )
    waiting, first = _rechunk(names), 0
    with atomic_path(path) as temporary, pyarrow.parquet.ParquetWriter(temporary, schema) as writer:
        for block in vectors:
            ids = np.arange(first, first + len(block))
            values = pyarrow.FixedSizeListArray.from_arrays(
                pyarrow.array(np.ascontiguousarray(block).reshape(-1)), type=listed
            )
            writer.write_table(
                pyarrow.table(
                    {"id": ids, "name": pyarrow.array(waiting(len(block)), pyarrow.large_string()), column: values},
                    schema,
                )
            )
            first += len(block)


def _rechunk(names: Iterator[list[str]]) -> Callable[[int], list[str]]:
    """A function that takes the next n names."""
    waiting: list[str] = []

    def take(count: int) -> list[str]:
        while len(waiting) < count:
            waiting.extend(next(names))
        taken = waiting[:count]
        del waiting[:count]
        return taken

    return take


# -- word2vec


def _write_word2vec(rows: RunRows, folder: Path) -> None:
    phases = rows.phase_RC.numpy()
    _write_text(
        folder / "entities.txt",
        rows.dataset.num_entities,
        rows.model.blocks.total,
        _names(rows, "entities"),
        _vectors(rows),
    )
    _write_text(folder / "relations.txt", len(phases), phases.shape[1], _names(rows, "relations"), iter([phases]))
    write_json(folder / "gamma.json", {"gamma": rows.config.rotate.gamma})


def _write_text(
    path: Path, count: int, width: int, names: Iterator[list[str]], vectors: Iterator[NDArray[np.float32]]
) -> None:
    """Write word2vec's text form: a line with count and width, then a word and its numbers per line; see `word_of`."""
    take = _rechunk(names)
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf8", newline="\n") as file:
        file.write(f"{count} {width}\n")
        for block in vectors:
            for name, vector in zip(take(len(block)), block, strict=True):
                file.write(f"{word_of(name)} {' '.join(map('{:.9g}'.format, vector.tolist()))}\n")


def word_of(name: str) -> str:
    """The name with white space, control characters and % as in URLs, so that `urllib.parse.unquote` restores it."""
    return _ESCAPED.sub(_quoted, name)


def _quoted(found: re.Match[str]) -> str:
    return quote(found[0], safe="")


# -- FAISS


def _faiss() -> Any:
    """The module.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise ConfigError("--format faiss needs faiss-cpu; pip install 'mocme-dist[faiss]'") from None
    return faiss


def _faiss_header(faiss: Any, width: int, count: int) -> bytes:
    """The bytes of an exact index file before its `count` vectors: type, width, count, ..., number of floats."""
    header = bytearray(faiss.serialize_index(faiss.IndexFlatL2(width)).tobytes())
    struct.pack_into("<q", header, 8, count)
    struct.pack_into("<q", header, len(header) - 8, count * width)
    return bytes(header)


def _write_faiss(rows: RunRows, folder: Path) -> None:
    """Write an exact index of the vectors by squared Euclidean distance, whose ids are rows.

    FAISS itself would hold all vectors in memory to write them; its file is a header and the vectors.

    Raises:
        ConfigError: this version of faiss writes another file.
    """
    faiss, width = _faiss(), rows.model.blocks.total
    one = faiss.IndexFlatL2(width)
    one.add(np.ones((1, width), np.float32))
    if faiss.serialize_index(one).tobytes() != _faiss_header(faiss, width, 1) + np.ones(width, np.float32).tobytes():
        raise ConfigError(f"--format faiss: faiss {faiss.__version__} has another file format; install an older one")
    with atomic_path(folder / "entities.faiss") as path, path.open("wb") as file:
        file.write(_faiss_header(faiss, width, rows.dataset.num_entities))
        for block in _vectors(rows):
            file.write(np.ascontiguousarray(block, np.float32).tobytes())
    source = rows.dataset.directory / "graph" / "entities.parquet"
    shutil.copyfile(source, folder / "entities.parquet")
    phases = rows.phase_RC.numpy()
    metadata = {b"gamma": str(rows.config.rotate.gamma).encode()}
    names = _names(rows, "relations")
    _write_table(folder / "relations.parquet", "phase", phases.shape[1], names, iter([phases]), metadata)
