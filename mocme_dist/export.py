"""`mocme export RUN_DIR BUNDLE_DIR`: writes a trained run as a bundle that answers questions, or for other tools."""

from __future__ import annotations

import shutil
from pathlib import Path

from mocme_dist.commands import absolute, add_step, add_trust, command_parser, run_command
from mocme_dist.console import print_result, reserve_stdout

DESCRIPTION = """\
Write the best checkpoint of a run (by valid MRR) as a bundle: fused vectors, relations, names with labels, known
facts, the encoders' settings for unseen entities, probabilities fitted on valid, and a card. Ask it with mocme query.
The export streams: memory is one part of about 64 MiB and the dense model. The same command continues a killed export.

  mocme export runs/demo bundles/demo
  mocme export runs/demo exports/demo-npz --format npz
  mocme export runs/demo bundles/demo --set data.title='the world' data.license=CC0-1.0

formats for other tools: npz (entities, phases, gamma, names: enough to recompute every rank), parquet, word2vec (names
with white space escaped as in URLs), faiss (an exact index; ids are rows of entities.parquet).
The last line printed is one JSON object."""


def main() -> None:
    """Parse, export, print what was written."""
    parser = command_parser("export", DESCRIPTION)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="run.dir of a training run, a folder or an fsspec URL")
    parser.add_argument(
        "bundle_dir",
        metavar="BUNDLE_DIR",
        help="folder to write, or an fsspec URL; an earlier export of the same format is replaced",
    )
    parser.add_argument("--format", choices=("bundle", "npz", "parquet", "word2vec", "faiss"), default="bundle")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="of a bundle's vectors; float16 halves size and time",
    )
    add_step(parser)
    add_trust(parser)
    args = parser.parse_args()

    from mocme_dist.data.progress import Progress
    from mocme_dist.data.remote_storage import RemoteStorage
    from mocme_dist.data.storage import is_url
    from mocme_dist.errors import CheckpointError
    from mocme_dist.serving.bundle_format import check_remote_target, check_target, publish
    from mocme_dist.train import config_of_run

    reserve_stdout()
    bundle_dir = absolute("BUNDLE_DIR", args.bundle_dir)
    config = config_of_run(args.run_dir, args.config, args.overrides, args.trust_encoders)
    mirror = RemoteStorage(bundle_dir) if is_url(bundle_dir) else None
    # What goes to a URL is built here, and removed when it is there.
    target = mirror.path.with_name(f"export-{args.format}") if mirror else Path(bundle_dir)
    if mirror is not None:
        check_remote_target(mirror, args.format)
    check_target(target, args.format)
    with Progress("export"):
        # torch takes seconds to import: not before the folders are known to be what they should
        from mocme_dist.runs.directory import RunDirectory
        from mocme_dist.serving.export import export_bundle
        from mocme_dist.serving.export_formats import export_other
        from mocme_dist.serving.rows import RunRows
        from mocme_dist.training.build import open_dataset

        directory, dataset = RunDirectory(config.run.dir), open_dataset(config.data)
        found = directory.checkpoints.find(args.step, best=True)
        if found is None:
            raise CheckpointError(f"{args.run_dir}: no checkpoint; train first")
        rows = RunRows(config, dataset, found)
        if args.format == "bundle":
            manifest = export_bundle(rows, target, args.dtype)
        else:
            manifest = export_other(rows, target, args.format)
        if mirror is not None:
            publish(target, mirror)
            shutil.rmtree(target)
    shown = {key: manifest[key] for key in ("kind", "num_entities", "num_relations", "width", "trained")}
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    calibration = manifest.get("calibration")
    reliability = (calibration or {}).get("reliability")
    extra = {"calibration_error": round(reliability["ece"], 6)} if reliability else {}
    print_result({"bundle": mirror.url if mirror else str(target), **shown, "bytes": size, **extra})


if __name__ == "__main__":
    run_command(main)
