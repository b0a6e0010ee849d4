"""Reasons in words: the sentences that `mocme query --explain` prints and that discovered facts carry."""

from __future__ import annotations

from typing import Any

from mocme_dist.serving.evidence import FACTS, MODEL, RULES

_IN_WORDS = {FACTS: "shared facts", MODEL: "the model's vectors", "numeric": "numbers", "image": "images"}


def in_words(name: str, relation: str, direction: int, found: dict[str, Any]) -> list[str]:
    """Return sentences for the reasons of one answer.

    Args:
        name, relation: labels of the answer and of the relation.
        direction: 0 if the answer is a tail, 1 if it is a head.
        found: what `reasons.explain` returns, without the words.
    """
    sentences = [f"{name} has rank {_rank_text(found['rank'])} without the other known answers."]
    terms = sorted(found["terms"], key=_advantage, reverse=True)
    shown = [(f"{term_in_words(term['name'])} ({term['advantage']:+.1f})", term["advantage"]) for term in terms]
    pro, con = ([text for text, value in shown if value * sign >= 0.05] for sign in (1, -1))
    if pro:
        sentences.append(f"For it, compared with the average candidate: {', '.join(pro[:4])}.")
    if con:
        sentences.append(f"Against it: {', '.join(con[::-1][:3])}.")
    order = {term["name"]: turn for turn, term in enumerate(terms)}
    votes = sorted(found["votes"], key=_turn_of(order, "votes"))
    sentences += [vote_in_words(vote, name, relation, direction) for vote in votes if vote["agreeing"]][:3]
    if votes and not any(vote["agreeing"] for vote in votes):
        sentences.append(f"None of the nearest entities with {relation} has this answer.")
    likeness = sorted(found["likeness"], key=_turn_of(order, "likeness"))
    sentences += [_likeness_in_words(entry) for entry in likeness if entry["facts"]][:2]
    changed = {key: value for key, value in found["rank_without"].items() if value != found["rank"]}
    if changed:
        without = (
            f"{_rank_text(rank)} without {key}" if rank else f"nothing without {key}" for key, rank in changed.items()
        )
        sentences.append(f"Its rank would be {', '.join(without)}.")
    if found["influence"]:
        facts = (" ".join(fact["labels"][key] for key in ("head", "relation", "tail")) for fact in found["influence"])
        sentences.append(f"Training facts that support it most: {'; '.join(facts)}.")
    return sentences


def in_a_line(
    name: str,
    relation: str,
    direction: int,
    terms: list[dict[str, Any]],
    votes: list[dict[str, Any]],
    likeness: list[dict[str, Any]],
) -> str:
    """Return the two strongest terms and the strongest votes, or else the likeness to known answers; see `in_words`."""
    strongest = sorted(terms, key=_advantage, reverse=True)[:2]
    said = ", ".join(f"{term_in_words(term['name'])} ({term['advantage']:+.1f})" for term in strongest)
    best = max((vote for vote in votes if vote["agreeing"]), key=_agreeing, default=None)
    if best is not None:
        return f"{said}; {vote_in_words(best, name, relation, direction)}"
    alike = [entry for entry in likeness if entry["facts"]]
    return f"{said}; {_likeness_in_words(alike[0])}" if alike else said


def _agreeing(vote: dict[str, Any]) -> int:
    return int(vote["agreeing"])


def _advantage(term: dict[str, Any]) -> float:
    return float(term["advantage"])


def _turn_of(order: dict[str, int], kind: str) -> Any:
    def turn(entry: dict[str, Any]) -> int:
        return order.get(f"{kind}:{entry['space']}", len(order))

    return turn


def _rank_text(rank: float) -> str:
    return f"{rank:g}" if rank < 1000 else f"{rank:,.0f}"


def term_in_words(name: str) -> str:
    """The name of a term for people: "votes:text" gives "votes by text"."""
    kind, _, space = name.partition(":")
    shown = _IN_WORDS.get(space, space)
    if kind == MODEL:
        return f"the model's {space} block" if space else "the model"
    if kind == "likeness":
        return f"likeness to known answers by {shown}"
    if kind == "match":
        return f"likeness to the entity asked about by {shown}"
    if kind == RULES:
        return "facts of other relations"
    return f"votes by {shown}" if kind == "votes" else "frequency of the answer"


def vote_in_words(vote: dict[str, Any], answer: str, relation: str, direction: int) -> str:
    """One sentence of votes: "Of the 20 entities nearest by text with country, 19 have Albania: Vlorë, Berat, …."."""
    by = _IN_WORDS.get(vote["space"], vote["space"])
    labels = [fact["label"] for fact in vote["facts"]]
    shown = ", ".join(labels[:3]) + (", …" if len(labels) > 3 else "")
    one = vote["agreeing"] == 1
    if direction == 0:
        nearest = f"Of the {vote['neighbours']} entities nearest by {by} with {relation}"
        return f"{nearest}, {vote['agreeing']} {'has' if one else 'have'} {answer}: {shown}."
    nearest = f"Of the {vote['neighbours']} entities nearest by {by} that are {relation} of something"
    return f"{nearest}, {vote['agreeing']} {'is' if one else 'are'} so of {answer}: {shown}."


def _likeness_in_words(entry: dict[str, Any]) -> str:
    by = _IN_WORDS.get(entry["space"], entry["space"])
    shown = ", ".join(f"{fact['label']} ({fact['similarity']:.2f})" for fact in entry["facts"][:3])
    if entry["answers"] == 1:
        return f"By {by} it is like the known answer {shown}."
    return f"Of the {entry['answers']} known answers, it is most like {shown} by {by}."
