"""Entities and facts of the world: what is linked to what, before texts are cleaned and facts are split.

Every relation is written in one direction only, and none is the inverse or a copy of another: a country has its
most detailed subregion, the subregion has what it is part of, and countries have no continent, which would follow.
`borders` alone is symmetric and stands both ways.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tools.countries.sources import World, language_names
from tools.countries.texts import fold

MIN_CITIES_OF_PROVINCE = 3
LISTED_PROVINCES = 4  # taken from each country's list, besides the provinces that cities name
RELATION_LABELS = {
    "borders": "borders",
    "city_in_country": "city in country",
    "city_in_province": "city in province",
    "has_capital": "has the capital",
    "has_time_zone": "has the time zone",
    "in_continent": "in continent",
    "in_subregion": "in subregion",
    "in_time_zone": "in time zone",
    "part_of": "part of",
    "province_of": "province of",
    "speaks": "speaks",
    "uses_currency": "uses the currency",
    "uses_utc_offset": "uses the UTC offset",
}

Record = dict[str, Any]


class Fact(NamedTuple):
    """Head, relation and tail, by name."""

    head: str
    relation: str
    tail: str


@dataclass
class Graph:
    """What the builders below fill in.

    Attributes:
        facts: without repeats, in the order in which they were added.
        kinds: entity name -> kind (country, city, ...).
        labels: entity name -> label; the name without what tells two of one name apart.
        aliases: entity name -> other names, raw, candidates for its text.
        numbers: entity name -> attribute -> value; units stand in the attribute's name.
        flags: country name -> flag file.
        outlines: country name -> GeoJSON.
    """

    facts: dict[Fact, None] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, list[str]] = field(default_factory=dict)
    numbers: dict[str, dict[str, float]] = field(default_factory=dict)
    flags: dict[str, Path] = field(default_factory=dict)
    outlines: dict[str, Record] = field(default_factory=dict)

    def entity(self, name: str, kind: str, label: str | None = None) -> str:
        """Add an entity unless it is there; its name."""
        self.kinds.setdefault(name, kind)
        self.labels.setdefault(name, label or name)
        return name

    def fact(self, head: str, relation: str, tail: str) -> None:
        """Add a fact unless it is there."""
        self.facts.setdefault(Fact(head, relation, tail))


def build_graph(world: World, max_cities: int, seed: int) -> Graph:
    """All entities and facts.

    Args:
        world: the sources.
        max_cities: cities wanted besides the capitals: the largest of every country first, then the second largest, ...
        seed: picks the provinces that come from lists.
    """
    graph = Graph()
    names = {code: graph.entity(_clean(record["name"]), "country") for code, record in world.countries.items()}
    _add_countries(graph, world, names)
    by_country: dict[str, list[Record]] = {code: [] for code in names}
    for city in sorted(world.cities, key=lambda c: (-c["population"], c["geonameid"])):
        if city["countrycode"] in by_country:
            by_country[city["countrycode"]].append(city)
    capitals = {
        code: capital for code in names if (capital := _find_capital(world, code, by_country[code])) is not None
    }
    cities = _choose_cities(by_country, capitals, max_cities)
    city_names = _name_cities(graph, cities)
    for code, city in capitals.items():
        graph.fact(names[code], "has_capital", city_names[city["geonameid"]])
    _add_cities(graph, world, names, cities, city_names)
    _add_provinces(graph, world, names, cities, city_names, seed)
    return graph


def _clean(name: str) -> str:
    return " ".join(name.split())


def _position(latitude: float, longitude: float) -> dict[str, float]:
    """Degrees, and the point on the unit sphere: there the date line and the poles are no seams."""
    phi, lam = math.radians(latitude), math.radians(longitude)
    return {
        "latitude_degrees": latitude,
        "longitude_degrees": longitude,
        "sphere_x": round(math.cos(phi) * math.cos(lam), 6),
        "sphere_y": round(math.cos(phi) * math.sin(lam), 6),
        "sphere_z": round(math.sin(phi), 6),
    }


def _magnitude(value: float) -> float:
    """Logarithm to base 10: populations and areas span seven powers of ten."""
    return round(math.log10(value), 4)


def _add_countries(graph: Graph, world: World, names: dict[str, str]) -> None:
    """Countries with their neighbours, languages, currencies, subregions, offsets, numbers and pictures."""
    code_of = {record["ISO"]["alpha3"]: code for code, record in world.countries.items()}
    languages = language_names()
    currencies = {g["currencycode"]: g["currencyname"] for g in world.gazetteer.values() if g["currencycode"]}
    for code, record in world.countries.items():
        name, other = names[code], world.gazetteer.get(code, {})
        for neighbour in record.get("borders") or []:
            if neighbour in code_of and code_of[neighbour] != code:
                graph.fact(name, "borders", names[code_of[neighbour]])
                graph.fact(names[code_of[neighbour]], "borders", name)
        spoken = [
            *(record.get("languages") or []),
            *(tag.split("-")[0] for tag in other.get("languages", "").split(",")),
        ]
        for language in dict.fromkeys(spoken):
            if language in languages:
                graph.fact(name, "speaks", graph.entity(f"{languages[language]} (language)", "language"))
        for currency in dict.fromkeys([other.get("currencycode", ""), *(record.get("currencies") or [])]):
            if currency in currencies:
                graph.fact(
                    name, "uses_currency", graph.entity(f"{currencies[currency]} {currency} (currency)", "currency")
                )
        _add_places(graph, record, name)
        _describe_country(graph, record, other, name)
        if code in world.flags:
            graph.flags[name] = world.flags[code]
        if record.get("geoJSON"):
            graph.outlines[name] = record["geoJSON"]


def _add_places(graph: Graph, record: Record, name: str) -> None:
    """Subregion, UTC offsets and time zones of one country."""
    chain = [record.get("intermediateregion"), record.get("subregion"), record["region"]]
    places = [graph.entity(place, "region") for place in dict.fromkeys(chain) if place]
    graph.fact(name, "in_subregion", places[0])
    for part, whole in itertools.pairwise(places):
        graph.fact(part, "part_of", whole)
    for offset in record.get("timezones") or []:
        text = offset.replace("−", "-")
        text = text if ":" in text or text == "UTC" else text + ":00"
        graph.fact(name, "uses_utc_offset", graph.entity(f"{text} (offset)", "offset"))
    for zone in record.get("timezoneNames") or []:
        graph.fact(name, "has_time_zone", graph.entity(f"{zone} (time zone)", "time zone"))


def _describe_country(graph: Graph, record: Record, other: Record, name: str) -> None:
    """Other names and numbers of one country; the second source fills what the first lacks."""
    translations = [text for _, text in sorted((record.get("translations") or {}).items()) if text]
    aliases = [
        record.get("nativeName"),
        other.get("name"),
        *(record.get("altSpellings") or []),
        *translations,
        record.get("demonym"),
    ]
    graph.aliases[name] = [alias for alias in aliases if alias]
    population, area = record.get("population") or other.get("population"), record.get("area") or other.get("areakm2")
    numbers = _position(*map(float, record["latlng"])) if record.get("latlng") else {}
    if population:
        numbers["population_log10"] = _magnitude(population)
    if area:
        numbers["area_km2_log10"] = _magnitude(area)
    if population and area:
        numbers["people_per_km2_log10"] = _magnitude(population / area)
    graph.numbers[name] = numbers


def _find_capital(world: World, code: str, own: list[Record]) -> Record | None:
    """The city record of a country's capital, by either source's name or one of the city's other names."""
    wanted: list[str] = []
    for source in (world.countries, world.gazetteer):
        capital = source.get(code, {}).get("capital") or ""
        wanted += map(fold, capital if isinstance(capital, list) else [capital])
    for target in filter(None, wanted):
        by_name = (city for city in own if fold(city["name"]) == target)
        by_other_name = (city for city in own if any(fold(name) == target for name in city["alternatenames"]))
        if (city := next(by_name, None) or next(by_other_name, None)) is not None:
            return city
    return None


