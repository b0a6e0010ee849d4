"""`python -m mocme_dist.evaluate RUN_DIR`: exact filtered metrics of a trained run."""

from __future__ import annotations

import argparse

from mocme_dist.cluster import leave_ray
from mocme_dist.commands import add_step, add_trust, command_parser, run_command
from mocme_dist.config.schema import MODALITIES
from mocme_dist.console import print_result, reserve_stdout
from mocme_dist.data.progress import Progress
from mocme_dist.train import config_of_run

DESCRIPTION = """\
Rank a split under a run's best checkpoint (by valid MRR), every entity a candidate, known answers filtered, ties at
their mean. The run's own configuration applies; --config and --set change it. The last line printed is one JSON
object, also written to RUN_DIR/metrics.SPLIT.json. RUN_DIR/metrics.json is the report of `train` and stays as it is.
With --drop, features of a share of the entities are hidden; queries that this affects are reported apart, and the
report goes to RUN_DIR/metrics.SPLIT.drop-MODALITY-SHARE.json.

  python -m mocme_dist.evaluate runs/demo
  python -m mocme_dist.evaluate runs/demo --split valid --set launch.mode=local
  python -m mocme_dist.evaluate runs/demo --drop text:0.5 --drop image:0.5"""


def modality_share(text: str) -> tuple[str, float]:
    """MODALITY:SHARE as a pair.

    Raises:
        argparse.ArgumentTypeError: the modality is unknown, or the share is not in (0, 1].
    """
    name, _, share = text.partition(":")
    try:
        value = float(share)
    except ValueError:
        value = 0.0
    if name not in MODALITIES or not 0 < value <= 1:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected MODALITY:SHARE with one of {', '.join(MODALITIES)} and a share above 0 and up to 1"
        )
    return name, value


def main() -> None:
    """Parse, evaluate, print the report."""
    parser = command_parser("evaluate", DESCRIPTION)
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("--split", choices=("train", "valid", "test"), default="test")
    add_step(parser)
    parser.add_argument(
        "--drop",
        action="append",
        type=modality_share,
        default=[],
        metavar="MODALITY:SHARE",
        help="hide a modality of a share of the entities, such as text:0.5; may be repeated",
    )
    add_trust(parser)
    args = parser.parse_args()
    config = config_of_run(args.run_dir, args.config, args.overrides, args.trust_encoders)
    from mocme_dist.evaluation.metrics import report_table
    from mocme_dist.runs.launch import is_follower, launch

    reserve_stdout()
    with Progress("evaluate", active=not is_follower(config.launch)):
        report = launch(config, "evaluate", split=args.split, step=args.step, drop=dict(args.drop))
        leave_ray()
    if not is_follower(config.launch):
        print_result(report, report_table(report))


if __name__ == "__main__":
    run_command(main)
