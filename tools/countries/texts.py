"""Texts of the entities, and the rule that no text gives an answer away.

A text is made of pieces (other names, spellings, translations). A piece is dropped when it names, word for word,
an entity that the owner is linked to by any fact of any split, or any country at all when the owner is no country.
A fact that a label alone spells out (Mexico City, Mexico) cannot be cured so; `spelled_out` finds it and the split
keeps it in train.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

# Few names, in Latin letters: ten names in all scripts made an English sentence encoder four times slower, and worse
# at telling countries from its vectors.
MAX_NAMES = 3
_LATIN_END = "\u0250"


def fold(text: str) -> str:
    """Lower-case words without accents and punctuation, one blank between: how names are compared."""
    letters = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    return " ".join(re.findall(r"[^\W_]+", letters))


def core_name(entity: str) -> str:
    """The folded name without the kind or place in brackets: `Krone NOK (currency)` -> `krone nok`."""
    return fold(re.sub(r" \([^()]*\)$", "", entity)) or fold(entity)


def mentions(text: str, phrases: Iterable[str]) -> bool:
    """Whether a folded phrase stands in `text` as whole words."""
    words = f" {fold(text)} "
    return any(phrase and f" {phrase} " in words for phrase in phrases)


def phrase_windows(text: str, longest: int = 6) -> set[str]:
    """Every run of up to `longest` words of the folded text, for one look-up against many phrases."""
    words = fold(text).split()
    return {" ".join(words[i : i + n]) for n in range(1, longest + 1) for i in range(len(words) - n + 1)}


def clean_pieces(pieces: Iterable[str], label: str, answers: set[str], forbidden: set[str]) -> list[str]:
    """The pieces that give nothing away, without repeats of each other and of the label.

    Args:
        pieces: candidate names in the source's order.
        label: what the entity is called; repeats of it are dropped.
        answers: folded names of every entity linked to this one, by any fact.
        forbidden: folded names that no text of this kind may hold (all countries, for a city).

    Returns:
        At most MAX_NAMES pieces in Latin letters, spread evenly over the list: sources sort it by alphabet.
    """
    seen, kept = {core_name(label)}, []
    for piece in pieces:
        folded = fold(piece)
        is_code = len(piece) <= 3 and piece.isascii()  # airport and ISO codes
        is_latin = all(letter < _LATIN_END for letter in piece)
        is_transliteration = piece[:1].islower()  # made by rule, letter by letter: noise
        if (
            not folded
            or folded in seen
            or is_code
            or is_transliteration
            or not is_latin
            or any(c.isdigit() for c in piece)
        ):
            continue
        seen.add(folded)
        windows = phrase_windows(piece)
        if not windows & answers and not windows & forbidden:
            kept.append(re.sub(r"\s+", " ", piece).strip())
    if len(kept) <= MAX_NAMES:
        return kept
    return [kept[i * len(kept) // MAX_NAMES] for i in range(MAX_NAMES)]


def spelled_out(texts: tuple[str, str], names: tuple[set[str], set[str]]) -> bool:
    """Whether head's text holds a name of tail, or tail's text a name of head.

    Args:
        texts: label and description of head and of tail.
        names: folded names of head and of tail.
    """
    return mentions(texts[0], names[1]) or mentions(texts[1], names[0])