def _choose_cities(by_country: dict[str, list[Record]], capitals: dict[str, Record], max_cities: int) -> list[Record]:
    """Capitals, then the largest city of every country, the second largest, ...; no country fills the graph."""
    chosen = {city["geonameid"]: city for city in capitals.values()}
    ranked = [
        (rank, -city["population"], city["geonameid"], city)
        for own in by_country.values()
        for rank, city in enumerate(own)
    ]
    for *_, city in sorted(ranked, key=lambda row: row[:3])[:max_cities]:
        chosen[city["geonameid"]] = city
    return sorted(chosen.values(), key=lambda c: (-c["population"], c["geonameid"]))


def _name_cities(graph: Graph, cities: Iterable[Record]) -> dict[int, str]:
    """City id -> unique entity name; a name that two cities share gets their place on the map, never their country."""
    count = Counter(city["name"] for city in cities)
    names: dict[int, str] = {}
    for city in cities:
        label = name = _clean(city["name"])
        if count[city["name"]] > 1:
            latitude, longitude = city["latitude"], city["longitude"]
            north, east = "NS"[latitude < 0], "EW"[longitude < 0]
            name = f"{label} ({abs(latitude):.1f}{north} {abs(longitude):.1f}{east})"
        elif label in graph.kinds:
            label = name = f"{label} (city)"
        names[city["geonameid"]] = graph.entity(name, "city", label)
        graph.aliases[name] = list(city["alternatenames"])
        graph.numbers[name] = _position(city["latitude"], city["longitude"])
        if city["population"] > 0:
            graph.numbers[name]["population_log10"] = _magnitude(city["population"])
    return names


