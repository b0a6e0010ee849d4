"""`mocme report RUN_DIR` (or `python -m mocme_dist.report`).

What a run has learned, as a table, a picture and a page.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mocme_dist.commands import EXIT_CODES, run_command

DESCRIPTION = """\
Report a finished run: test metrics beside those of a control, learning curves, weights of the modalities, reliability
of the probabilities, and facts of the test split completed in words, one for each of the most frequent relations,
drawn by seed and not chosen by result. Writes RUN_DIR/report.png and RUN_DIR/report.html, a page that loads nothing
from elsewhere.

  mocme report runs/demo
  mocme report runs/demo --control runs/demo-structure"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, write the report, print it."""
    parser = argparse.ArgumentParser(
        prog="python -m mocme_dist.report",
        description=DESCRIPTION,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run.dir of a finished training run, a folder")
    parser.add_argument("--control", type=Path, metavar="RUN_DIR", help="run to compare with, such as structure only")
    parser.add_argument("--name", default="MoCME", help="name of the run in the report (default: MoCME)")
    parser.add_argument("--control-name", default="structure only", help="name of the control (default: %(default)s)")
    parser.add_argument("--examples", type=int, default=5, metavar="N", help="facts to complete in words (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw of these facts (default: 0)")
    args = parser.parse_args(arguments)

    from mocme_dist.serving.report import write_report

    runs = {args.name: args.run_dir.absolute()}
    if args.control:
        runs[args.control_name] = args.control.absolute()
    sys.stdout.write(write_report(runs, args.examples, args.seed))


if __name__ == "__main__":
    run_command(main)
