"""`mocme import FORM SOURCE OUT` (or `python -m mocme_dist.import`): a published graph as a raw folder."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path

from mocme_dist.commands import run_command
from mocme_dist.importers import FORMS

DESCRIPTION = """\
Read a release of another project and write a raw folder for `pack`. `mocme import FORM --help` describes SOURCE. The
last line printed is a JSON object with the number of rows per file.

  mocme import mmkg MKG-W-release mkg_w        then: mocme pack mkg_w mkg_w.packed"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, import, print the number of rows per file."""
    parser = argparse.ArgumentParser(
        prog="mocme import", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    forms = parser.add_subparsers(dest="form", required=True, metavar="FORM")
    for form in FORMS:
        module = importlib.import_module(f"mocme_dist.importers.{form}")
        title = (module.__doc__ or "").partition(":")[0]
        own = forms.add_parser(
            form, help=title, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        own.add_argument("source", type=Path, metavar="SOURCE", help="folder of the release")
        own.add_argument("out", type=Path, metavar="OUT", help="raw folder to write")
        if hasattr(module, "add_arguments"):
            module.add_arguments(own)
    options = vars(parser.parse_args(arguments))
    form = options.pop("form")
    run = getattr(importlib.import_module(f"mocme_dist.importers.{form}"), f"import_{form}")
    print(json.dumps(run(options.pop("source"), options.pop("out"), **options)), flush=True)


if __name__ == "__main__":
    run_command(main)
