"""Command: pack a raw folder into WebDataset shards and a graph."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mocme_dist.commands import absolute, command_parser, config_of, run_command
from mocme_dist.console import printable

if TYPE_CHECKING:
    from mocme_dist.data.dataset import Dataset

DESCRIPTION = """\
Pack a raw folder into a data set: shards of texts, numbers, image, audio and video files, and the graph with its names,
triples and known answers. RAW_DIR holds train.txt, valid.txt and test.txt (tab-separated head, relation, tail) and any
of text.tsv (entity and text columns), numeric.tsv (entity, attribute, value), images.tsv, audio.tsv, video.tsv (entity,
file) and entity2id.txt; each may end in .gz. Vectors computed elsewhere are files features/MODALITY.npy, .safetensors
or .pt with the names of their rows in features/MODALITY.ids. The same folder and settings give the same bytes."""

LEAKS = {
    "test_in_train": "test triples that occur in train",
    "test_in_valid": "test triples that occur in valid.txt",
    "valid_in_train": "triples of valid.txt that occur in train",
    "test_pairs_in_train": "test triples whose (head, tail) is linked in train by any relation",
    "test_inverse_pairs_in_train": "test triples whose (tail, head) is linked in train by any relation",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, pack, report."""
    parser = command_parser("pack", DESCRIPTION)
    parser.add_argument("raw", metavar="RAW_DIR", help="raw folder")
    parser.add_argument(
        "dataset", metavar="DATASET_DIR", help="new or empty folder for the data set, or an fsspec URL (s3://...)"
    )
    parser.add_argument("--shard-rows", type=int, metavar="N", help="entities per shard (data.shard_rows, 4096)")
    parser.add_argument(
        "--seed", type=int, metavar="N", help="seed of the entities' ids and of the development set (data.seed, 0)"
    )
    args = parser.parse_args(arguments)
    given = {"data.shard_rows": args.shard_rows, "data.seed": args.seed}
    config = config_of(args, [f"{key}={value}" for key, value in given.items() if value is not None])

    from mocme_dist.data.packing import pack_folder
    from mocme_dist.data.progress import Progress

    with Progress("pack"):
        dataset = pack_folder(Path(absolute("RAW_DIR", args.raw)), absolute("DATASET_DIR", args.dataset), config.data)
    sys.stdout.write(printable("\n".join(report_lines(dataset))) + "\n")


def report_lines(dataset: Dataset) -> Iterator[str]:
    """Yield the packing report as lines for a reader.

    Raises:
        DataError: the manifest's report is not one that packing wrote.
    """
    from mocme_dist.data.manifests import PackReport, checked

    manifest = dataset.manifest
    report = dataset.manifest["report"]
    checked(PackReport, report, dataset.directory / "manifest.json (report)", "pack the data set again")
    size_mb = sum(entry.bytes for entry in dataset.entries) / 1e6
    yield f"{dataset.place}: {dataset.num_entities:,} entities, {dataset.num_relations:,} relations"
    shards = f"{len(dataset.entries):,} shards of {manifest['shard_rows']:,} ids"
    yield f"  {shards}, {size_mb:,.1f} MB, fingerprint {dataset.fingerprint[:12]}"
    yield "  triples:    " + ", ".join(f"{split} {count:,}" for split, count in manifest["splits"].items())
    yield "  duplicates: " + ", ".join(f"{split} {count:,} dropped" for split, count in report["duplicates"].items())
    yield "  self loops: " + ", ".join(f"{split} {count:,}" for split, count in report["self_loops"].items())
    if cut := report.get("development_set"):
        aside = f"{cut['valid_file_set_aside']:,} of valid.txt set aside"
        yield f"  valid:      {cut['cut_from_train']:,} triples held out of train; {aside}"
    yield "modalities:"
    for modality, facts in manifest["modalities"].items():
        extra = ", ".join(f"{name} {_short(value)}" for name, value in facts.items() if name != "entities")
        yield f"  {modality + ':':9}{_share(facts['entities'], dataset.num_entities)} of entities; {extra}"
    for kind, found in (report.get("twins") or {}).items():
        if kind != "rule" and found["groups"]:
            rule = report["twins"]["rule"]
            yield f"  {kind}: {found['groups']:,} groups of names that look the same; data.twins={rule}"
    missing = report["missing"]
    yield f"  {'none:':9}{_share(missing['entities'], missing['of'])} of entities"
    yield from (f"  {name.replace('_', ' ')}: {count:,}" for name, count in report["cleaned"].items() if count)
    yield from (
        f"  {modality}: {count:,} rows of entities outside the graph ignored"
        for modality, count in report["ignored_rows"].items()
        if count
    )
    yield from (
        f"  {modality}: {found['files']:,} files of an unknown format left out"
        for modality, found in report.get("undecodable", {}).items()
    )
    for modality, found in report.get("vectors", {}).items():
        instead = f", instead of {found['instead_of']}" if found["instead_of"] else ""
        yield (
            f"  {modality}: {found['rows']:,} vectors of {found['file']} named by {found['named_by']}{instead}; "
            f"{found['outside_graph']:,} outside the graph ignored, {found['all_zero']:,} all zero left out"
        )
    yield "between splits:"
    yield from (
        f"  {_share(found['triples'], found['of'])} {LEAKS.get(name, name)}"
        for name, found in report["leakage"].items()
    )
    unseen = report["unseen"]
    for split in ("valid", "test"):
        found = unseen[split]
        yield (
            f"  {_share(found['triples'], found['of'])} {split} triples with an entity ({found['entities']:,}) or "
            f"relation ({found['relations']:,}) that train never shows; data.unseen={unseen['rule']}"
        )


def _share(count: int, total: int) -> str:
    return f"{count:,} of {total:,} ({100 * count / max(total, 1):.1f} %)"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"of {value['file']}, {value['width']:,} wide"
    return ", ".join(value) if isinstance(value, list) else f"{value:,}"


if __name__ == "__main__":
    run_command(main)
