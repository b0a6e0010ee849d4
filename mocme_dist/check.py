"""`mocme check RAW_DIR` (or `python -m mocme_dist.check`): the report of `pack` without a data set."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mocme_dist.commands import command_parser, config_of, run_command
from mocme_dist.console import printable

DESCRIPTION = """\
Read a raw folder as `pack` does and print the same report: sizes, modalities, duplicates, leakage between splits, and
entities and relations that are not in train. Nothing is kept: shards are written to a temporary folder ($TMPDIR).

  mocme check mygraph
  mocme check mygraph --set data.dev=cut:0.1"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, pack into a temporary folder, print the report."""
    parser = command_parser("check", DESCRIPTION)
    parser.add_argument("raw", metavar="RAW_DIR", help="raw folder")
    args = parser.parse_args(arguments)
    config = config_of(args)

    from mocme_dist.data.packing import pack_folder
    from mocme_dist.pack import report_lines

    with tempfile.TemporaryDirectory(prefix="mocme-check-") as folder:
        dataset = pack_folder(Path(args.raw), Path(folder) / "dataset", config.data)
        first, *others = report_lines(dataset)
    # The first line begins with the data set's place, which no longer exists.
    sys.stdout.write(printable("\n".join([args.raw + first.removeprefix(dataset.place), *others])) + "\n")


if __name__ == "__main__":
    run_command(main)
