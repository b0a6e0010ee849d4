"""`mocme discover BUNDLE --output FILE`: writes the likeliest facts that are not known."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mocme_dist.commands import EXIT_CODES, absolute, run_command

if TYPE_CHECKING:
    from mocme_dist.serving.bundle import Bundle
    from mocme_dist.serving.discover import Search, Settings, Unit

# How long all workers together may take for the next piece (seconds).
UNIT_S = 3600.0
DESCRIPTION = """\
Write the likeliest facts of the whole graph that it does not know, likeliest first, with ids, labels, a probability
and a reason. Both questions of a fact are asked, by its head and by its tail, of every entity for which train makes
them plausible. Probabilities are fitted on valid. The report says how many of the 1,000 likeliest facts are held-out
ones if only train is known, beside a ranking by frequency. An interrupted search continues when the same command is
given again.

  mocme discover bundles/demo --output facts.csv
  mocme discover bundles/demo --relation city_in_country --min-probability 0.8 --output facts.parquet
  mocme discover bundles/demo --output facts.nt                  (N-Triples)
  mocme discover bundles/demo --duplicates --output pairs.csv

The last line printed is one JSON object."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, search, print what was found."""
    args = _parse(arguments)
    from mocme_dist.console import print_result, reserve_stdout
    from mocme_dist.data.storage import is_url
    from mocme_dist.errors import ConfigError
    from mocme_dist.serving.bundle import Bundle
    from mocme_dist.serving.discovered import FORMATS

    output = Path(absolute("--output", args.output))
    ending = f".{args.format}" if args.format else output.suffix.lower()
    if is_url(args.output) or ending not in FORMATS:
        raise ConfigError(f"--output {args.output}: expected a local file that ends in {', '.join(FORMATS)}")
    reserve_stdout()
    started = time.monotonic()
    bundle = Bundle.open(args.bundle_dir)
    if args.duplicates:
        report = _duplicates(bundle, output, args.min_cosine, ending)
    else:
        report = discover(bundle, output, settings_of(bundle, args), args.workers, ending)
    print_result({"output": str(output), **report, "seconds": round(time.monotonic() - started, 1)})


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mocme discover",
        description=DESCRIPTION,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle_dir", metavar="BUNDLE", help="what export wrote, a folder or an fsspec URL")
    parser.add_argument("--output", required=True, metavar="FILE", help="ends in .csv, .parquet, .jsonl or .nt")
    parser.add_argument("--format", choices=("csv", "parquet", "jsonl", "nt"), help="default: by the ending of FILE")
    parser.add_argument("--min-probability", type=float, default=0.5, metavar="P", help="default 0.5")
    parser.add_argument(
        "--relation", nargs="+", action="extend", default=[], metavar="NAME", help="search these only; default all"
    )
    parser.add_argument(
        "--per-relation", type=int, default=1000, metavar="N", help="most facts of one relation; default 1000"
    )
    parser.add_argument(
        "--questions",
        type=int,
        default=0,
        metavar="N",
        help="most questions per relation and side, the most plausible first; default 0, all",
    )
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="Ray workers; default 0, this process alone"
    )
    parser.add_argument(
        "--duplicates",
        action="store_true",
        help="write pairs of entities that several modalities find near-equal instead",
    )
    parser.add_argument(
        "--min-cosine",
        type=float,
        default=0.98,
        metavar="C",
        help="of near-equal vectors, with --duplicates; default 0.98",
    )
    args = parser.parse_args(arguments)
    if not 0 <= args.min_probability <= 1:
        parser.error(f"--min-probability {args.min_probability:g}: expected a number from 0 to 1")
    if args.per_relation < 1 or args.questions < 0 or args.workers < 0:
        parser.error("--per-relation: expected 1 or more; --questions and --workers: 0 or more")
    return args


def settings_of(bundle: Bundle, args: argparse.Namespace) -> Settings:
    """Return the settings of the search that the command line asks for."""
    from mocme_dist.serving.discover import Settings

    rows = {bundle.find_relation(name) for name in args.relation} or range(bundle.num_relations)
    return Settings(tuple(sorted(rows)), args.per_relation, args.min_probability, args.questions)


