"""`python -m mocme_dist.query BUNDLE_DIR --head NAME --relation NAME`: questions in words to ranked answers."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mocme_dist.errors import ConfigError

if TYPE_CHECKING:
    from mocme_dist.serving.bundle import Bundle
    from mocme_dist.serving.predict import Answers, Newcomer, Question

DESCRIPTION = """\
Ask an exported bundle. Give a relation with a head (answers are tails), with a tail (answers are heads), or with both
(how good is this fact).

  python -m mocme_dist.query bundles/demo --head Norway --relation borders
  python -m mocme_dist.query bundles/demo --relation capital --tail Oslo --filter none
  python -m mocme_dist.query bundles/demo --head Norway --relation borders --explain
  python -m mocme_dist.query bundles/demo --new "name=Atlantis,text=an island in the ocean,population=12000" --relation continent
  python -m mocme_dist.query bundles/demo --queries questions.tsv --output answers.parquet

A probability is the share of new facts among answers put forward like this one, fitted on the development set.
questions.tsv: head TAB relation TAB tail, with ? for what is asked. Without --json, answers are a table."""


def parse() -> argparse.Namespace:
    """The command line, checked for what does not go together."""
    from mocme_dist.commands import EXIT_CODES

    parser = argparse.ArgumentParser(
        prog="python -m mocme_dist.query", description=DESCRIPTION, epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle_dir", metavar="BUNDLE_DIR", help="what mocme_dist.export wrote")
    parser.add_argument("--head", metavar="NAME")
    parser.add_argument("--relation", metavar="NAME")
    parser.add_argument("--tail", metavar="NAME")
    parser.add_argument("--new", metavar="KEY=VALUE,...", help="an entity that is not in the graph, by name, text, image=FILE and numbers")
    parser.add_argument(
        "--as", choices=("head", "tail"), default=None, dest="side", help="which side the new entity stands on (default head)"
    )
    parser.add_argument("--top", type=int, default=10, metavar="N", help="answers of each question (default 10)")
    parser.add_argument(
        "--filter", choices=("known", "none"), default="known", help="known: leave out what the graph has already (default)"
    )
    parser.add_argument(
        "--explain", action="store_true", help="modality weights behind source and answers, nearest entities by each modality"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--queries", metavar="FILE", help="many questions at once: head TAB relation TAB tail a line, ? is asked for")
    parser.add_argument("--output", metavar="FILE", help="where answers of --queries go: .parquet, .tsv or .jsonl")
    args = parser.parse_args()
    if args.queries is not None:
        single = [f"--{name}" for name in ("head", "relation", "tail", "new") if getattr(args, name) is not None]
        single += ["--explain"] if args.explain else []
        if single:
            parser.error(f"{', '.join(single)}: not together with --queries")
        if args.output is None:
            parser.error("--queries needs --output FILE")
    elif args.output is not None:
        parser.error("--output goes with --queries; use --json for one question")
    elif args.relation is None:
        parser.error("give --relation with --head, --tail or --new, or --queries FILE")
    if args.side is not None and args.new is None:
        parser.error("--as goes with --new")
    return args


def main() -> None:
    """Parse, answer, print."""
    args = parse()
    from mocme_dist.serving.bundle import Bundle

    bundle = Bundle.open(args.bundle_dir)
    if args.queries is not None:
        from mocme_dist.serving.batch import answer_file

        _say(json.dumps(answer_file(bundle, Path(args.queries), Path(args.output), args.top, args.filter)))
        return
    from mocme_dist.serving.predict import predict

    question, weights = _question(bundle, args)
    answers = predict(bundle, [question], args.top, args.filter)
    explanation = _explain(bundle, question, answers, weights) if args.explain else None
    if args.json:
        _say(json.dumps(_as_json(question, answers, explanation), ensure_ascii=False))
    else:
        _say("\n".join([*_table(question, answers), *(_explained(explanation) if explanation else [])]))


def _say(text: str) -> None:
    """Print; a reader that goes away, as `| head` does, is no mistake."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # What is left in the buffer goes nowhere, or the interpreter would complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _question(bundle: Bundle, args: argparse.Namespace) -> tuple[Question, dict[str, float] | None]:
    """The question of the command line, and the modality weights of a new entity."""
    from mocme_dist.serving.predict import Newcomer, Question

    if args.new is None:
        return Question(args.head, args.relation, args.tail), None
    side = args.side or "head"
    if getattr(args, side) is not None:
        raise ConfigError(
            f"--{side} {getattr(args, side)}: the new entity is the {side} itself; use --as {'tail' if side == 'head' else 'head'}"
        )
    bundle.relations.id_of(args.relation)  # before the encoders load
    from mocme_dist.serving.newcomer import NewEntityEncoder

    encoder = NewEntityEncoder(bundle)
    description = encoder.describe(args.new)
    vector, weights = encoder.encode_one(description)
    new = Newcomer(description.name, vector)
    return (Question(new, args.relation, args.tail) if side == "head" else Question(args.head, args.relation, new)), weights