def _add_cities(
    graph: Graph, world: World, names: dict[str, str], cities: list[Record], city_names: dict[int, str]
) -> None:
    """Country, time zone and continent of each city."""
    for city in cities:
        name, code = city_names[city["geonameid"]], city["countrycode"]
        graph.fact(name, "city_in_country", names[code])
        graph.fact(name, "in_time_zone", graph.entity(f"{city['timezone']} (time zone)", "time zone"))
        continent = world.continents[world.gazetteer[code]["continentcode"]]
        graph.fact(name, "in_continent", graph.entity(continent["name"], "region"))
        graph.numbers.setdefault(continent["name"], _position(float(continent["lat"]), float(continent["lng"])))


def _add_provinces(
    graph: Graph, world: World, names: dict[str, str], cities: list[Record], city_names: dict[int, str], seed: int
) -> None:
    """Provinces that three or more cities share, and a few more by name from each country's list.

    GeoNames gives a city the code of its province, not the name. Where the country's list holds a province called
    like one of the cities, that is the name; else the province is called the area of its largest city.
    """
    members: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for city in cities:
        members[city["countrycode"], city["admin1code"]].append(city)
    listed = {
        code: {fold(p): _clean(p) for p in record.get("provinces") or [] if fold(p)}
        for code, record in world.countries.items()
    }
    continent = {code: world.continents[g["continentcode"]]["name"] for code, g in world.gazetteer.items()}

    def add(label: str, code: str) -> str | None:
        name = f"{label} (province)"
        if name in graph.kinds:  # two countries have one of this name, and the country must not stand in it
            return None
        graph.fact(graph.entity(name, "province"), "province_of", names[code])
        graph.fact(name, "in_continent", continent[code])
        return name

    for (code, _), own in sorted(members.items()):
        if len(own) < MIN_CITIES_OF_PROVINCE:
            continue
        known = [listed[code][fold(city["name"])] for city in own if fold(city["name"]) in listed[code]]
        province = add(known[0] if known else f"{_clean(own[0]['name'])} area", code)
        for city in own if province else []:
            graph.fact(city_names[city["geonameid"]], "city_in_province", str(province))
    for code in names:
        choice = sorted(listed[code].values())
        random.Random(f"{seed}/provinces/{code}").shuffle(choice)
        for label in choice[:LISTED_PROVINCES]:
            add(label, code)
