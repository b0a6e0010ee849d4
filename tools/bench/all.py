"""All benchmarks one after another: `python -m tools.bench.all [--quick] [--only NAME ...]`, or `make bench`.

Each benchmark runs in its own process, which prints all of its figures. A row with the date, the commit and at most
five figures is added to its table in RESULTS.md, between the markers `<!-- bench NAME -->` and `<!-- end NAME -->`; a
list under the table names the machine of each commit. A table keeps its figures: the first run chooses them, those with
a bar first. Text outside the markers is not touched. Exits with 1 if a benchmark failed or its parity check did.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tools.bench.common import is_met

FOLDER = Path(__file__).parent
BENCHES = ("loss", "mine", "experts", "step", "ranking", "evidence", "peers")
HEAD = ["date", "commit"]
TAIL = ["command"]
WIDEST = 8
"""Largest number of columns of a table."""


def run(name: str, quick: bool) -> dict[str, Any] | None:
    """Run one benchmark, show its output and return its closing line, or None if it printed none."""
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
    """Return one run as a row: date, commit, every figure under its name (those with a bar first), and the command."""
    parity = "" if result["parity"] else ", PARITY FAILED"
    cells = {"date": time.strftime("%Y-%m-%d"), "commit": result["machine"]["commit"] + parity}
    for figure in sorted(result["rows"], key=lambda figure: not figure["bar"]):
        met = {True: ", met", False: ", missed", None: ""}[is_met(figure)]
        bar = f" ({figure['bar']}{met})" if figure["bar"] else ""
        cells[figure["name"].replace("|", "/")] = f"{figure['value']:,.4g}{bar}"
    return {**cells, "command": f"`python -m tools.bench.{result['bench']}{' --quick' * bool(result.get('quick'))}`"}


def read_table(text: str) -> tuple[list[str], list[dict[str, str]]]:
    """Return the columns and rows of a Markdown table; other lines are ignored."""
    lines = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in text.strip().splitlines()
        if line.startswith("|")
    ]
    if len(lines) < 2:
        return [*HEAD, *TAIL], []
    return lines[0], [dict(zip(lines[0], line, strict=False)) for line in lines[2:]]


def add_row(text: str, cells: dict[str, str]) -> str:
    """Return the table with one more row. New columns go before the command while there is room.

    Old rows are empty there.
    """
    columns, rows = read_table(text)
    middle = [name for name in columns if name not in HEAD + TAIL]
    middle += [name for name in cells if name not in columns]
    columns = [*HEAD, *middle[: WIDEST - len(HEAD + TAIL)], *TAIL]
    lines = [columns, ["---"] * len(columns), *([row.get(name, "") for name in columns] for row in [*rows, cells])]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def add_machine(text: str, commit: str, device: str) -> str:
    """Return the list of machines under a table, `- DEVICE: COMMIT, ...`, with one more commit."""
    machines = dict(line.removeprefix("- ").rsplit(": ", 1) for line in text.splitlines() if line.startswith("- "))
    commits = machines.get(device, "").split(", ") if device in machines else []
    machines[device] = ", ".join(dict.fromkeys([*commits, commit]))
    return "\n".join(f"- {name}: {made}" for name, made in machines.items())


def update(page: str, name: str, result: dict[str, Any]) -> str:
    """Return RESULTS.md with one more row in the table of `name`; a missing section is added at the end."""
    begin, end = f"<!-- bench {name} -->", f"<!-- end {name} -->"
    if begin not in page:
        page = f"{page.rstrip()}\n\n## Runs of tools/bench/{name}.py\n\n{begin}\n{end}\n"
    before, rest = page.split(f"{begin}\n", 1)
    table, after = rest.split(end, 1)
    made = result["machine"]
    section = f"{add_row(table, cells_of(result))}\n\n{add_machine(table, made['commit'], made['device'])}"
    return f"{before}{begin}\n{section}\n{end}{after}"


def main() -> None:
    """Run the chosen benchmarks and add their rows."""
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
            args.results.write_text(update(page, name, result), encoding="utf8")
    print(f"failed or without parity: {', '.join(bad)}" if bad else f"all done; rows added to {args.results}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