def _shown(name: str | Newcomer | None) -> str:
    return "?" if name is None else name if isinstance(name, str) else f"{name.name} (new)"


def _chance(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


def _table(question: Question, answers: Answers) -> list[str]:
    """Answers for people; names in the middle, so that they may be of any length."""
    head, relation, tail = (_shown(part) for part in question)
    lines = [f"{head} -{relation}-> {tail}"]
    if not len(answers.rank):
        return [*lines, "  no answer is left: everything competes no more (--filter none shows what is known)"]
    width = min(60, max(len(name) for name in answers.answer))
    for at, name in enumerate(answers.answer):
        chance = "      " if math.isnan(answers.probability[at]) else f"{answers.probability[at]:6.1%}"
        asked = "" if question.head is None or question.tail is None else f"  as the {('tail', 'head')[answers.direction[at]]}"
        known = "  known" if answers.known[at] else ""
        lines.append(f"{answers.rank[at]:6g}  {name:<{width}}  {chance}  score {answers.score[at]:8.3f}{known}{asked}")
    return lines


def _as_json(question: Question, answers: Answers, explanation: dict[str, Any] | None) -> dict[str, Any]:
    from mocme_dist.serving.predict import SIDES

    rows = [
        {
            "rank": float(answers.rank[at]),
            "entity": name,
            "side": SIDES[answers.direction[at]],
            "score": round(float(answers.score[at]), 6),
            "probability": _chance(float(answers.probability[at])),
            "known": bool(answers.known[at]),
        }
        for at, name in enumerate(answers.answer)
    ]
    head, relation, tail = (part if part is None or isinstance(part, str) else part.name for part in question)
    out: dict[str, Any] = {"head": head, "relation": relation, "tail": tail, "answers": rows}
    return out | ({"explanation": explanation} if explanation else {})


def _explain(bundle: Bundle, question: Question, answers: Answers, new_weights: dict[str, float] | None) -> dict[str, Any]:
    """Weights and neighbours of the source (of a new one its weights) and of the first three answers."""
    from mocme_dist.serving.explain import modality_weights, neighbours

    def about(entity: int) -> dict[str, Any]:
        return {"weights": modality_weights(bundle, entity), "nearest": neighbours(bundle, entity)}

    if new_weights is not None:
        new = question.head if not isinstance(question.head, str) and question.head is not None else question.tail
        source = {"entity": getattr(new, "name", ""), "weights": new_weights, "nearest": {}}
    else:
        name = str(question.head if question.head is not None else question.tail)
        source = {"entity": name, **about(bundle.entities.id_of(name))}
    distinct = dict(zip(answers.answer, answers.answer_id.tolist(), strict=True))
    first = [(name, entity) for name, entity in distinct.items() if name != source["entity"]][:3]
    return {"source": source, "answers": [{"entity": name, **about(entity)} for name, entity in first]}


def _explained(explanation: dict[str, Any]) -> list[str]:
    lines = [""]
    for entity in (explanation["source"], *explanation["answers"]):
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in entity["weights"].items())
        lines.append(f"{entity['entity']}: vector made of {weights}")
        for modality, others in entity["nearest"].items():
            lines.append(f"    nearest by {modality}: " + ", ".join(f"{other['entity']} ({other['cosine']:.2f})" for other in others))
    return lines


if __name__ == "__main__":
    from mocme_dist.commands import run_command

    # a terminal that cannot show a name shows ? in its place
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    run_command(main)
