"""`mocme query BUNDLE_DIR --head NAME --relation NAME`: asks a bundle in words and prints ranked answers."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mocme_dist.errors import ConfigError

if TYPE_CHECKING:
    from mocme_dist.serving.batch import Options
    from mocme_dist.serving.bundle import Bundle
    from mocme_dist.serving.predict import Answers, Question

DESCRIPTION = """\
Ask an exported bundle. Give a relation with a head (answers are tails), with a tail (answers are heads), or with both
(the rank of this fact). Entities and relations are given by id, label or alias.

  mocme query bundles/demo --head Norway --relation borders
  mocme query bundles/demo --relation in_continent --tail Europe --filter train
  mocme query bundles/demo --head Norway --relation borders --tail Sweden
  mocme query bundles/demo --head Norway --relation borders --explain
  mocme query bundles/demo --new "name=Atlantis,text=an island in the ocean,population_log10=4" --relation in_continent
  mocme query bundles/demo --queries questions.tsv --output answers.csv
  mocme query bundles/demo --entities Nor
  mocme query bundles/demo --relations

The probability is the share of new facts among answers put forward like this one, fitted on the development set; that
of a known answer is what it would be if it were not known. questions.tsv: head TAB relation TAB tail, with ? for what
is asked (\\? is the entity called ?)."""

_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_JOINERS = "\u200c\u200d"  # inside emoji and some scripts
_EXPLAINED = 3  # answers that --explain gives reasons for
_MODES = ("queries", "entities", "relations")


def parse() -> argparse.Namespace:
    """Return the command line after checking which options go together."""
    from mocme_dist.commands import EXIT_CODES, add_trust

    parser = argparse.ArgumentParser(
        prog="mocme query",
        description=DESCRIPTION,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("bundle_dir", metavar="BUNDLE_DIR", help="folder or fsspec URL that mocme export wrote")
    add("--head", metavar="NAME")
    add("--relation", metavar="NAME")
    add("--tail", metavar="NAME")
    add("--new", metavar="KEY=VALUE,...", help="an entity that is not in the graph: name, text, image=FILE and numbers")
    add("--as", choices=("head", "tail"), dest="side", help="side of the new entity (default head)")
    add("--k", "--top", type=int, default=10, metavar="N", help="answers per question (default 10)")
    add(
        "--filter",
        choices=("known", "train", "none"),
        default="known",
        help=(
            "leave out the answers that any split knows (default), those that train knows, or none; the others are"
            " marked"
        ),
    )
    add("--candidates", metavar="FILE", help="file with the entities that may be answers, one per line")
    add(
        "--range",
        action=argparse.BooleanOptionalAction,
        help="only entities that train has on this side of the relation (default with --new)",
    )
    add("--explain", action="store_true", help="reasons for the first three answers, and what the source is made of")
    add("--json", action="store_true", help="one JSON object instead of a table")
    add("--queries", metavar="FILE", help="file of questions, one per line: head TAB relation TAB tail, with ?")
    add("--output", metavar="FILE", help="file for the answers: .parquet, .csv, .tsv or .jsonl")
    add("--entities", metavar="PREFIX", help="list entities whose names begin so, with most facts first")
    add("--relations", action="store_true", help="list the relations with their number of facts")
    add(
        "--verify",
        action="store_true",
        help="compare every file with its hash first; done automatically for a copy that is new or has changed",
    )
    add_trust(parser)
    args = parser.parse_args()
    _check_options(parser, args)
    return args


def _check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    modes = [f"--{name}" for name in _MODES if getattr(args, name) not in (None, False)]
    if len(modes) > 1:
        parser.error(f"{', '.join(modes)}: give one of them")
    if modes:
        names = ("head", "relation", "tail", "new", "side", "explain", "output")
        ignored = [name for name in names if modes != ["--queries"] or name != "output"]
        given = [
            f"--{'as' if name == 'side' else name}" for name in ignored if getattr(args, name) not in (None, False)
        ]
        if given:
            parser.error(f"{', '.join(given)}: not together with {modes[0]}")
        if args.queries is not None and args.output is None:
            parser.error("--queries needs --output FILE")
    elif args.relation is None:
        parser.error("give --relation with --head, --tail or --new, or --queries FILE")
    if args.side is not None and args.new is None:
        parser.error("--as goes with --new")


def main() -> None:
    """Parse, answer, print."""
    args = parse()
    from mocme_dist.serving.bundle import Bundle

    bundle = Bundle.open(args.bundle_dir, verify=args.verify)
    if args.entities is not None:
        _list(bundle.search(args.entities, args.k), args.json, f"no entity begins with {args.entities!r}")
    elif args.relations:
        _list(bundle.relation_table(), args.json, "")
    else:
        _answer(bundle, args)


def _answer(bundle: Bundle, args: argparse.Namespace) -> None:
    """Answer one question, or a file of them."""
    from mocme_dist.commands import absolute
    from mocme_dist.serving.batch import Options, answer_file, check_output, read_candidates, write_answers
    from mocme_dist.serving.predict import predict

    candidates = None if args.candidates is None else read_candidates(Path(args.candidates), bundle)
    range_of = args.new is not None and candidates is None if args.range is None else args.range
    options = Options(args.k, args.filter, candidates, range_of)
    if args.output is not None:
        absolute("--output", args.output)
    if args.queries is not None:
        _say(json.dumps(answer_file(bundle, Path(args.queries), Path(args.output), options)))
        return
    target = None if args.output is None else check_output(Path(args.output), bundle)
    question, weights = _question(bundle, args)
    answers = predict(bundle, [question], *options)
    if target is not None:
        rows = write_answers(target, iter([answers]))
        _say(json.dumps({"output": args.output, "questions": 1, "answers": rows}))
        return
    explanation = _explain(bundle, question, answers, weights) if args.explain else None
    if args.json:
        _say(json.dumps(_as_json(bundle, question, answers, explanation), ensure_ascii=False))
    else:
        lines = _table(bundle, question, answers, options)
        _say("\n".join([*lines, *(_explained(explanation) if explanation else [])]))


def _say(text: str) -> None:
    """Print; a reader that closes the pipe early, such as `head`, is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # The rest of the buffer is discarded; otherwise the interpreter would complain when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _list(rows: list[dict[str, Any]], as_json: bool, nothing: str) -> None:
    """Print a table of names and counts."""
    if as_json or not rows:
        _say(json.dumps(rows, ensure_ascii=False) if as_json else nothing)
        return
    counts = [key for key in rows[0] if key not in ("row", "id", "label")]
    named = [visible(str(row["id"])) for row in rows]
    labels = ["" if row["label"] == row["id"] else visible(str(row["label"])) for row in rows]
    widths = [max(map(cells, column)) for column in (named, labels)]
    lines = []
    for name, label, row in zip(named, labels, rows, strict=True):
        numbers = "  ".join(f"{row[key]:>9,} {key}" for key in counts)
        shown = (
            f"{padded(name, widths[0])}  {padded(label, widths[1])}  " if widths[1] else f"{padded(name, widths[0])}  "
        )
        lines.append(shown + numbers)
    _say("\n".join(lines))


