"""`mocme config` (or `python -m mocme_dist.config`): prints the resolved settings as YAML with their descriptions."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mocme_dist.commands import command_parser, config_of, run_command
from mocme_dist.config.load import documented

DESCRIPTION = """\
Print every setting as YAML with its description as a comment: the defaults, or the result of --config and --set. The
output is itself a configuration file.

  mocme config > my.yaml
  mocme config --config mkg_w --set experts.width=512"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, print the settings."""
    args = command_parser("config", DESCRIPTION).parse_args(arguments)
    sys.stdout.write(documented(config_of(args)))


if __name__ == "__main__":
    run_command(main)
