"""How commands print their results."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import click

from pipeline.storage.next_command import typeable


class Result(Protocol):
    """What a command found or made."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data: what `--json` prints."""


def unused(path: Path) -> Path:
    """Return the path, or where something stands there already, the first of NAME-2, NAME-3, ... that is free."""
    names = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], names) if not name.exists())


def next_lines(commands: Mapping[str, str]) -> list[str]:
    """Return the lines that propose what to type next: `commands` without program and profile, and what each is for."""
    lines = {typeable(words): purpose for words, purpose in commands.items()}
    width = max(len(line) for line in lines)
    return ["next:", *(f"  {line:<{width}}  # {purpose}" for line, purpose in lines.items())]


def print_json(value: object) -> None:
    """Print a value as JSON on stdout."""
    click.echo(json.dumps(value, indent=2, default=str))


def print_result(result: Result, as_json: bool, text: Callable[[], Iterable[str]] | None = None) -> None:
    """Print a command's result on stdout: its data, or lines for people, by default one for each key."""
    if as_json:
        print_json(result.to_json())
    else:
        for line in named_lines(result.to_json()) if text is None else text():
            click.echo(line)


def named_lines(fields: Mapping[str, object]) -> list[str]:
    """Return one aligned line for each field; each further item of a list has a line of its own."""
    lines = []
    for name, value in fields.items():
        items = value if isinstance(value, list) else [value]
        lines += [f"{name + ':' if i == 0 else '':<17}{item}" for i, item in enumerate(items)]
    return lines


def print_table(rows: Sequence[Mapping[str, object]], columns: Sequence[str] | None = None) -> None:
    """Print rows as `table_lines` aligns them."""
    for line in table_lines(rows, columns):
        click.echo(line)


def table_lines(rows: Sequence[Mapping[str, object]], columns: Sequence[str] | None = None) -> list[str]:
    """Return rows as the lines of an aligned table, by default of all their keys; a missing value is a dash."""
    if columns is None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [list(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(text) for text in column) for column in zip(*cells, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _cell(value: object) -> str:
    if value is None or value == "":
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