def visible(text: str) -> str:
    """Return a name with control and invisible characters escaped, so that it cannot steer the terminal."""
    return "".join(
        (
            letter.encode("unicode_escape").decode()
            if unicodedata.category(letter) in _INVISIBLE and letter not in _JOINERS
            else letter
        )
        for letter in text
    )


def cells(text: str) -> int:
    """Return how many cells of a terminal a text takes: wide letters take two, combining marks none."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return len(text) + wide - sum(unicodedata.combining(letter) > 0 or letter in _JOINERS for letter in text)


def padded(text: str, width: int) -> str:
    """Return a text with spaces up to a width in cells."""
    return text + " " * max(0, width - cells(text))


def _question(bundle: Bundle, args: argparse.Namespace) -> tuple[Question, dict[str, float] | None]:
    """Return the question of the command line, and the modality weights of a new entity."""
    from mocme_dist.serving.predict import Question

    if args.new is None:
        return Question(args.head, args.relation, args.tail), None
    side = args.side or "head"
    if getattr(args, side) is not None:
        other = "tail" if side == "head" else "head"
        raise ConfigError(f"--{side} {getattr(args, side)}: the new entity is the {side} itself; use --as {other}")
    bundle.find_relation(args.relation)  # before the encoders are loaded
    encoder = bundle.unseen_encoder(args.trust_encoders)
    new, weights = encoder.entity_of(encoder.describe(args.new))
    question = Question(new, args.relation, args.tail) if side == "head" else Question(args.head, args.relation, new)
    return question, weights


def _named(name: str, label: str) -> str:
    """Return a label with its id in brackets, if they differ."""
    return visible(name) if name == label else f"{visible(label)} ({visible(name)})"


def _sides(bundle: Bundle, question: Question) -> list[str]:
    """Return head, relation and tail of a question for people."""
    entities = bundle.entities
    shown = []
    for side, names in zip(question, (entities, bundle.relations, entities), strict=True):
        if side is None:
            shown.append("?")
        elif isinstance(side, str):
            row = names.id_of(side)
            shown.append(_named(names.id_at(row), names.label_at(row)))
        else:
            shown.append(f"{visible(side.name)} (new)")
    return shown


def _table(bundle: Bundle, question: Question, answers: Answers, options: Options) -> list[str]:
    """Return answers for people."""
    head, relation, tail = _sides(bundle, question)
    lines = [f"{head} -{relation}-> {tail}"]
    rows = answers.rows()
    if not rows:
        hint = "no answer is left: all candidates are known already (--filter none shows them)"
        return [*lines, f"  {hint if options.filter != 'none' else 'no entity may be an answer'}"]
    names = [_named(row["id"], row["label"]) for row in rows]
    width = min(60, max(map(cells, names)))
    for name, row in zip(names, rows, strict=True):
        chance = "      " if row["probability"] is None else f"{row['probability']:6.1%}"
        known = f"  known ({row['known']})" if row["known"] else ""
        side = f"  as the {row['direction']}" if question.head is not None and question.tail is not None else ""
        lines.append(f"{row['rank']:6g}  {padded(name, width)}  {chance}  score {row['score']:8.3f}{known}{side}")
    return lines


def _as_json(
    bundle: Bundle, question: Question, answers: Answers, explanation: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the question and its answers; keys are those of the columns."""
    keys = ("direction", "rank", "id", "label", "score", "probability", "known")
    out: dict[str, Any] = {}
    for key, side, names in zip(
        ("head", "relation", "tail"), question, (bundle.entities, bundle.relations, bundle.entities), strict=True
    ):
        row = names.id_of(side) if isinstance(side, str) else None
        name = None if side is None else getattr(side, "name", None)
        out[key] = names.id_at(row) if row is not None else name
        out[f"{key}_label"] = names.label_at(row) if row is not None else name
    out["answers"] = [{key: _rounded(row[key]) for key in keys} for row in answers.rows()]
    return out | ({"explanation": explanation} if explanation else {})


