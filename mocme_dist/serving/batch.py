"""Answers to files.

A file of questions block by block, or the answers to one question, as Parquet, CSV, TSV or JSON.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mocme_dist.data.files import atomic_path, sweep
from mocme_dist.data.progress import Progress
from mocme_dist.errors import ConfigError, DataError
from mocme_dist.serving.bundle import Bundle
from mocme_dist.serving.names import Names
from mocme_dist.serving.predict import Answers, Question, predict

_BLOCK = 4096
_EXAMPLES = 10
_ASKED = ("?", "")
_ESCAPED = "\\?"  # the entity that is called ?


class Options(NamedTuple):
    """How questions are answered: number of answers, filter, candidates and range as of `predict`."""

    k: int = 10
    filter: str = "known"
    candidates: list[str] | None = None
    range: bool = False


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 file, without a byte order mark and carriage returns.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path.absolute()}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return [line.removesuffix("\r") for line in text.split("\n")]


def read_questions(path: Path) -> list[Question]:
    """Return the questions of a file: head TAB relation TAB tail per line; ? or nothing stands for what is asked.

    The entity that is called ? is written as a backslash and ?.

    Raises:
        DataError: the file cannot be read, or a line has not three fields, no relation, or no side.
    """
    questions = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        fields = [None if field in _ASKED else "?" if field == _ESCAPED else field for field in line.split("\t")]
        if len(fields) != 3:
            raise DataError(
                f"{path.absolute()}:{number}: expected 3 tab-separated fields (head, relation, tail; ? is asked for), "
                f"got {len(fields)}"
            )
        head, relation, tail = fields
        if relation is None or (head is None and tail is None):
            raise DataError(f"{path.absolute()}:{number}: a question needs a relation, and a head or a tail")
        questions.append(Question(head, relation, tail))
    if not questions:
        raise DataError(
            f"{path.absolute()}: holds no question; expected head TAB relation TAB tail with ? for what is asked"
        )
    return questions


def read_candidates(path: Path, bundle: Bundle) -> list[str]:
    """Return the entities that a file lists, one per line.

    Raises:
        DataError: the file cannot be read, lists nothing, or lists names that are unknown or ambiguous.
    """
    names = [line for line in read_lines(path) if line.strip()]
    if not names:
        raise DataError(f"{path.absolute()}: lists no entity; expected one per line")
    _refuse(_problems(bundle.entities, names), path)
    return names


def check_names(bundle: Bundle, questions: list[Question], path: Path) -> None:
    """Look up all names before the first answer is computed.

    Raises:
        DataError: some are unknown or ambiguous; the message has the first ten.
    """
    entities = [name for head, _, tail in questions for name in (head, tail) if isinstance(name, str)]
    relations = [question.relation for question in questions]
    _refuse([*_problems(bundle.relations, relations), *_problems(bundle.entities, entities)], path)


def _problems(names: Names, wanted: list[str]) -> list[Callable[[], str]]:
    """Return what is wrong with each name that cannot be used, as functions: suggestions take time."""
    found = names.lookup(wanted)
    bad = [name for name in dict.fromkeys(wanted) if len(found.get(name, ())) != 1]
    return [lambda name=name: names.problem(name, found.get(name, ())) for name in bad]  # type: ignore[misc]


def _refuse(problems: list[Callable[[], str]], path: Path) -> None:
    if problems:
        shown = "; ".join(problem() for problem in problems[:_EXAMPLES])
        more = f"; and {len(problems) - _EXAMPLES} more" if len(problems) > _EXAMPLES else ""
        raise DataError(f"{path.absolute()}: {len(problems)} names are unknown or ambiguous: {shown}{more}")


def answer_file(bundle: Bundle, queries: Path, output: Path, options: Options) -> dict[str, Any]:
    """Answer all questions of a file into `output`, completely or not at all.

    Returns:
        Counts, for the last line of the command.

    Raises:
        ConfigError: the suffix of `output` is unknown, or `output` is one of the files that are read.
        DataError: see `read_questions` and `check_names`.
        StorageError: `output` cannot be written.
    """
    target = check_output(output, bundle, queries)
    questions = read_questions(queries)
    check_names(bundle, questions, queries)
    with Progress("query", len(questions), "questions") as progress:
        rows = write_answers(target, _answers(bundle, questions, options, progress))
    return {"output": str(output), "questions": len(questions), "answers": rows}


def check_output(output: Path, bundle: Bundle, queries: Path | None = None) -> Path:
    """Return the file to write, links followed.

    Raises:
        ConfigError: the suffix is unknown, or the file is one that is read.
    """
    if output.suffix not in WRITERS:
        raise ConfigError(f"--output {output}: expected a name that ends in {', '.join(WRITERS)}")
    target = Path(os.path.realpath(output))  # a link stays, and its target is written
    if queries is not None and target.exists() and queries.exists() and target.samefile(queries):
        raise ConfigError(f"--output {output}: is the file of --queries itself; give another name for the answers")
    if target.is_relative_to(os.path.realpath(bundle.directory)):
        raise ConfigError(f"--output {output}: lies inside the bundle {bundle.directory}; choose another folder")
    return target


def write_answers(target: Path, blocks: Iterator[Answers]) -> int:
    """Write answers in the format of the file's suffix, and return how many there are."""
    sweep(target.parent, target.name)
    with atomic_path(target) as temporary:
        return WRITERS[target.suffix](temporary, blocks)


