"""The console command `mocme`: `mocme NAME ...` is `python -m mocme_dist.NAME ...`."""

from __future__ import annotations

import argparse
import importlib
import sys

from mocme_dist import __version__, environment
from mocme_dist.commands import run_command
from mocme_dist.completion import answer_in_place_of_parsing, complete_command

# Module and line of help of each command, in the order of first use.
COMMANDS = {
    "init": ("init", "look into a raw folder and write a configuration for it"),
    "check": ("check", "report what is in a raw folder: sizes, leakage, gaps"),
    "split": ("split", "cut one file of facts into train, valid and test"),
    "import": ("import", "write a raw folder from a published graph"),
    "config": ("config.__main__", "print all settings with their descriptions"),
    "pack": ("pack", "pack a raw folder into WebDataset shards and a graph"),
    "extract": ("extract", "compute features with frozen encoders"),
    "train": ("train", "train a model; packs and extracts what is missing"),
    "evaluate": ("evaluate", "rank a split exactly"),
    "export": ("export", "write a trained run as a bundle, or for other tools"),
    "query": ("query", "ask a bundle for missing facts"),
    "discover": ("discover", "write the likeliest facts that a bundle does not know"),
    "report": ("report", "show what a run has learned: a table, pictures, a page"),
    "serve": ("serve", "answer over HTTP, with a page to explore a bundle"),
}


def main() -> None:
    """Run the command that the first argument names; exit with its code."""
    parser = argparse.ArgumentParser(
        prog="mocme",
        description="Completes multi-modal knowledge graphs, from raw files to ranked answers.",
        epilog="`mocme COMMAND --help` describes a command. Each is also `python -m mocme_dist.COMMAND`.",
    )
    parser.add_argument("--version", action="version", version=f"mocme_dist {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    if environment.is_completing():
        complete_command(parser)
        sys.argv = environment.completed_line().split()
        answer_in_place_of_parsing()
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        parser.parse_args()
        return
    module = importlib.import_module(f"mocme_dist.{COMMANDS[name][0]}")
    # From here on the process is the command, whose parser reads the rest of the line.
    sys.argv = [f"mocme {name}", *sys.argv[2:]]
    run_command(module.main)


if __name__ == "__main__":
    main()