def discover(
    bundle: Bundle, output: Path, settings: Settings, workers: int = 0, ending: str | None = None
) -> dict[str, Any]:
    """Search a bundle and write the facts found.

    Args:
        output: file; its ending is the format. Beside it lies the folder of the search until it is complete.
        workers: Ray workers; 0 does everything in this process.
        ending: format of the file if its name does not end so.

    Returns:
        facts, relations, questions, the fit of the probabilities, and precision on held-out facts (None without any).

    Raises:
        ConfigError: the bundle has no probabilities, or the ending is unknown. LockedError: another search to it is
        running.
    """
    import shutil

    from mocme_dist.data.files import held
    from mocme_dist.errors import LockedError, StorageError
    from mocme_dist.serving.discover import Search, run_units
    from mocme_dist.serving.discovered import facts_of, named, precision, write_rows

    folder = output.with_name(f"{output.name}.search")
    search = Search(bundle, settings, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with held(folder.with_name(f"{folder.name}.lock")):
            _clear_other(folder, search)
            run = None if workers == 0 else _on_ray(search, workers)
            for step in (0, 1):
                run_units(search, step, run)
            weights, about = search.fitted()
            found_held_out = precision(search, weights)
            count = write_rows(output, named(bundle, facts_of(search, weights)), ending)
            shutil.rmtree(folder)
    except BlockingIOError:
        raise LockedError(f"{output}: another search writes it; wait for it, or give another --output") from None
    except OSError as error:
        raise StorageError(f"{output}: cannot be written: {error}") from error
    questions = sum(unit.stop - unit.start for step in (0, 1) for unit in search.units(step))
    report = {"facts": count, "relations": len(settings.relations), "questions": questions}
    return {**report, "probability": about, "precision": found_held_out}


def _clear_other(folder: Path, search: Search) -> None:
    """Remove the files of a search of another bundle or with other settings."""
    from mocme_dist.data.files import clear, read_json, write_json
    from mocme_dist.serving.discover import fingerprint

    mark, wanted = folder / "search.json", {"search": fingerprint(search.bundle, search.settings)}
    if not mark.is_file() or read_json(mark) != wanted:
        clear(folder)
        folder.mkdir(exist_ok=True)
        write_json(mark, wanted)


def _on_ray(search: Search, workers: int) -> Any:
    """A function that spreads units over Ray actors; each opens the bundle once, and all see the folder."""
    from mocme_dist.cluster import connect_ray

    connect_ray(workers, trains=False)
    import ray

    from mocme_dist.errors import RankError

    place = str(search.bundle.directory)
    actor = ray.remote(num_cpus=1, max_restarts=3, max_task_retries=3)(_Worker)
    actors: list[Any] = [actor.remote(place, search.settings, str(search.folder)) for _ in range(workers)]

    def run(units: list[Unit]) -> Iterator[Unit]:
        waiting = list(reversed(units))
        running = {actors[at].run.remote(waiting.pop()): at for at in range(min(workers, len(waiting)))}
        while running:
            finished, _ = ray.wait(list(running), num_returns=1, timeout=UNIT_S)
            if not finished:
                raise RankError(
                    f"waited {UNIT_S:g} s for the first of {len(running)} pieces of the search on Ray, and none came; "
                    "see `ray status`; the same command continues with the pieces that are done"
                )
            done = finished[0]
            at = running.pop(done)
            yield ray.get(done)
            if waiting:
                running[actors[at].run.remote(waiting.pop())] = at

    return run


class _Worker:
    """One Ray worker of a search."""

    def __init__(self, place: str, settings: Settings, folder: str) -> None:
        from mocme_dist.serving.bundle import Bundle
        from mocme_dist.serving.discover import Search

        self.search = Search(Bundle.open(place), settings, Path(folder))

    def run(self, unit: Unit) -> Unit:
        """Do a unit."""
        self.search.run(unit)
        return unit


def _duplicates(bundle: Bundle, output: Path, min_cosine: float, ending: str) -> dict[str, Any]:
    from mocme_dist.serving.discovered import duplicates, write_rows

    return {"pairs": write_rows(output, duplicates(bundle, min_cosine), ending), "min_cosine": min_cosine}


if __name__ == "__main__":
    run_command(main)