def _rounded(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) and math.isfinite(value) else value


def _explain(
    bundle: Bundle, question: Question, answers: Answers, new_weights: dict[str, float] | None
) -> dict[str, Any]:
    """Return weights and neighbours of the source (weights alone of a new one), and them with reasons of
    three answers.
    """
    from mocme_dist.serving.neighbours import modality_weights, neighbours
    from mocme_dist.serving.reasons import Reasons, question_of

    def about(entity: int) -> dict[str, Any]:
        name = {"id": bundle.entities.id_at(entity), "label": bundle.label(entity)}
        return {**name, "weights": modality_weights(bundle, entity), "nearest": neighbours(bundle, entity)}

    given: Any = question.head if question.head is not None else question.tail
    if new_weights is not None:
        given = given if not isinstance(given, str) else question.tail
        source = {"id": given.name, "label": given.name, "weights": new_weights, "nearest": {}}
        unseen, row = given, -1
    else:
        unseen, row = None, bundle.find_entity(str(given))
        source = about(row)
    relation = bundle.find_relation(question.relation)
    explained: list[dict[str, Any]] = []
    reasons: dict[tuple[int, int], Reasons] = {}
    sides = zip(answers.source.tolist(), answers.direction.tolist(), answers.answer.tolist(), strict=True)
    for asker, direction, answer in list(dict.fromkeys(sides))[:_EXPLAINED]:
        if (asker, direction) not in reasons:
            reasons[asker, direction] = Reasons(bundle, question_of(bundle, asker, relation, direction, unseen))
        explained.append({**about(answer), "reasons": reasons[asker, direction].explain(answer)})
    return {"source": source, "answers": explained}


def _explained(explanation: dict[str, Any]) -> list[str]:
    """Return the reasons in words, then what the vector of the source is made of."""
    lines = []
    for answer in explanation["answers"]:
        lines += ["", visible(answer["reasons"]["sentences"][0])]
        lines += [f"  {visible(sentence)}" for sentence in answer["reasons"]["sentences"][1:]]
    source = explanation["source"]
    weights = ", ".join(f"{name} {weight:.2f}" for name, weight in source["weights"].items())
    lines += ["", f"{_named(source['id'], source['label'])}: vector made of {weights}"]
    for modality, others in source["nearest"].items():
        near = ", ".join(f"{_named(other['id'], other['label'])} ({other['cosine']:.2f})" for other in others)
        lines.append(f"    nearest by {modality}: {near}")
    return lines


if __name__ == "__main__":
    from mocme_dist.commands import run_command

    # A terminal that cannot show a letter shows ? in its place.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    run_command(main)
