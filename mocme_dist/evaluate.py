"""`python -m mocme_dist.evaluate RUN_DIR`: exact filtered metrics of a trained run."""

from __future__ import annotations

import json

from mocme_dist.cluster import leave_ray
from mocme_dist.commands import checkpoint_step, command_parser, run_command
from mocme_dist.train import config_of_run

DESCRIPTION = """\
Rank a split under a run's best checkpoint (by valid MRR), every entity a candidate, known answers filtered, ties at
their mean. The run's own configuration applies; --config and --set change it. The last line printed is one JSON
object, also written to RUN_DIR/metrics.json.

  python -m mocme_dist.evaluate runs/demo
  python -m mocme_dist.evaluate runs/demo --split valid --set launch.mode=local"""


def main() -> None:
    """Parse, evaluate, print the report."""
    parser = command_parser("evaluate", DESCRIPTION)
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("--split", choices=("train", "valid", "test"), default="test")
    parser.add_argument("--step", type=checkpoint_step, default="auto", metavar="STEP", help="a checkpoint's step instead of the best one")
    args = parser.parse_args()
    config = config_of_run(args.run_dir, args.config, args.overrides)
    from mocme_dist.training.launch import is_follower, launch

    report = launch(config, "evaluate", split=args.split, step=args.step)
    leave_ray()
    if not is_follower(config):
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    run_command(main)
