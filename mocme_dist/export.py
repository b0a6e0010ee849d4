"""`python -m mocme_dist.export RUN_DIR BUNDLE_DIR`: a trained run as a bundle that answers questions, or for other tools."""

from __future__ import annotations

import json
from pathlib import Path

from mocme_dist.commands import checkpoint_step, command_parser, run_command

DESCRIPTION = """\
Write the best checkpoint of a run (by valid MRR) as a bundle: fused vectors, relations, names, known facts, what it
takes to encode new entities, and probabilities fitted on valid. Ask it with python -m mocme_dist.query. Streams: memory
is a part of some 64 MiB and the dense model. A killed export goes on where it stopped when started again.

  python -m mocme_dist.export runs/demo bundles/demo
  python -m mocme_dist.export runs/demo exports/demo-npz --format npz

formats for other tools: npz (entities, phases, gamma, names: enough to recompute every rank), parquet, word2vec.
The last line printed is one JSON object."""


def main() -> None:
    """Parse, export, print what was written."""
    parser = command_parser("export", DESCRIPTION)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="run.dir of a training run, a folder or an fsspec URL")
    parser.add_argument(
        "bundle_dir", metavar="BUNDLE_DIR", help="folder to write, or an fsspec URL; an earlier export of the same format is replaced"
    )
    parser.add_argument("--format", choices=("bundle", "npz", "parquet", "word2vec"), default="bundle")
    parser.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="of a bundle's vectors; float16 halves size and time"
    )
    parser.add_argument("--step", type=checkpoint_step, default="auto", metavar="STEP", help="a checkpoint's step instead of the best one")
    args = parser.parse_args()

    from mocme_dist.data.storage import Mirror, is_url
    from mocme_dist.errors import CheckpointError, ConfigError
    from mocme_dist.serving.layout import MANIFEST, check_target
    from mocme_dist.train import config_of_run

    config = config_of_run(args.run_dir, args.config, args.overrides)
    mirror = Mirror(args.bundle_dir) if is_url(args.bundle_dir) else None
    target = mirror.path if mirror else Path(args.bundle_dir).absolute()
    if mirror is not None:
        mirror.pull()
        if mirror.listing() and not (target / MANIFEST).is_file():
            raise ConfigError(f"{mirror.url}: holds files that are no export; choose another place")
    check_target(target, args.format)
    # torch takes seconds to import: not before the folders are known to be what they should
    from mocme_dist.serving.export import export_bundle
    from mocme_dist.serving.foreign import export_foreign
    from mocme_dist.serving.rows import RunRows
    from mocme_dist.training import checkpoint, remote
    from mocme_dist.training.rundir import RunDirectory
    from mocme_dist.training.worker import open_dataset

    directory, dataset = RunDirectory(config.run.dir), open_dataset(config)
    if directory.mirror is None:
        found = checkpoint.find(directory.checkpoints, args.step, best=True)
    else:
        found = remote.agree(directory.mirror, args.step, (0, dataset.num_entities), best=True)
    if found is None:
        raise CheckpointError(f"{args.run_dir}: no checkpoint; train first")
    rows = RunRows(config, dataset, found)
    if args.format == "bundle":
        manifest = export_bundle(rows, target, args.dtype)
    else:
        manifest = export_foreign(rows, target, args.format)
    if mirror is not None:
        mirror.remove(MANIFEST)  # nobody is to read old and new parts together
        mirror.push_tree(last=[MANIFEST], skip=["lock"])
        for name in mirror.listing():
            if not (target / name).is_file():
                mirror.remove(name)
    shown = {key: manifest[key] for key in ("kind", "num_entities", "num_relations", "width", "trained")}
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    calibration = manifest.get("calibration")
    extra = {"held_out_error": calibration.get("held_out_error")} if calibration else {}
    print(json.dumps({"bundle": mirror.url if mirror else str(target), **shown, "bytes": size, **extra}), flush=True)


if __name__ == "__main__":
    run_command(main)
