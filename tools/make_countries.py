"""Writes the demo's graph: a raw folder about the world's countries, cities and provinces.

`python -m tools.make_countries OUT_DIR` reads the packages of the `[demo]` extra and downloads nothing. The same
seed and package versions give the same bytes, pictures included. OUT_DIR gets train.txt, valid.txt, test.txt,
text.tsv, numeric.tsv, relations.tsv, images.tsv, images/*.png and SOURCES.md.
"""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from mocme_dist.commands import run_command
from mocme_dist.data.files import write_bytes
from mocme_dist.errors import ConfigError
from tools.countries.facts import RELATION_LABELS, Fact, Graph, build_graph
from tools.countries.pictures import flag_png, outline_png
from tools.countries.sources import SOURCES, load_world, source_versions
from tools.countries.split import SPLITS, split_facts
from tools.countries.texts import clean_pieces, core_name, fold, spelled_out

DEFAULT_CITIES = 2000


def make_countries(out: Path, seed: int, max_cities: int) -> str:
    """Build the graph and write the raw folder.

    Args:
        out: folder to write; created if absent, and refused if it holds other files than ours.
        seed: of the split and of the choice of provinces.
        max_cities: cities besides the capitals.

    Returns:
        A short table of counts.

    Raises:
        ConfigError: a package of the demo is missing, or `out` holds something else.
    """
    if out.exists() and any(out.iterdir()) and not (out / "SOURCES.md").exists():
        raise ConfigError(f"{out}: not empty and not written by this tool; give a new folder")
    world = load_world()
    graph = build_graph(world, max_cities, seed)
    texts = describe(graph)
    splits = split_facts(graph, _spelled_out_facts(graph, texts), seed)
    for split, facts in splits.items():
        _write_rows(out / f"{split}.txt", facts)
    rows = ((name, graph.labels[name], "; ".join(texts[name])) for name in sorted(graph.kinds))
    _write_rows(out / "text.tsv", [("entity", "label", "description"), *rows])
    _write_rows(out / "relations.tsv", [("id", "label"), *sorted(RELATION_LABELS.items())])
    numbers = ((name, key, f"{value:g}") for name, own in sorted(graph.numbers.items()) for key, value in own.items())
    _write_rows(out / "numeric.tsv", [("entity", "attribute", "value"), *numbers])
    num_pictures = _write_pictures(out, graph)
    versions = source_versions()
    lines = [f"- {name} {versions[name]}: {what}. Licence: {licence}." for name, what, licence in SOURCES]
    write_bytes(out / "SOURCES.md", ("# Where this graph comes from\n\n" + "\n".join(lines) + "\n").encode("utf8"))
    return _table(graph, splits, texts, num_pictures)


def describe(graph: Graph) -> dict[str, list[str]]:
    """Entity -> pieces of its description, none of which names what the entity is linked to."""
    answers: dict[str, set[str]] = defaultdict(set)
    for head, _, tail in graph.facts:
        answers[head] |= entity_names(graph, tail)
        answers[tail] |= entity_names(graph, head)
    countries = {
        alias for name, kind in graph.kinds.items() if kind == "country" for alias in entity_names(graph, name)
    }
    nothing: set[str] = set()
    return {
        name: clean_pieces(
            graph.aliases.get(name, []), graph.labels[name], answers[name], nothing if kind == "country" else countries
        )
        for name, kind in graph.kinds.items()
    }


def entity_names(graph: Graph, name: str) -> set[str]:
    """Folded names under which an entity would be recognised.

    Its own, and a country's spellings of four letters or more.
    """
    own = {core_name(name), core_name(graph.labels[name])}
    if graph.kinds[name] == "country":
        own |= {folded for alias in graph.aliases.get(name, []) if len(folded := fold(alias)) > 3}
    return own


def _spelled_out_facts(graph: Graph, texts: dict[str, list[str]]) -> set[Fact]:
    """Facts that a label gives away; they stay in train."""
    full = {name: "; ".join([graph.labels[name], *texts[name]]) for name in graph.kinds}
    names = {name: entity_names(graph, name) for name in graph.kinds}
    return {
        fact
        for fact in graph.facts
        if spelled_out((full[fact.head], full[fact.tail]), (names[fact.head], names[fact.tail]))
    }


def _write_rows(path: Path, rows: Iterable[tuple[str, ...]]) -> None:
    write_bytes(path, "".join("\t".join(row) + "\n" for row in rows).encode("utf8"))


def _write_pictures(out: Path, graph: Graph) -> Counter[str]:
    """Write the pictures and their table; entity -> number of pictures."""
    rows, count = [("entity", "file", "kind")], Counter[str]()
    wanted: set[str] = set()
    for i, name in enumerate(sorted(name for name, kind in graph.kinds.items() if kind == "country")):
        flag = flag_png(graph.flags[name]) if name in graph.flags else None
        outline = outline_png(graph.outlines[name]) if name in graph.outlines else None
        for number, (kind, content) in enumerate((("flag", flag), ("outline", outline))):
            if content is None:
                continue
            file = f"images/{i:04d}_{number}.png"
            write_bytes(out / file, content)
            rows.append((name, file, kind))
            wanted.add(Path(file).name)
            count[name] += 1
    for stale in (out / "images").glob("*.png"):
        if stale.name not in wanted:
            stale.unlink()
    _write_rows(out / "images.tsv", rows)
    return count


def _table(graph: Graph, splits: dict[str, list[Fact]], texts: dict[str, list[str]], num_pictures: Counter[str]) -> str:
    """Counts as text: entities by kind, facts by relation and split, share with each modality."""
    kinds, total = Counter(graph.kinds.values()), len(graph.kinds)
    lines = [f"entities {total:,}: " + ", ".join(f"{kind} {n:,}" for kind, n in kinds.most_common())]
    by_relation = {split: Counter(fact.relation for fact in facts) for split, facts in splits.items()}
    lines.append(f"{'relation':<18}" + "".join(f"{split:>8}" for split in SPLITS))
    for relation in sorted(by_relation["train"]):
        lines.append(f"{relation:<18}" + "".join(f"{by_relation[split][relation]:>8,}" for split in SPLITS))
    lines.append(f"{'all':<18}" + "".join(f"{len(splits[split]):>8,}" for split in SPLITS))
    present = {
        "label": total,
        "description": sum(map(bool, texts.values())),
        "numbers": sum(map(bool, graph.numbers.values())),
    }
    present["picture"] = len(num_pictures)
    lines.append("share of entities with " + ", ".join(f"{what} {n / total:.0%}" for what, n in present.items()))
    return "\n".join(lines)


def folder_digest(folder: Path) -> str:
    """SHA-256 over the names and bytes of every file in the folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode("utf8") + b"\0" + path.read_bytes())
    return digest.hexdigest()


def main() -> None:
    """Parse the command line, write the folder, print the table."""
    parser = argparse.ArgumentParser(prog="python -m tools.make_countries", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="folder to write the raw graph to")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the choice of provinces (default 0)")
    parser.add_argument(
        "--max-cities", type=int, default=DEFAULT_CITIES, help=f"cities besides the capitals (default {DEFAULT_CITIES})"
    )
    args = parser.parse_args()
    print(make_countries(args.out, args.seed, args.max_cities))


if __name__ == "__main__":
    run_command(main)
