"""The map in README.md names every row of the fault matrix, and only tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
ITEM = re.compile(r"^- (\d+)\*? .*\n((?:  .*\n)+)", re.MULTILINE)


def read_map() -> dict[int, list[tuple[str, str]]]:
    """(file, function) of the tests of each row; a name that is too long for its line is on the next one."""
    rows = {}
    for row, tests in ITEM.findall((HERE / "README.md").read_text()):
        whole = tests.replace("::`\n  `", "::")
        names = [name.partition("::") for name in re.findall(r"`([^`]+)`", whole)]
        rows[int(row)] = [(file, function) for file, _, function in names]
    return rows


ROWS = read_map()


def functions(file: Path) -> set[str]:
    return set(re.findall(r"^def (test_\w+)\(", file.read_text(), re.MULTILINE))


def test_every_row_has_a_test():
    assert list(ROWS) == list(range(1, 51)) and all(ROWS.values())


def test_every_test_of_the_map_exists():
    for row, tests in ROWS.items():
        for file, function in tests:
            path = HERE / file
            assert path.is_file(), file
            if function.startswith("test_row"):
                found = [each for each in functions(path) if each.startswith(function)]
                assert found and all(row in numbers(each) for each in found), function
            elif function:
                assert function in functions(path), function


def numbers(function: str) -> set[int]:
    """The rows in the name of a test."""
    head = re.match(r"test_rows?_(\d\d)(?:_and_(\d\d))?_", function)
    return {int(number) for number in head.groups() if number} if head else set()


def test_every_test_of_a_row_is_in_the_map():
    for path in HERE.glob("test_row*.py"):
        for function in functions(path):
            for row in numbers(function):
                named = [name for file, name in ROWS[row] if file == path.name]
                assert any(function.startswith(name) for name in named), function
