"""A file of questions to a file of answers, block by block."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mocme_dist.data.files import atomic_path
from mocme_dist.data.progress import Progress
from mocme_dist.errors import ConfigError, DataError
from mocme_dist.serving.bundle import Bundle
from mocme_dist.serving.names import Names
from mocme_dist.serving.predict import Question, columns_of, predict

_BLOCK = 4096
_SUFFIXES = (".parquet", ".tsv", ".jsonl")
_EXAMPLES = 10


def read_questions(path: Path) -> list[Question]:
    """Questions of a file: head TAB relation TAB tail a line; ? or nothing stands for what is asked for.

    Raises:
        DataError: the file cannot be read, or a line has not three fields, no relation, or no side.
    """
    try:
        lines = path.read_text(encoding="utf8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path.absolute()}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    questions = []
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        fields = [field if field not in ("?", "") else None for field in line.split("\t")]
        if len(fields) != 3:
            raise DataError(
                f"{path.absolute()}:{number}: expected 3 tab-separated fields (head, relation, tail; ? is asked for), got {len(fields)}"
            )
        head, relation, tail = fields
        if relation is None or (head is None and tail is None):
            raise DataError(f"{path.absolute()}:{number}: a question needs a relation, and a head or a tail")
        questions.append(Question(head, relation, tail))
    if not questions:
        raise DataError(f"{path.absolute()}: holds no question; expected head TAB relation TAB tail with ? for what is asked")
    return questions


def check_names(bundle: Bundle, questions: list[Question], path: Path) -> None:
    """Look every name up before the first answer is computed.

    Raises:
        DataError: some are unknown; the first ten are named with what they may have meant.
    """
    entities = dict.fromkeys(name for head, _, tail in questions for name in (head, tail) if isinstance(name, str))
    problems = [*_unknown(bundle.relations, [q.relation for q in questions]), *_unknown(bundle.entities, list(entities))]
    if problems:
        more = f"; and {len(problems) - _EXAMPLES} more" if len(problems) > _EXAMPLES else ""
        raise DataError(
            f"{path.absolute()}: {len(problems)} names are unknown: " + "; ".join(_told(*p) for p in problems[:_EXAMPLES]) + more
        )


def _unknown(names: Names, wanted: list[str]) -> list[tuple[Names, str]]:
    found = names.find(wanted)
    return [(names, name) for name in dict.fromkeys(wanted) if name not in found]


def _told(names: Names, name: str) -> str:
    try:
        names.id_of(name)
    except ConfigError as error:
        return str(error)
    return f"{names.kind} {name!r} is spelt with other capitals"


def answer_file(bundle: Bundle, queries: Path, output: Path, top: int, filter: str) -> dict[str, Any]:
    """Answer all questions of a file into `output`, whole or not at all.

    Returns:
        Counts, for the command's last line.

    Raises:
        ConfigError: the suffix of `output` is none of .parquet, .tsv, .jsonl. DataError: see above.
        StorageError: it cannot be written.
    """
    if output.suffix not in _SUFFIXES:
        raise ConfigError(f"--output {output}: expected a name that ends in {', '.join(_SUFFIXES)}")
    questions = read_questions(queries)
    check_names(bundle, questions, queries)
    rows = 0
    with atomic_path(output.absolute()) as temporary, Progress("query", len(questions), "questions") as progress:
        blocks = _answers(bundle, questions, top, filter, progress)
        rows = _WRITERS[output.suffix](temporary, blocks)
    return {"output": str(output), "questions": len(questions), "answers": rows}


def _answers(bundle: Bundle, questions: list[Question], top: int, filter: str, progress: Progress) -> Iterator[dict[str, Any]]:
    for start in range(0, len(questions), _BLOCK):
        block = questions[start : start + _BLOCK]
        columns = columns_of(predict(bundle, block, top, filter))
        columns["question"] = columns["question"] + start
        yield columns
        progress.add(len(block))


def _write_parquet(path: Path, blocks: Iterator[dict[str, Any]]) -> int:
    import pyarrow
    import pyarrow.parquet

    text, number = pyarrow.large_string(), pyarrow.float64()
    kinds = {"question": pyarrow.int64(), "rank": number, "score": number, "probability": number, "known": pyarrow.bool_()}
    rows, writer = 0, None
    try:
        for columns in blocks:
            schema = pyarrow.schema([(name, kinds.get(name, text)) for name in columns])
            writer = writer or pyarrow.parquet.ParquetWriter(path, schema)
            table = pyarrow.table(columns, schema)
            rows += len(table)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()
    return rows


def _write_tsv(path: Path, blocks: Iterator[dict[str, Any]]) -> int:
    rows = 0
    with path.open("w", encoding="utf8", newline="") as file:
        for columns in blocks:
            if not rows:
                file.write("\t".join(columns) + "\n")
            for row in zip(*columns.values(), strict=True):
                file.write("\t".join(f"{value:.6g}" if isinstance(value, float) else str(value) for value in row) + "\n")
                rows += 1
    return rows


def _write_jsonl(path: Path, blocks: Iterator[dict[str, Any]]) -> int:
    rows = 0
    with path.open("w", encoding="utf8") as file:
        for columns in blocks:
            plain = {name: column if isinstance(column, list) else column.tolist() for name, column in columns.items()}
            for row in zip(*plain.values(), strict=True):
                # NaN is no JSON: where a bundle has no calibration the probability is null
                values = {name: None if value != value else value for name, value in zip(plain, row, strict=True)}
                file.write(json.dumps(values, ensure_ascii=False) + "\n")
                rows += 1
    return rows


_WRITERS = {".parquet": _write_parquet, ".tsv": _write_tsv, ".jsonl": _write_jsonl}
