"""Splits facts into train, valid and test, 80/10/10, so that no held-out fact stands elsewhere in other words.

Facts that give each other away form a unit and go to one split together: both directions of a border, and a
country's capital with that city's country. A share of the cities and provinces is *sparse*: train keeps their
continent only, and their other facts are asked. There the structure knows little, and coordinates, names and
pictures have to answer.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable

from tools.countries.facts import Fact, Graph

SPLITS = ("train", "valid", "test")
HELD_OUT = 0.1  # of all facts, in valid and in test each
SPARSE = 0.25  # of the cities and provinces

# Follows from a city's country (its continent), or is what the graph's geography is made of: never asked.
_TRAIN_ONLY = {"in_continent", "part_of"}


def split_facts(graph: Graph, fixed: set[Fact], seed: int) -> dict[str, list[Fact]]:
    """Facts of each split, sorted; every entity and relation of valid and test stands in train.

    Args:
        graph: entities and facts.
        fixed: facts that stay in train because a text spells them out.
        seed: of the choice; the same seed gives the same split.
    """
    rng = random.Random(f"{seed}/split")
    units = _units(graph.facts, fixed)
    sparse = [name for name in sorted(graph.kinds) if graph.kinds[name] in ("city", "province")]
    rng.shuffle(sparse)
    rng.shuffle(units)
    wanted = int(HELD_OUT * len(graph.facts))
    split_of: dict[Fact, str] = {}
    left = Counter(name for fact in graph.facts for name in fact)  # facts that train still has of each name
    taken = Counter[str]()

    def hold_out(unit: tuple[Fact, ...], split: str) -> None:
        names = Counter(name for fact in unit for name in fact)
        if (
            taken[split] + len(unit) > wanted
            or any(left[name] <= n for name, n in names.items())
            or unit[0] in split_of
        ):
            return
        left.subtract(names)
        taken[split] += len(unit)
        split_of.update(dict.fromkeys(unit, split))

    by_head = defaultdict(list)
    for unit in units:
        for head in dict.fromkeys(fact.head for fact in unit):
            by_head[head].append(unit)
    for i, name in enumerate(sparse[: int(SPARSE * len(sparse))]):
        for unit in by_head[name]:
            hold_out(unit, SPLITS[1 + i % 2])
    for i, unit in enumerate(units):
        hold_out(unit, SPLITS[1 + i % 2])
    result: dict[str, list[Fact]] = {split: [] for split in SPLITS}
    for fact in sorted(graph.facts):
        result[split_of.get(fact, "train")].append(fact)
    return result


def _units(facts: Iterable[Fact], fixed: set[Fact]) -> list[tuple[Fact, ...]]:
    """Facts grouped by what must not be torn apart, sorted, without units that hold a fixed or train-only fact."""
    groups: dict[Fact, list[Fact]] = defaultdict(list)
    capitals = {Fact(fact.tail, "city_in_country", fact.head): fact for fact in facts if fact.relation == "has_capital"}
    for fact in facts:
        key = capitals.get(fact, fact)
        if fact.relation == "borders":
            key = Fact(min(fact.head, fact.tail), "borders", max(fact.head, fact.tail))
        groups[key].append(fact)
    closed = {fact for fact in facts if fact.relation in _TRAIN_ONLY} | fixed
    return [tuple(sorted(group)) for _, group in sorted(groups.items()) if not closed.intersection(group)]
