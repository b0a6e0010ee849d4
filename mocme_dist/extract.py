"""The command `python -m mocme_dist.extract`: packed shards to feature parts."""

from __future__ import annotations

from mocme_dist.commands import command_parser, config_of, run_command

DESCRIPTION = """\
Run the frozen encoders over a packed data set: DATASET_DIR/shards -> DATASET_DIR/features/MODALITY.
Works on a Ray Data actor pool (encoders.actors), on the cluster of RAY_ADDRESS or a local one; with --local or
launch.mode=local in this process, without Ray. Run it again after any interruption: finished parts are kept.
Prints a table to standard error and one JSON report as the last line; DATASET_DIR/extract_report.json has it all."""


def main() -> None:
    """Parse the command line, extract, report."""
    parser = command_parser("extract", DESCRIPTION)
    parser.add_argument("dataset_dir", metavar="DATASET_DIR", help="what mocme_dist.pack wrote")
    parser.add_argument("--modalities", nargs="+", metavar="NAME", help="of text, image, numeric, audio, video; default: all there are")
    parser.add_argument("--local", action="store_true", help="no Ray: one process (as launch.mode=local)")
    parser.add_argument("--strict", action="store_true", help="stop at the first file that cannot be decoded (as encoders.strict=true)")
    parser.add_argument(
        "--on-bad-shard", choices=("error", "skip"), help="a cut or changed shard stops the job, or is left out (encoders.on_bad_shard)"
    )
    parser.add_argument(
        "--max-missing", type=float, metavar="SHARE", help="stop when more entities than this have no feature (data.max_missing, 1)"
    )
    args = parser.parse_args()
    given = {
        "encoders.strict": "true" if args.strict else None,
        "encoders.on_bad_shard": args.on_bad_shard,
        "data.max_missing": args.max_missing,
    }
    config = config_of(args, [f"{key}={value}" for key, value in given.items() if value is not None])

    import json
    import sys

    from mocme_dist.cluster import leave_ray
    from mocme_dist.data.dataset import Dataset

    dataset = Dataset.open(args.dataset_dir, check_shards=config.encoders.on_bad_shard == "error")
    # torch and the encoders take seconds to import: not before the data set is known to be one
    from mocme_dist.encoders.build import ENCODED
    from mocme_dist.encoders.pipeline import extract_features
    from mocme_dist.encoders.report import report_table

    modalities = args.modalities or [name for name in ENCODED if name in dataset.modalities]
    use_ray = not args.local and config.launch.mode == "ray"
    report = extract_features(dataset, config.encoders, config.data.text_columns, modalities, use_ray, config.data.max_missing)
    leave_ray()  # what it has still to say comes before the report, which is the last line
    print(report_table(report), file=sys.stderr)
    print(json.dumps(report, ensure_ascii=False))


if __name__ == "__main__":
    run_command(main)