def _answers(bundle: Bundle, questions: list[Question], options: Options, progress: Progress) -> Iterator[Answers]:
    for start in range(0, len(questions), _BLOCK):
        block = questions[start : start + _BLOCK]
        answers = predict(bundle, block, options.k, options.filter, options.candidates, options.range)
        yield answers._replace(
            question=answers.question + start, unseen={start + at: name for at, name in answers.unseen.items()}
        )
        progress.add(len(block))


def _write_parquet(path: Path, blocks: Iterator[Answers]) -> int:
    import pyarrow
    import pyarrow.parquet

    text, number = pyarrow.large_string(), pyarrow.float64()
    kinds = {"question": pyarrow.int64(), "rank": number, "score": number, "probability": number}
    rows, writer = 0, None
    try:
        for answers in blocks:
            columns = answers.columns()
            schema = pyarrow.schema([(name, kinds.get(name, text)) for name in columns])
            writer = writer or pyarrow.parquet.ParquetWriter(path, schema)
            # Without a calibration there is no probability: null, as in the other formats.
            arrays = [
                pyarrow.array(column, schema.field(name).type, from_pandas=name == "probability")
                for name, column in columns.items()
            ]
            rows += len(answers.rank)
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))
    finally:
        if writer is not None:
            writer.close()
    return rows


def _write_table(path: Path, blocks: Iterator[Answers], dialect: dict[str, Any]) -> int:
    rows = 0
    with path.open("w", encoding="utf8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n", **dialect)
        for answers in blocks:
            for row in answers.rows():
                if not rows:
                    writer.writerow(row)
                writer.writerow(f"{value:.6g}" if isinstance(value, float) else value for value in row.values())
                rows += 1
    return rows


def _write_csv(path: Path, blocks: Iterator[Answers]) -> int:
    return _write_table(path, blocks, {})


def _write_tsv(path: Path, blocks: Iterator[Answers]) -> int:
    # Names hold no tabs and no line feeds, since raw files are split at them, so nothing is quoted.
    return _write_table(path, blocks, {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None})


def _write_jsonl(path: Path, blocks: Iterator[Answers]) -> int:
    rows = 0
    with path.open("w", encoding="utf8") as file:
        for answers in blocks:
            for row in answers.rows():
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                rows += 1
    return rows


WRITERS: dict[str, Callable[[Path, Iterator[Answers]], int]] = {
    ".parquet": _write_parquet,
    ".csv": _write_csv,
    ".tsv": _write_tsv,
    ".jsonl": _write_jsonl,
}
