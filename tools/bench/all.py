"""All benchmarks one after another: `python -m tools.bench.all [--quick] [--only NAME ...]`, or `make bench`.

Each runs in a process of its own; its closing line becomes a dated row of its table in RESULTS.md, between the markers
`<!-- bench NAME -->` and `<!-- end NAME -->`. Rows that stand there stay, columns that come new are added, and what is
written by hand outside the markers is not touched. Exits with 1 when a benchmark failed or its twins did not agree.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tools.bench.common import is_met

FOLDER = Path(__file__).parent
BENCHES = ("loss", "mine", "experts", "step", "ranking", "peers")
HEAD = ["date", "commit", "machine"]
TAIL = ["command"]


def run(name: str, quick: bool) -> dict[str, Any] | None:
    """The closing line of one benchmark, which shows its own figures; None when it failed."""
    command = [sys.executable, "-m", f"tools.bench.{name}", *(["--quick"] if quick else [])]
    print(f"== {' '.join(command[1:])}", flush=True)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=FOLDER.parents[1]) as running:
        assert running.stdout is not None
        lines = []
        for line in running.stdout:
            lines.append(line.rstrip("\n"))
            if not line.startswith('{"bench"'):
                print(lines[-1], flush=True)
    try:
        found: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError):
        print(f"{name}: ended with {running.returncode} and no closing line")
        return None
    return found


def cells_of(result: dict[str, Any]) -> dict[str, str]:
    """One run as a row: every figure under its name, those with a bar with whether it is met."""
    made = result["machine"]
    cells = {"date": time.strftime("%Y-%m-%d"), "commit": made["commit"], "machine": made["device"]}
    for figure in result["rows"]:
        met = {True: " (met)", False: " (missed)", None: ""}[is_met(figure)]
        name = figure["name"] + (f" {figure['bar']}" if figure["bar"] else "")
        cells[name.replace("|", "/")] = f"{figure['value']:,.4g}{met}"
    if not result["parity"]:
        cells["machine"] += "; PARITY FAILED"
    return {**cells, "command": f"`python -m tools.bench.{result['bench']}{' --quick' * bool(result.get('quick'))}`"}


def read_table(text: str) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a Markdown table."""
    lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in text.strip().splitlines() if line.startswith("|")]
    if len(lines) < 2:
        return [*HEAD, *TAIL], []
    return lines[0], [dict(zip(lines[0], line, strict=False)) for line in lines[2:]]


def add_row(text: str, cells: dict[str, str]) -> str:
    """The table with one more row; new columns stand before the command, and old rows are empty there."""
    columns, rows = read_table(text)
    middle = [name for name in columns if name not in HEAD + TAIL]
    columns = [*HEAD, *middle, *(name for name in cells if name not in columns), *TAIL]
    lines = [columns, ["---"] * len(columns), *([row.get(name, "") for name in columns] for row in [*rows, cells])]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def update(page: str, name: str, cells: dict[str, str]) -> str:
    """RESULTS.md with one more row in the table of `name`; a section is made at the end when there is none."""
    begin, end = f"<!-- bench {name} -->", f"<!-- end {name} -->"
    found = re.search(rf"{re.escape(begin)}\n(.*?){re.escape(end)}", page, re.DOTALL)
    if found is None:
        return f"{page.rstrip()}\n\n## Runs of tools/bench/{name}.py\n\n{begin}\n{add_row('', cells)}\n{end}\n"
    return f"{page[: found.start(1)]}{add_row(found.group(1), cells)}\n{page[found.end(1) :]}"


def main() -> None:
    """Run, write, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats; their rows say so")
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=BENCHES, metavar="NAME", help=", ".join(BENCHES))
    parser.add_argument("--results", type=Path, default=FOLDER / "RESULTS.md", help="page to add the rows to")
    args = parser.parse_args()
    bad = []
    for name in args.only:
        result = run(name, args.quick)
        if result is None or not result["parity"]:
            bad.append(name)
        if result is not None:
            page = args.results.read_text(encoding="utf8") if args.results.exists() else "# Results\n"
            args.results.write_text(update(page, name, cells_of(result)), encoding="utf8")
    print(f"failed or without parity: {', '.join(bad)}" if bad else f"all done; rows added to {args.results}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
