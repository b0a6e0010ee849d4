"""The command `python -m mocme_dist.extract`: packed shards to feature parts."""

from __future__ import annotations

from mocme_dist.commands import absolute, command_parser, config_of, run_command

DESCRIPTION = """\
Run the frozen encoders over a packed data set: DATASET_DIR/shards -> DATASET_DIR/features/MODALITY.
Uses a Ray Data actor pool (encoders.actors) on the cluster of RAY_ADDRESS or a local one; with --local or
launch.mode=local it runs in this process, without Ray. Run it again after any interruption: finished parts are kept.
Prints a table to standard error and a JSON report as the last line; also in
DATASET_DIR/extract_report.json."""


def main() -> None:
    """Parse the command line, extract, report."""
    parser = command_parser("extract", DESCRIPTION)
    parser.add_argument("dataset_dir", metavar="DATASET_DIR", help="packed data set")
    parser.add_argument(
        "--modalities",
        nargs="+",
        metavar="NAME",
        help="any of text, image, numeric, audio, video; default: all in the data set",
    )
    parser.add_argument("--local", action="store_true", help="run in one process without Ray (launch.mode=local)")
    parser.add_argument(
        "--strict", action="store_true", help="stop at the first file that cannot be decoded (encoders.strict=true)"
    )
    parser.add_argument(
        "--on-bad-shard",
        choices=("error", "skip"),
        help="a truncated or changed shard stops the job, or is skipped (encoders.on_bad_shard)",
    )
    parser.add_argument(
        "--max-missing",
        type=float,
        metavar="SHARE",
        help="fail if a larger share of entities has no feature (data.max_missing, 1)",
    )
    args = parser.parse_args()
    given = {
        "encoders.strict": "true" if args.strict else None,
        "encoders.on_bad_shard": args.on_bad_shard,
        "data.max_missing": args.max_missing,
    }
    config = config_of(args, [f"{key}={value}" for key, value in given.items() if value is not None])

    from mocme_dist.cluster import leave_ray
    from mocme_dist.console import filter_stderr, print_result, reserve_stdout, write_line
    from mocme_dist.data.dataset import Dataset
    from mocme_dist.data.progress import Progress

    reserve_stdout()
    dataset = Dataset.open(
        absolute("DATASET_DIR", args.dataset_dir), check_shards=config.encoders.on_bad_shard == "error"
    )
    # torch and the encoders take seconds to import, so the data set is checked first
    from mocme_dist.encoders.build import ENCODED
    from mocme_dist.encoders.pipeline import extract_features
    from mocme_dist.encoders.report import report_table

    modalities = args.modalities or [name for name in ENCODED if name in dataset.modalities]
    use_ray = not args.local and config.launch.mode == "ray"
    if not use_ray:
        filter_stderr()  # decoders in C write a line per damaged frame; under Ray that is done when it starts
    with Progress("extract features"):
        report = extract_features(
            dataset, config.encoders, config.data.text_columns, modalities, use_ray, config.data.max_missing
        )
        leave_ray()  # before the report, which is the last line
    write_line(report_table(report))
    print_result(report)


if __name__ == "__main__":
    run_command(main)
